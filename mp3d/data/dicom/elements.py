"""The bytes of one DICOM file to raw elements, under limits; nothing in the file is trusted.

Text is parsed here instead of by pydicom's value classes: they warn with the value and the file name, and both may
name a patient.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import NamedTuple

from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.filereader import data_element_generator, read_preamble
from pydicom.tag import Tag

from mp3d.errors import Refusal

MAX_INFLATED_BYTES = 128 * 2**20
"""A deflated file may grow to this; one megabyte on disk can hold a gigabyte of zeros."""
MAX_VALUE_BYTES = 4096
"""Of any element that is read here."""
MAX_FRAGMENTS = 4096
"""Of the compressed pixels of one slice; nearly always there is one."""

PIXEL_DATA = 0x7FE00010
UNDEFINED_LENGTH = 0xFFFFFFFF
ITEM = b"\xfe\xff\x00\xe0"
SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0"
"""Tags (FFFE,E000) and (FFFE,E0DD) as they stand before and behind the fragments of compressed pixels."""

Elements = dict[int, RawDataElement]
File = BufferedReader | BytesIO


@dataclass(frozen=True)
class Body:
    """An open file behind its meta information (group 0002), and how to read on. Deflated files are inflated."""

    file: File
    size: int
    transfer_syntax: str
    implicit_vr: bool
    little_endian: bool
    meta: Elements


class Pixels(NamedTuple):
    """Where the value of Pixel Data, or what of it is one frame, lies in the (inflated) file."""

    offset: int
    length: int | None
    """None: undefined, the pixels are compressed."""


def open_source(source: Path | bytes) -> File:
    """Open a file, or its bytes.

    Raises:
        Refusal: ``UNREADABLE``; also a pipe or device, which might never end.
    """
    if isinstance(source, bytes):
        return BytesIO(source)
    try:
        if not source.is_file():
            raise FileNotFoundError
        return source.open("rb")
    except OSError as error:
        raise Refusal("UNREADABLE", f"the file cannot be opened ({type(error).__name__})") from error


def open_body(source: Path | bytes) -> Body:
    """Open a DICOM file, with or without preamble. The caller closes ``Body.file``.

    Raises:
        Refusal: ``UNREADABLE``, ``NOT_DICOM``, ``BAD_HEADER`` or ``TOO_LARGE``.
    """
    file = open_source(source)
    try:
        return _open_body(file)
    except OSError as error:
        file.close()
        raise Refusal("UNREADABLE", f"the file cannot be read ({type(error).__name__})") from error
    except BaseException:
        file.close()
        raise


def _open_body(file: File) -> Body:
    size = file.seek(0, 2)
    file.seek(0)
    bare = read_preamble(file, force=True) is None
    meta = {} if bare else _read_meta(file)
    syntax = Values(meta).text("TransferSyntaxUID")
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        inflated = _inflate(file)
        file.close()
        file, size = BytesIO(inflated), len(inflated)
    start = file.read(6)
    file.seek(-len(start), 1)
    if bare and start[:2] not in (b"\x08\x00", b"\x00\x08"):  # a bare data set begins with group 0008
        raise Refusal("NOT_DICOM", "there is neither the DICM prefix nor a DICOM data set")
    # Some files do not keep to the syntax they declare; an explicit element shows its two capital letters.
    implicit_vr = not (start[4:].isalpha() and start[4:].isupper())
    little_endian = syntax != uid.ExplicitVRBigEndian and start[:2] != b"\x00\x08"
    if not syntax and little_endian:
        syntax = uid.ImplicitVRLittleEndian if implicit_vr else uid.ExplicitVRLittleEndian
    elif not syntax:
        syntax = uid.ExplicitVRBigEndian
    return Body(file, size, syntax, implicit_vr, little_endian, meta)


def _read_meta(file: File) -> Elements:
    """Group 0002, which is always explicit little endian; leaves the file at the first element behind it."""
    generator = data_element_generator(file, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
    try:
        return {int(element.tag): element for element in generator if isinstance(element, RawDataElement)}
    except Exception as error:  # pydicom raises whatever its parsing of broken bytes runs into
        raise Refusal("BAD_HEADER", f"the meta information cannot be parsed ({type(error).__name__})") from error


def _inflate(file: File) -> bytes:
    """The deflated rest of a file (DICOM PS3.5 A.5)."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(file.read(), MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise Refusal("BAD_HEADER", "the deflated data set is damaged; copy or export it again") from error
    if len(inflated) == MAX_INFLATED_BYTES:
        raise Refusal("TOO_LARGE", f"the deflated data set inflates to more than {MAX_INFLATED_BYTES >> 20} MiB")
    return inflated


def read_elements(body: Body, keywords: Iterable[str]) -> tuple[Elements, Pixels | None, bool]:
    """Read up to the pixels, or to the end where there are none.

    Returns:
        The wanted elements that are there; where the pixels lie; whether the file is cut off, before or inside them.

    Raises:
        Refusal: ``BAD_HEADER``.
    """
    try:
        return _read_elements(body, [Tag(keyword) for keyword in keywords])
    except Exception as error:  # pydicom raises whatever its parsing of broken bytes runs into
        detail = f"the header cannot be parsed ({type(error).__name__}); export the file again"
        raise Refusal("BAD_HEADER", detail) from error


def _read_elements(body: Body, tags: list) -> tuple[Elements, Pixels | None, bool]:
    pixels: Pixels | None = None
    end: int | None = None  # of the last element so far, where its length is defined

    def at_pixels(tag: int, _vr: str | None, length: int) -> bool:
        nonlocal pixels, end
        start = body.file.tell()
        end = body.size if length == UNDEFINED_LENGTH else start + length
        if tag == PIXEL_DATA:
            pixels = Pixels(start, None if length == UNDEFINED_LENGTH else length)
        return tag >= PIXEL_DATA

    generator = data_element_generator(body.file, body.implicit_vr, body.little_endian, at_pixels, specific_tags=tags)
    elements: Elements = {}
    try:
        for element in generator:
            if isinstance(element, RawDataElement):
                elements[int(element.tag)] = element
    except (EOFError, OSError):  # inside a sequence or value of undefined length
        return elements, None, True
    if pixels is None:
        return elements, None, end != body.size
    if pixels.length is None:
        return elements, pixels, not _reaches_delimiter(body.file, pixels.offset)
    return elements, pixels, pixels.offset + pixels.length > body.size


def _reaches_delimiter(file: File, offset: int) -> bool:
    """Whether compressed pixels end where they should; jumps from fragment to fragment."""
    file.seek(offset)
    for _ in range(MAX_FRAGMENTS):
        start = file.read(8)
        if start[:4] != ITEM:
            return start[:4] == SEQUENCE_DELIMITER
        file.seek(int.from_bytes(start[4:], "little"), 1)
    return False


class Values:
    """Elements by keyword, as text and numbers; one that does not parse is refused with its tag."""

    def __init__(self, elements: Elements, little_endian: bool = True) -> None:
        self._elements = elements
        self._little_endian = little_endian

    def text(self, keyword: str) -> str:
        """Any character string; several values stay joined by a backslash. Empty where it is absent."""
        return self._raw(keyword).decode("latin-1").strip(" \0")

    def numbers(self, keyword: str, count: int) -> tuple[float, ...]:
        """``count`` decimal strings; empty where the element is absent or empty."""
        text = self.text(keyword)
        if not text:
            return ()
        values = tuple(self._number(keyword, part) for part in text.split("\\"))
        if len(values) != count:
            raise self._bad(keyword)
        return values

    def number(self, keyword: str) -> float | None:
        """The first value of a decimal or integer string."""
        text = self.text(keyword).split("\\")[0].strip()
        return self._number(keyword, text) if text else None

    def integer(self, keyword: str) -> int | None:
        """An integer string; some writers put decimals there."""
        value = self.number(keyword)
        if value is None:
            return None
        if not value.is_integer():  # also NaN and infinity
            raise self._bad(keyword)
        return int(value)

    def unsigned(self, keyword: str) -> int | None:
        """An unsigned 16-bit integer (VR US)."""
        raw = self._raw(keyword)
        if not raw:
            return None
        if len(raw) != 2:
            raise self._bad(keyword)
        return int.from_bytes(raw, "little" if self._little_endian else "big")

    def _raw(self, keyword: str) -> bytes:
        element = self._elements.get(Tag(keyword))
        value = element.value if element else None
        if value is not None and len(value) > MAX_VALUE_BYTES:
            raise self._bad(keyword)
        return value or b""

    def _number(self, keyword: str, text: str) -> float:
        if "_" in text:  # Python takes 1_000 for a number
            raise self._bad(keyword)
        try:
            return float(text)
        except ValueError:
            raise self._bad(keyword) from None

    @staticmethod
    def _bad(keyword: str) -> Refusal:
        tag = Tag(keyword)
        detail = f"{keyword} ({tag.group:04X},{tag.element:04X}) cannot be parsed; export the file again"
        return Refusal("BAD_HEADER", detail)
