"""What a header may cost: elements, depth and bytes are bounded, and what is not wanted is not read."""

import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, uid
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from mp3d.data.dicom import read_header, read_hu
from mp3d.data.dicom.elements import MAX_FILE_BYTES, open_body, read_elements
from mp3d.data.dicom.frames import image_headers
from mp3d.data.dicom.header import KEYWORDS
from mp3d.data.dicom.walk import MAX_DEPTH, MAX_ELEMENTS, MAX_HEADER_BYTES
from mp3d.data.rtstruct import read_structure_set
from mp3d.errors import Refusal
from tests.dicom_files import ct_slices, enhanced, made_volume, structure_set, to_bytes

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
SMALL_BYTES = 4 * 2**20
"""Of memory, whatever a file claims."""
SEQUENCE = b"\x08\x00\x40\x11SQ\0\0"
"""Explicit (0008,1140), without its length."""
UNDEFINED = b"\xff\xff\xff\xff"
ITEM = b"\xfe\xff\x00\xe0"
ITEM_END, SEQUENCE_END = b"\xfe\xff\x0d\xe0" + bytes(4), b"\xfe\xff\xdd\xe0" + bytes(4)


@pytest.fixture
def small_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < SMALL_BYTES


def halves() -> tuple[bytes, bytes]:
    """An explicit CT file, cut before Modality (0008,0060)."""
    file = to_bytes(ct_slices(made_volume())[0])
    at = file.index(b"\x08\x00\x60\x00CS")
    return file[:at], file[at:]


def file_with(inserted: bytes) -> bytes:
    start, end = halves()
    return start + inserted + end


def nested(depth: int) -> bytes:
    return (SEQUENCE + UNDEFINED + ITEM + UNDEFINED) * depth + (ITEM_END + SEQUENCE_END) * depth


def sparse(path: Path, start: bytes, hole: int, end: bytes) -> Path:
    """A file with a hole of zeros in it, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.seek(hole, 1)
        file.write(end)
    return path


def refusal(source: Path | bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_header(source)
    return caught.value


@pytest.mark.filterwarnings("ignore:Expected explicit VR:UserWarning")
def test_the_elements_are_those_of_pydicom() -> None:
    """Whatever the syntax, nesting and mistakes of its own test files."""
    compared = 0
    for path in sorted(set(FILES.rglob("*.dcm")) - {FILES / "no_meta.dcm"}):  # which is refused: no prefix, no group 8
        body = open_body(path)
        with body.file:
            elements, pixels, cut = read_elements(body, KEYWORDS)
        ds = pydicom.dcmread(path, force=True)
        for keyword in KEYWORDS:
            theirs = ds.get_item(Tag(keyword)) if keyword in ds else None
            ours = elements.get(Tag(keyword))
            assert (ours is None) == (theirs is None)
            if isinstance(theirs, RawDataElement):  # else an empty one, which pydicom has looked into
                assert (theirs.value or b"") == ours
                compared += 1
        assert (pixels is not None) == ("PixelData" in ds)
        assert cut == ("truncated" in path.name)
    assert compared > 1000


def test_depth() -> None:
    read_header(file_with(nested(MAX_DEPTH)))
    refused = refusal(file_with(nested(MAX_DEPTH + 1)))
    assert (refused.reason, f"{MAX_DEPTH} deep" in refused.detail) == ("BAD_HEADER", True)


def test_number_of_elements(tmp_path: Path) -> None:
    start, _ = halves()
    with (tmp_path / "file.dcm").open("wb") as file:
        file.write(start + SEQUENCE + UNDEFINED)
        for _ in range(MAX_ELEMENTS // 1000 + 1):
            file.write((ITEM + bytes(4)) * 1000)
    refused = refusal(tmp_path / "file.dcm")
    assert (refused.reason, f"{MAX_ELEMENTS} elements" in refused.detail) == ("TOO_LARGE", True)


@pytest.mark.usefixtures("small_memory")
def test_what_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    """Large values of all kinds, in the meta information too."""
    hole = MAX_HEADER_BYTES // 4
    length = struct.pack("<L", hole)
    start, end = halves()
    meta_end = 144 + int.from_bytes(start[140:144], "little")
    private = b"\x09\x00\x01\x10OB\0\0"
    for before, behind in (
        (start + private + length, end),
        (start + private + UNDEFINED + ITEM + length, SEQUENCE_END + end),
        (start + SEQUENCE + length, end),
        (start[:meta_end] + b"\x02\x00\x02\x01OB\0\0" + length, start[meta_end:] + end),
    ):
        header = read_header(sparse(tmp_path / "file.dcm", before, hole, behind))
        assert (header.modality, header.cut) == ("CT", False)
        assert read_hu(header).shape == (5, 7)


@pytest.mark.usefixtures("small_memory")
def test_more_than_any_header_has(tmp_path: Path) -> None:
    start, end = halves()
    length = struct.pack("<L", MAX_HEADER_BYTES)
    refused = refusal(sparse(tmp_path / "file.dcm", start + SEQUENCE + length, MAX_HEADER_BYTES, end))
    assert (refused.reason, "256 MiB before the pixels" in refused.detail) == ("TOO_LARGE", True)
    refused = refusal(sparse(tmp_path / "file.dcm", start, MAX_FILE_BYTES, end))
    assert (refused.reason, str(MAX_FILE_BYTES) in refused.detail) == ("TOO_LARGE", True)


@pytest.mark.usefixtures("small_memory")
def test_compressed_pixels_without_end(tmp_path: Path) -> None:
    file = to_bytes(ct_slices(made_volume())[0], uid.RLELossless)
    at = file.rindex(ITEM)
    claim = file[: at + 4] + struct.pack("<L", MAX_HEADER_BYTES)
    header = read_header(sparse(tmp_path / "file.dcm", claim, MAX_HEADER_BYTES, SEQUENCE_END))
    with pytest.raises(Refusal, match="DECODE_FAILED.* 2 times the room"):
        read_hu(header)


def test_values_longer_than_their_kind() -> None:
    modality = b"\x08\x00\x60\x00CS"
    start, end = halves()
    assert end.startswith(modality + b"\x02\x00CT")
    refused = refusal(start + modality + struct.pack("<H", 5000) + b"C" * 5000 + end[10:])
    assert (refused.reason, "Modality (0008,0060)" in refused.detail) == ("BAD_HEADER", True)


def test_something_else_in_a_sequence() -> None:
    refused = refusal(file_with(SEQUENCE + UNDEFINED + b"\x10\x00\x10\x00" + bytes(4)))
    assert (refused.reason, "(0010,0010) is no item" in refused.detail) == ("BAD_HEADER", True)


def deep_sequences() -> list[Dataset]:
    """Of defined length, more than may be walked through."""
    inner = Dataset()
    for _ in range(MAX_DEPTH + 1):
        outer = Dataset()
        outer.ReferencedImageSequence = [inner]
        inner = outer
    return [inner]


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_what_pydicom_parses_is_bounded_before(syntax: uid.UID) -> None:
    """Structure sets, in sequences of defined length too; of functional groups only what is wanted is looked at."""
    structures = structure_set([[np.zeros((3, 3))]], ["GTV"])
    assert read_structure_set(read_header(to_bytes(structures, syntax))).regions
    structures.ReferencedImageSequence = deep_sequences()
    with pytest.raises(Refusal, match=rf"BAD_STRUCTURE_SET.* {MAX_DEPTH} deep"):
        read_structure_set(read_header(to_bytes(structures, syntax)))
    frames = enhanced(ct_slices(made_volume()))
    places = [header.image_position_patient for header in image_headers(to_bytes(frames, syntax), "")]
    assert len(set(places)) == 6
    frames.ReferencedImageSequence = deep_sequences()
    frames.PerFrameFunctionalGroupsSequence[2].ReferencedImageSequence = deep_sequences()
    assert [header.image_position_patient for header in image_headers(to_bytes(frames, syntax), "")] == places
