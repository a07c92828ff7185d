"""What scanners and archives write in many ways: Image Type, numbers that nothing depends on, private elements."""

import struct

import numpy as np
import pytest
from pydicom import Dataset, uid

from mp3d.data.dicom import group_series, load_volume
from tests.dicom_files import ct_slices, made_volume, to_bytes

TRUTH = made_volume()
NO_SLICES = (
    "CSA MIP", "CT_SOM5 MIP", "MIP THIN", "MAX IP", "TIMEMIP", "TMIP", "VOLREN", "VOLUME_RENDERED", "SUBTRACT",
    "CURVED MPR", "IODINE MAP", "DE_MATERIAL", "RHO_Z", "DET_DE_PBV", "CT_SOM5 PROT", "PATIENT PROTOCOL", "SCOUTVIEW",
    "CT_SOM5 SCOUT", "CT_SOM5 TOP", "LOCALIZER",
)  # fmt: skip
SLICES = (
    "AXIAL", "CT_SOM5 SPI", "CT_SOM5 SEQ", "CT_SOM5 CTA", "AVERAGE", "MPR", "MPR THICK", "REFORMATTED", "HELIX",
    "DYNAMIC", "PROSPECTIVE", "JP2K LOSSY 6:1", "ADD", "VOLUME",
)  # fmt: skip


def files(slices: list[Dataset]) -> dict[str, bytes]:
    return {f"{number}.dcm": to_bytes(ds) for number, ds in enumerate(slices)}


def changed(**elements: object) -> list[Dataset]:
    slices = ct_slices(TRUTH)
    for ds in slices:
        for keyword, value in elements.items():
            setattr(ds, keyword, value)
    return slices


def check_read(content: dict[str, bytes]) -> None:
    listing = group_series(content)
    assert listing.refused == []
    volume, _, _ = load_volume(*listing.series)
    assert np.array_equal(volume.hu, TRUTH.hu)


@pytest.mark.parametrize("place", [2, 3])
@pytest.mark.parametrize("value", NO_SLICES)
def test_what_is_no_slice_is_dropped_whatever_stands_beside_the_word(value: str, place: int):
    image_type = ["DERIVED", "SECONDARY", "AXIAL", "NONE"]
    image_type[place] = value
    listing = group_series(files(changed(ImageType=image_type)))
    assert listing.series == []
    assert [refusal.reason for _, refusal in listing.refused] in (["PROJECTION_ONLY"], ["LOCALIZER_ONLY"])


@pytest.mark.parametrize("value", SLICES)
def test_slices_stay(value: str):
    check_read(files(changed(ImageType=["DERIVED", "SECONDARY", value, value])))


@pytest.mark.parametrize("rescale_type", ["HU", "UNSPECIFIED", "Hounsfield", ["HU", "HU"]])
def test_hounsfield_units_by_other_names(rescale_type: object):
    check_read(files(changed(RescaleType=rescale_type)))


@pytest.mark.parametrize(("tag", "said"), [(b"\x20\x00\x13\x00", b"A1"), (b"\x18\x00\x20\x11", b"0,0 ")])
def test_numbers_that_nothing_depends_on_are_no_reason_to_refuse(tag: bytes, said: bytes):
    """Instance Number, and Gantry/Detector Tilt: the positions tell the tilt."""
    check_read({name: _with(file, tag, said) for name, file in files(ct_slices(TRUTH)).items()})


@pytest.mark.parametrize("length", [64, 66, 80, 90])
def test_private_sequences_of_unknown_vr_are_walked_through(length: int):
    """Undefined length makes their content implicit (PS3.5 6.2.2); a length of 66 looks like a B."""
    inner = struct.pack("<HHI", 0x0009, 0x1010, length) + bytes(length)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + inner + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    value = item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    private = struct.pack("<HH2sHI", 0x0009, 0x1001, b"UN", 0, 0xFFFFFFFF) + value
    content = {}
    for name, file in files(ct_slices(TRUTH)).items():
        at = file.index(b"\x10\x00\x10\x00PN") if b"\x10\x00\x10\x00PN" in file else file.index(b"\x10\x00\x20\x00LO")
        content[name] = file[:at] + private + file[at:]
    check_read(content)


def _with(file: bytes, tag: bytes, said: bytes) -> bytes:
    """The same with another value of an element of two letters' VR, put in where there was none."""
    element = tag + (b"IS" if tag[:2] == b"\x20\x00" else b"DS") + len(said).to_bytes(2, "little") + said
    at = file.find(tag + element[4:6], 132)
    if at < 0:
        at = file.index(b"\x20\x00\x0d\x00UI", 132)
        return file[:at] + element + file[at:]
    length = int.from_bytes(file[at + 6 : at + 8], "little")
    return file[:at] + element + file[at + 8 + length :]


def test_the_files_are_explicit():
    """What the bytes above are written for."""
    assert uid.ExplicitVRLittleEndian.encode() in next(iter(files(ct_slices(TRUTH)).values()))
