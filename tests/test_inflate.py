"""Deflated data sets, read as far as asked: what comes out is what went in, bombs and damage are named."""

import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest

from mp3d.data.dicom.inflate import MAX_INFLATED_BYTES, inflating
from mp3d.errors import Refusal

CONTENT = np.random.default_rng(0).integers(0, 16, 300_000, np.uint8).tobytes()


def deflated(content: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflater.compress(content) + deflater.flush()


def bomb() -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    chunk = bytes(2**20)
    return b"".join(deflater.compress(chunk) for _ in range(2 * MAX_INFLATED_BYTES >> 20)) + deflater.flush()


@pytest.mark.parametrize("first", [10, 100_000, 299_999, 300_000, 400_000])
def test_any_part_is_that_of_the_content(first: int) -> None:
    """Small reads go step by step, large ones at once; what follows either must fit."""
    file = inflating(BytesIO(deflated(CONTENT)))
    file.seek(5)
    assert file.read(first) == CONTENT[5 : 5 + first]
    assert file.tell() == min(5 + first, len(CONTENT))
    assert file.seek(0, 2) == len(CONTENT)
    file.seek(-7, 1)
    assert file.read(100) == CONTENT[-7:]
    file.seek(2 * len(CONTENT))
    assert file.read(1) == b""


@pytest.mark.parametrize("read", [100, 200_000])
def test_a_cut_stream_ends_early(read: int) -> None:
    file = inflating(BytesIO(deflated(CONTENT)[:50_000]))
    assert file.read(read) == CONTENT[:read][: file.tell()]
    assert file.seek(0, 2) < len(CONTENT)


@pytest.mark.parametrize("read", [100, 200_000])
def test_what_is_no_deflated_stream_is_refused(read: int) -> None:
    with pytest.raises(Refusal, match="BAD_HEADER"):
        inflating(BytesIO(b"\xff" * 1000)).read(read)


def test_a_bomb_costs_what_is_read_of_it_and_is_refused_at_the_limit() -> None:
    tracemalloc.start()
    file = inflating(BytesIO(bomb()))
    assert file.read(2**20) == bytes(2**20)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    with pytest.raises(Refusal, match="TOO_LARGE"):
        file.seek(0, 2)
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_INFLATED_BYTES
    tracemalloc.stop()
