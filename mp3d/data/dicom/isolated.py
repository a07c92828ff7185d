"""DICOM files read in the worker processes of :mod:`mp3d.data.decode`; what grouping and volumes are made with.

Of a file that is not compressed a worker reads the header; its pixels are then copied from where they lie, as many
bytes as were checked, which needs no parsing and no second process.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16
from pydantic import TypeAdapter
from pydicom import uid

from mp3d.data.decode import REQUESTS_AHEAD, Pool, Request, Task
from mp3d.data.dicom import frames, pixels
from mp3d.data.dicom.elements import Pixels
from mp3d.data.dicom.header import Header
from mp3d.errors import Refusal

IN_PLACE = pixels.NATIVE - {uid.DeflatedExplicitVRLittleEndian}
_HEADER = TypeAdapter(Header)


def image_headers(
    sources: Iterable[tuple[str, Path | bytes]], pool: Pool
) -> Iterator[tuple[str, list[Header] | Refusal]]:
    """:func:`mp3d.data.dicom.frames.image_headers` of one named file after the other, in workers.

    Yields:
        The name, and what is returned or raised there or by :meth:`~mp3d.data.decode.Pool.call`.
    """
    left, asked = iter(sources), deque[list[tuple[str, Path | bytes]]]()

    def batches() -> Iterator[list[Request]]:
        while some := list(islice(left, REQUESTS_AHEAD)):
            asked.append(some)
            yield [Request("image_headers", source, {}, "the file") for _, source in some]

    for answers in pool.map_each(batches()):
        for (name, source), answer in zip(asked.popleft(), answers, strict=True):
            if isinstance(answer, Refusal):
                yield name, answer
            else:
                read_s = answer.took_s if len(answer.value) == 1 else 0.0
                yield name, [as_header(header | {"read_s": read_s}, source, name) for header in answer.value]


def read_slices(
    headers: Sequence[Header], pool: Pool, out: Int16[np.ndarray, "d h w"] | None = None
) -> Iterator[Int16[np.ndarray, "h w"]]:
    """:func:`mp3d.data.dicom.pixels.read_hu` of one slice after the other, in workers where they are compressed.

    Args:
        out: C-contiguous, as many slices as there are headers; where they are put, and those yielded are its own.

    Raises:
        Refusal: as there and :meth:`~mp3d.data.decode.Pool.call`.
    """
    planes = repeat(None) if out is None else out
    if all(header.transfer_syntax in IN_PLACE for header in headers):
        for header, plane in zip(headers, planes, strict=False):
            yield pixels.read_hu(header, plane)
    else:
        answers = pool.map(map(_slice_request, headers, planes))
        for header, answer in zip(headers, answers, strict=True):
            hu = answer.array
            if hu.dtype != np.int16 or hu.shape != (header.rows, header.columns):
                raise Refusal("DECODE_FAILED", f"the decoder of {header.label} gave no such image; export it again")
            yield hu


def _slice_request(header: Header, out: Int16[np.ndarray, "h w"] | None) -> Request:
    source = header.source
    pixels.check_pixel_format(header)
    if isinstance(source, bytes) and header.pixels and header.transfer_syntax != uid.DeflatedExplicitVRLittleEndian:
        start, length = header.pixels  # of a file with a thousand frames only this one is sent
        source = source[start : None if length is None else start + length]
        header = replace(header, pixels=Pixels(0, length))
    return Request("read_hu", source, {"header": as_plain(header)}, header.label, spent_s=header.read_s, out=out)


def as_plain(header: Header) -> dict[str, Any]:
    """A header as JSON has it, without name and source."""
    return {name: value for name, value in vars(header).items() if name not in ("name", "source")}


def as_header(plain: dict[str, Any], source: Path | bytes, name: str = "") -> Header:
    """The way back; raises ValueError for what is no header."""
    return _HEADER.validate_python(plain | {"name": name, "source": source})


def _image_headers(source: Path | bytes) -> tuple[list[dict[str, Any]], None]:
    return [as_plain(header) for header in frames.image_headers(source, "")], None


def _read_hu(source: Path | bytes, header: dict[str, Any]) -> tuple[None, Int16[np.ndarray, "h w"]]:
    return None, pixels.read_hu(as_header(header, source))


TASKS: dict[str, Task] = {"image_headers": _image_headers, "read_hu": _read_hu}
"""Run by the workers."""
