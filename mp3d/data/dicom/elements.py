"""The bytes of one DICOM file to raw elements, under limits; nothing in the file is trusted.

Elements are found and text is parsed here instead of by pydicom: it reads whole sequences and values into memory, and
its value classes warn with the value and the file name, which may name a patient.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from io import SEEK_END, BufferedReader, BytesIO
from pathlib import Path
from typing import NamedTuple

from pydicom import uid
from pydicom.tag import Tag

from mp3d.data.dicom.inflate import inflating
from mp3d.data.dicom.walk import UNDEFINED_LENGTH, Walker
from mp3d.errors import Refusal

MAX_FILE_BYTES = 4 * 2**30
"""An Enhanced CT of 4096 frames of 512 x 512 has half of it."""
MAX_VALUE_BYTES = 4096
"""Of any element that is read here."""
MAX_FRAGMENTS = 16384
"""Of compressed pixels; nearly always there is one per slice."""

PIXEL_DATA = 0x7FE00010
MODALITY_LUT = 0x00283000
"""Modality LUT Sequence: of it is only told that it is there."""
ITEM = b"\xfe\xff\x00\xe0"
SEQUENCE_DELIMITER = b"\xfe\xff\xdd\xe0"
"""Tags (FFFE,E000) and (FFFE,E0DD) as they stand before and behind the fragments of compressed pixels."""
META_KEYWORDS = ("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID")

Elements = dict[int, bytes]
"""Value by tag; of one that is too long, a little more than :data:`MAX_VALUE_BYTES`."""
File = BufferedReader | BytesIO


@dataclass(frozen=True)
class Body:
    """An open file behind its meta information (group 0002), and how to read on. Deflated files are inflated.

    Attributes:
        size: bytes of the file, deflated where it is.
    """

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
        raise _unreadable(error) from error
    except BaseException:
        file.close()
        raise


def _open_body(file: File) -> Body:
    size = file.seek(0, 2)
    if size > MAX_FILE_BYTES:
        raise Refusal("TOO_LARGE", f"the file has {size} bytes, at most {MAX_FILE_BYTES} are read")
    file.seek(128)
    bare = file.read(4) != b"DICM"
    if bare:
        file.seek(0)
    meta = {} if bare else _read_meta(file)
    syntax = Values(meta).text("TransferSyntaxUID")
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        file = inflating(file)
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
    walker, tags = Walker(file, implicit_vr=False, little_endian=True), {_tag(keyword) for keyword in META_KEYWORDS}
    meta: Elements = {}
    end = walker.at
    try:
        while (element := walker.next()) and element.tag >> 16 == 2:
            if element.tag in tags and element.length != UNDEFINED_LENGTH:
                meta[element.tag] = walker.read(element.length, MAX_VALUE_BYTES + 1)
            else:
                walker.skip(element)
            end = walker.at
    except EOFError:  # what is cut off shows in the data set, which is not there
        end = walker.at
    file.seek(end)
    return meta


def read_elements(body: Body, keywords: Iterable[str]) -> tuple[Elements, Pixels | None, bool]:
    """Read up to the pixels, or to the end where there are none.

    Returns:
        The wanted elements that are there; where the pixels lie; whether the file is cut off, before or inside them.
        The pixels of a deflated file are not inflated here, so that what is cut inside them shows when they are read.

    Raises:
        Refusal: ``UNREADABLE``, ``BAD_HEADER`` or ``TOO_LARGE``.
    """
    walker, tags = Walker(body.file, body.implicit_vr, body.little_endian), {_tag(keyword) for keyword in keywords}
    elements: Elements = {}
    end: int | None = None  # of the last element so far
    try:
        while element := walker.next():
            tag, _, length = element
            if tag == PIXEL_DATA and length == UNDEFINED_LENGTH:
                return elements, Pixels(walker.at, None), not _reaches_delimiter(body.file, walker.at)
            if tag == PIXEL_DATA:
                cut = walker.at + length > body.size and body.transfer_syntax != uid.DeflatedExplicitVRLittleEndian
                return elements, Pixels(walker.at, length), cut
            if tag > PIXEL_DATA:
                end = walker.at + length
                break
            if tag == MODALITY_LUT and element.length:
                elements[tag] = b"there"
                walker.skip(element)
            elif tag in tags and length != UNDEFINED_LENGTH:
                value = walker.read(length, MAX_VALUE_BYTES + 1)
                if elements.setdefault(tag, value) != value:
                    name = f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
                    raise Refusal("BAD_HEADER", f"{name} is there twice, with two values; export the file again")
            else:
                walker.skip(element)
            end = walker.at
    except EOFError:  # inside a sequence
        return elements, None, True
    except OSError as error:
        raise _unreadable(error) from error
    return elements, None, end != body.file.seek(0, SEEK_END)


def check_structure(body: Body) -> None:
    """Walk through all elements before the pixels, in sequences too, so that pydicom may read them into memory.

    Raises:
        Refusal: ``UNREADABLE``, ``BAD_HEADER`` or ``TOO_LARGE``.
    """
    walker, start = Walker(body.file, body.implicit_vr, body.little_endian, deep=True), body.file.tell()
    try:
        while (element := walker.next()) and element.tag < PIXEL_DATA:
            walker.skip(element)
    except EOFError:
        raise Refusal("BAD_HEADER", "the file ends inside a sequence; copy or export it again") from None
    except OSError as error:
        raise _unreadable(error) from error
    body.file.seek(start)


def _reaches_delimiter(file: File, offset: int) -> bool:
    """Whether compressed pixels end where they should; jumps from fragment to fragment."""
    file.seek(offset)
    for _ in range(MAX_FRAGMENTS):
        start = file.read(8)
        if start[:4] != ITEM:
            return start[:4] == SEQUENCE_DELIMITER
        file.seek(int.from_bytes(start[4:], "little"), 1)
    return False


@cache
def _tag(keyword: str) -> int:
    return int(Tag(keyword))  # a plain number compares many times faster


def _unreadable(error: OSError) -> Refusal:
    return Refusal("UNREADABLE", f"the file cannot be read ({type(error).__name__})")


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

    def single(self, keyword: str) -> float | None:
        """The only value of a decimal string; with several none can be chosen."""
        return next(iter(self.numbers(keyword, 1)), None)

    def integer(self, keyword: str) -> int | None:
        """An integer string; some writers put decimals there."""
        value = self.number(keyword)
        if value is None:
            return None
        if not value.is_integer():  # also NaN and infinity
            raise self._bad(keyword)
        return int(value)

    def unsigned(self, keyword: str, num_bytes: int = 2) -> int | None:
        """An unsigned integer of 16 bits (VR US) or another size."""
        raw = self._raw(keyword)
        if not raw:
            return None
        if len(raw) != num_bytes:
            raise self._bad(keyword)
        return int.from_bytes(raw, "little" if self._little_endian else "big")

    def _raw(self, keyword: str) -> bytes:
        value = self._elements.get(_tag(keyword), b"")
        if len(value) > MAX_VALUE_BYTES:
            raise self._bad(keyword)
        return value

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
