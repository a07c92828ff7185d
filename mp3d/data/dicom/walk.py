"""From element to element through a DICOM data set (DICOM PS3.5 7), under limits; what is passed over is not read."""

from collections.abc import Iterator
from struct import Struct
from typing import BinaryIO, NamedTuple

from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

from mp3d.errors import Refusal

MAX_ELEMENTS = 1_000_000
"""An Enhanced CT of thousands of frames has some hundred thousand, all others far fewer."""
MAX_DEPTH = 32
"""Of sequences within sequences; CT needs four, a structured report some ten."""
MAX_HEADER_BYTES = 256 * 2**20
"""Before the pixels, or of a file without pixels."""
WINDOW_BYTES = 16 * 2**10
"""Read at once; most headers are shorter."""

UNDEFINED_LENGTH = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
LONG_VRS = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_32)
KNOWN_VRS = frozenset(vr.encode() for vr in VR)


class Element(NamedTuple):
    """What stands before a value."""

    tag: int
    vr: bytes
    """Empty where it is implicit."""
    length: int


class Walker:
    """Goes through the elements of an open file, from where it stands.

    Sequences of defined length are jumped over; ``deep`` goes into all that pydicom could.

    Attributes:
        at: the place reached: behind :meth:`next`, the beginning of the element's value.
    """

    def __init__(self, file: BinaryIO, implicit_vr: bool, little_endian: bool, deep: bool = False) -> None:
        order = "<" if little_endian else ">"
        self.at = self._window_at = file.tell()
        self._file = file
        self._window = b""
        self._implicit_vr = implicit_vr
        self._deep = deep
        self._num_elements = 0
        self._explicit = Struct(f"{order}HH2sH").unpack_from
        self._implicit = Struct(f"{order}HHL").unpack_from
        self._long = Struct(f"{order}L").unpack_from

    def next(self) -> Element | None:
        """The next element, or ``None`` at the end of the file.

        Raises:
            Refusal: ``TOO_LARGE``.
            EOFError: the file ends inside its tag or length.
        """
        offset, room = self._look()
        if room < 8:
            return None
        if not self._implicit_vr:
            group, number, vr, length = self._explicit(self._window, offset)
            if vr in LONG_VRS:
                if room < 12:
                    raise EOFError
                self.at += 12
                return Element(group << 16 | number, vr, self._long(self._window, offset + 8)[0])
            # Some writers mix implicit elements in; an explicit one shows its two capital letters.
            if vr in KNOWN_VRS or (vr.isalpha() and vr.isupper()):
                self.at += 8
                return Element(group << 16 | number, vr, length)
        group, number, length = self._implicit(self._window, offset)
        self.at += 8
        return Element(group << 16 | number, b"", length)

    def read(self, length: int, limit: int) -> bytes:
        """The value of the element just met, of which no more than ``limit`` bytes; goes behind it."""
        offset = self.at - self._window_at
        value = self._window[offset : offset + min(length, limit)]
        if len(value) < min(length, limit):
            self._file.seek(self.at)
            value = self._file.read(min(length, limit))
        self.at += length
        return value

    def skip(self, element: Element, depth: int = 0) -> None:
        """Go behind the value of the element just met.

        Raises:
            Refusal: ``BAD_HEADER`` or ``TOO_LARGE``.
            EOFError: the file ends inside a sequence.
        """
        if element.length == UNDEFINED_LENGTH or (self._deep and _is_sequence(element)):
            self._skip_sequence(element, depth + 1)
        else:
            self.at += element.length

    def items(self, element: Element) -> Iterator[int | None]:
        """The items of the sequence just met: where each ends, if it says so. Ends behind the sequence.

        Between two items :meth:`elements` is to be used up, or ``at`` set behind the item.

        Raises:
            Refusal: ``BAD_HEADER`` or ``TOO_LARGE``.
            EOFError: the file ends inside the sequence.
        """
        end = None if element.length == UNDEFINED_LENGTH else self.at + element.length
        while end is None or self.at < end:
            offset, room = self._look()
            if room < 8:
                raise EOFError
            group, number, length = self._implicit(self._window, offset)
            self.at += 8
            tag = group << 16 | number
            if tag == SEQUENCE_END:
                return
            if tag != ITEM:
                raise Refusal("BAD_HEADER", f"({group:04X},{number:04X}) is no item of a sequence; export it again")
            yield None if length == UNDEFINED_LENGTH else self.at + length

    def elements(self, end: int | None) -> Iterator[Element]:
        """The elements of the item just met; each is to be read or skipped before the next. Raises as :meth:`items`."""
        while end is None or self.at < end:
            element = self.next()
            if element is None:
                raise EOFError
            if element.tag == ITEM_END:
                return
            yield element

    def _skip_sequence(self, element: Element, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise Refusal("BAD_HEADER", f"sequences lie more than {MAX_DEPTH} deep in one another; export it again")
        for end in self.items(element):
            if end is None or (self._deep and element.vr in (b"", b"SQ", b"UN")):
                for inner in self.elements(end):
                    self.skip(inner, depth)
            else:
                self.at = end

    def _look(self) -> tuple[int, int]:
        """Where in the window the next element begins, and how many bytes it has from there on: 12 or what is left."""
        self._num_elements += 1
        if self._num_elements > MAX_ELEMENTS:
            raise Refusal("TOO_LARGE", f"the header has more than {MAX_ELEMENTS} elements; export the file again")
        offset = self.at - self._window_at
        room = len(self._window) - offset
        if room < 12:
            self._file.seek(self.at)
            self._window, self._window_at = self._file.read(WINDOW_BYTES), self.at
            offset, room = 0, len(self._window)
            if room and self.at > MAX_HEADER_BYTES:
                size = f"{MAX_HEADER_BYTES >> 20} MiB"
                raise Refusal("TOO_LARGE", f"the header has more than {size} before the pixels; export the file again")
        return offset, room


def _is_sequence(element: Element) -> bool:
    """Whether pydicom would take a value of defined length for a sequence."""
    if element.vr in (b"", b"UN"):
        return dictionary_has_tag(element.tag) and dictionary_VR(element.tag) == "SQ"
    return element.vr == b"SQ"
