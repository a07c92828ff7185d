"""A deflated data set (DICOM PS3.5 A.5) as a file that is inflated as far as it is read, under a limit."""

import zlib
from io import SEEK_CUR, SEEK_END, BufferedReader, RawIOBase
from typing import Any, BinaryIO

from mp3d.errors import Refusal

MAX_INFLATED_BYTES = 128 * 2**20
"""A deflated file may grow to this; one megabyte on disk can hold a gigabyte of zeros."""
STEP_BYTES = 16 * 2**10
"""Most headers are shorter."""


def inflating(file: BinaryIO) -> BufferedReader:
    """The deflated rest of an open file, to be read and sought like a file.

    Raises:
        Refusal: on reading: ``BAD_HEADER`` or ``TOO_LARGE``.
    """
    return BufferedReader(_Inflating(file))


class _Inflating(RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._deflated = self._left = file.read(MAX_INFLATED_BYTES)
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._inflated: bytes | bytearray = bytearray()
        self._complete = False
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        self._inflate(self._at + len(view))
        part = memoryview(self._inflated)[self._at : self._at + len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """To seek from the end inflates all."""
        if whence == SEEK_END:
            self._inflate(MAX_INFLATED_BYTES)
            offset += len(self._inflated)
        elif whence == SEEK_CUR:
            offset += self._at
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._file.close()
        super().close()

    def _inflate(self, end: int) -> None:
        """As far as ``end``, or to the end of what there is."""
        end = min(end, MAX_INFLATED_BYTES)
        if end - len(self._inflated) > STEP_BYTES and end < MAX_INFLATED_BYTES and not self._complete:
            self._inflate_at_once(end)
        while end > len(self._inflated) and not self._complete:
            try:
                inflated = self._inflater.decompress(self._left, max(end - len(self._inflated), STEP_BYTES))
            except zlib.error as error:
                raise Refusal("BAD_HEADER", "the deflated data set is damaged; copy or export it again") from error
            self._left = self._inflater.unconsumed_tail
            self._inflated += inflated
            self._complete = self._inflater.eof or not inflated
        if len(self._inflated) >= MAX_INFLATED_BYTES:
            raise Refusal("TOO_LARGE", f"the deflated data set inflates to more than {MAX_INFLATED_BYTES >> 20} MiB")

    def _inflate_at_once(self, end: int) -> None:
        """By libdeflate, twice as fast as zlib, which knows what to do with streams that are broken or longer."""
        from imagecodecs import DeflateError, deflate_decode

        try:
            self._inflated = bytes(deflate_decode(self._deflated, raw=True, out=end + STEP_BYTES))
        except DeflateError:
            return
        self._complete = True
