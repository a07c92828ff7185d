"""What a file says of itself beside its geometry: padding, how it was made, of whom, whether with loss."""

from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, Sequence, uid

from mp3d.data import decode
from mp3d.data.decode import Limits, Pool, Request
from mp3d.data.dicom import group_series, load_volume
from mp3d.data.dicom.frames import frame_headers
from mp3d.data.dicom.header import read_header
from mp3d.data.series import AIR_HU
from mp3d.errors import Refusal
from tests.dicom_files import ct_slices, enhanced, made_volume, to_bytes


def files(slices: list[Dataset], syntax: uid.UID = uid.ExplicitVRLittleEndian) -> dict[str, bytes]:
    return {f"{number}.dcm": to_bytes(ds, syntax) for number, ds in enumerate(slices)}


def with_element(keyword: str, value: Any) -> list[Dataset]:
    slices = ct_slices(made_volume())
    for ds in slices:
        setattr(ds, keyword, value)
    return slices


@pytest.mark.parametrize(("padding", "signed"), [(63536, 0), (-3024, 1)])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_padding_in_more_bits_than_are_stored_is_air(padding: int, signed: int, syntax: uid.UID) -> None:
    slices = with_element("PixelRepresentation", signed)
    for ds in slices:
        stored = np.full((5, 7), 1000, np.int16 if signed else np.uint16)
        stored[0] = padding
        ds.PixelData = stored.tobytes()
        ds.add_new("PixelPaddingValue", "SS" if signed else "US", padding)
    of_16, of_12 = (b"(\0\1\1US\2\0%c\0(\0\2\1US\2\0%c\0" % (bits, bits - 1) for bits in (16, 12))
    content = {name: file.replace(of_16, of_12) for name, file in files(slices, syntax).items()}
    (series,) = group_series(content).series
    assert series.slices[0].bits_stored == 12
    volume, _, warnings = load_volume(series)
    assert (volume.hu[:, 0] == AIR_HU).all()
    assert (volume.hu[:, 1:] == 1000 - 1024).all()
    assert warnings == ("PADDING_TO_AIR",)


def test_a_modality_lut_beside_slope_and_intercept_is_refused() -> None:
    lut = Dataset()
    lut.ModalityLUTType = "HU"
    (series,) = group_series(files(with_element("ModalityLUTSequence", Sequence([lut])))).series
    with pytest.raises(Refusal, match="Modality LUT") as refused:
        load_volume(series)
    assert refused.value.reason == "BAD_RESCALE"


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("KVP", ("80", "140")),
        ("ContrastBolusAgent", ("", "iodine")),
        ("NominalPercentageOfCardiacPhase", (40.0, 75.0)),
        ("TriggerTime", ("120", "610")),
        ("AcquisitionDateTime", ("20260101120000", "20260101120130")),
    ],
)
def test_acquisitions_that_alternate_are_told_apart(keyword: str, values: tuple[Any, Any]) -> None:
    slices = ct_slices(made_volume(shape=(12, 5, 7)))
    for z, ds in enumerate(slices):
        setattr(ds, keyword, values[z % 2])
    both = group_series(files(slices)).series
    assert [len(series.slices) for series in both] == [6, 6]
    assert all("SPLIT_BY_ACQUISITION" in series.warnings for series in both)


@pytest.mark.parametrize("word", ["EFF_ATOMIC_NUM", "MAT_FRACTIONAL", "MAT_SPECIFIC", "SEGMENTATION", "SCREEN SHOT"])
def test_maps_of_something_else_are_no_slices(word: str) -> None:
    listing = group_series(files(with_element("ImageType", ["DERIVED", "SECONDARY", "AXIAL", word])))
    assert [refused.reason for _, refused in listing.refused] == ["PROJECTION_ONLY"]


@pytest.mark.parametrize(
    ("properties", "technique", "is_read"),
    [
        ("VOLUME", "NONE", True),
        ("VOLUME", "MPR", True),
        ("DISTORTED", "CURVED_MPR", False),
        ("VOLUME", "MAX_IP", False),
    ],
)
def test_enhanced_ct_says_how_it_was_made(properties: str, technique: str, is_read: bool) -> None:
    ds = enhanced(ct_slices(made_volume()))
    (shared,) = ds.SharedFunctionalGroupsSequence
    frame_type = Dataset()
    frame_type.FrameType = ["DERIVED", "PRIMARY", "AXIAL", "RESAMPLED"]
    frame_type.VolumetricProperties, frame_type.VolumeBasedCalculationTechnique = properties, technique
    shared.CTImageFrameTypeSequence = Sequence([frame_type])
    listing = group_series({"a": to_bytes(ds)})
    assert bool(listing.series) == is_read
    assert [refused.reason for _, refused in listing.refused] == ([] if is_read else ["PROJECTION_ONLY"])


def test_a_few_kilobytes_claim_no_gigabyte() -> None:
    ds = enhanced(ct_slices(made_volume(shape=(2, 33, 37))))
    header = read_header(to_bytes(ds))
    ds.Rows = ds.Columns = 4096
    ds.NumberOfFrames = 20
    claimed = read_header(to_bytes(ds))
    assert len(frame_headers(header)) == 2
    with pytest.raises(Refusal, match="times its own size") as refused:
        frame_headers(claimed)
    assert refused.value.reason == "TOO_LARGE"


def test_folders_without_any_id_are_not_one_patient() -> None:
    named: dict[str, bytes] = {}
    for folder, origin in (("a", (0, 0, 0)), ("b", (0, 0, 15))):
        slices = ct_slices(made_volume(origin=origin))
        for number, ds in enumerate(slices):
            ds.PatientID = ds.StudyInstanceUID = ds.FrameOfReferenceUID = ""
            named[f"{folder}/{number}.dcm"] = to_bytes(ds)
    assert [len(series.slices) for series in group_series(named).series] == [6, 6]


@pytest.mark.parametrize("how", ["element", "syntax"])
def test_compression_with_loss_is_told(how: str) -> None:
    slices = with_element("LossyImageCompression", "01") if how == "element" else ct_slices(made_volume((4, 33, 37)))
    syntax = uid.ExplicitVRLittleEndian if how == "element" else uid.JPEG2000Lossless
    content = files(slices, syntax)
    if how == "syntax":  # the same code streams, under the syntax that need not be without loss
        old, new = (value.encode().ljust(22, b"\0") for value in (uid.JPEG2000Lossless, uid.JPEG2000))
        content = {name: file.replace(old, new) for name, file in content.items()}
    (series,) = group_series(content).series
    assert load_volume(series)[2] == ("LOSSY_COMPRESSED",)


def test_a_series_beside_a_broken_file_is_told_of_it() -> None:
    content = files(ct_slices(made_volume()))
    content["0.dcm"] = content["0.dcm"].replace(b"0.8\\0.6 ", b"0.8\\x.6 ")
    listing = group_series(content)
    assert [refused.reason for _, refused in listing.refused] == ["BAD_HEADER"]
    (series,) = listing.series
    assert (len(series.slices), series.warnings) == (5, ("BROKEN_FILE_DROPPED",))


def test_a_stack_that_goes_on_with_contrast_is_told() -> None:
    slices = ct_slices(made_volume(shape=(12, 5, 7)))
    for ds in slices[6:]:
        ds.ContrastBolusAgent = "iodine"
    (series,) = group_series(files(slices)).series
    assert "MIXED_RECONSTRUCTION" in series.warnings


def test_more_scouts_than_axial_slices_are_not_the_stack() -> None:
    slices = ct_slices(made_volume(shape=(4, 5, 7)))
    for ds in ct_slices(made_volume(shape=(5, 5, 7), orientation=(0, 1, 0, 0, 0, -1))):
        ds.SOPInstanceUID += ".9"
        slices.append(ds)
    (series,) = group_series(files(slices)).series
    with pytest.raises(Refusal) as refused:
        load_volume(series)
    assert refused.value.reason == "MIXED_ORIENTATION"


def test_a_worker_that_the_system_ends_while_it_starts_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []

    class Unlucky(decode._Worker):
        def __init__(self, module: str, limits: Limits) -> None:
            starts.append(1)
            super().__init__("tests.no_such_module" if len(starts) < 3 else module, limits)

    monkeypatch.setattr(decode, "_Worker", Unlucky)
    with Pool(module="tests.faulty_worker") as pool:
        assert pool.call(Request("echo", b"a", {}, "instance 7")).array.tobytes() == b"a"
    assert len(starts) == 3
