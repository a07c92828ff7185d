"""What a series must not be: several patients, clipped in silence, absurd, larger than it looks, changed while read."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, uid

from mp3d.config import GeometryPolicy
from mp3d.data.dicom import group_series, load_volume, pixels
from mp3d.data.dicom.frames import MAX_FILE_BYTES
from mp3d.errors import Refusal
from tests.dicom_files import ct_slices, enhanced, made_volume, to_bytes


def files(slices: list[Dataset], syntax: uid.UID = uid.ExplicitVRLittleEndian) -> dict[str, bytes]:
    return {f"{number}.dcm": to_bytes(ds, syntax) for number, ds in enumerate(slices)}


def refusal(content: dict[str, bytes] | Path) -> Refusal:
    listing = group_series(content)
    if listing.refused:
        return listing.refused[0][1]
    with pytest.raises(Refusal) as refused:
        load_volume(*listing.series)
    return refused.value


def last(**elements: Any) -> list[Dataset]:
    slices = ct_slices(made_volume())
    for keyword, value in elements.items():
        setattr(slices[-1], keyword, value)
    return slices


@pytest.mark.parametrize("keyword", ["PatientID", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_two_under_one_series_uid(keyword: str) -> None:
    refused = refusal(files(last(**{keyword: "1.2.3"})))
    assert refused.reason == "MIXED_SERIES"
    assert "1.2.3" not in refused.detail


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("PixelSpacing", ["0.80005", "0.6"], "MIXED_SPACING"),
        ("ImageOrientationPatient", ["1", "0", "0.0001", "0", "1", "0"], "MIXED_ORIENTATION"),
        ("RescaleSlope", ["1", "2"], "BAD_HEADER"),
    ],
)
def test_a_slice_that_would_lie_elsewhere(keyword: str, value: list[str], reason: str) -> None:
    assert refusal(files(last(**{keyword: value}))).reason == reason


def test_more_and_fewer_decimals_are_alike() -> None:
    slices = ct_slices(made_volume())
    for ds in slices:
        ds.PixelSpacing = ["0.703125", "0.703125"]
    slices[-1].PixelSpacing = ["0.7031", "0.7031"]
    slices[-1].ImageOrientationPatient = ["1", "0.00002", "0", "0", "1", "0"]
    (series,) = group_series(files(slices)).series
    volume, _, _ = load_volume(series)
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :2], axis=0), 0.703125, rtol=5e-5)


@pytest.mark.parametrize("num_sheets", [1, 4])
def test_a_dose_sheet_whose_image_type_does_not_say_so(num_sheets: int) -> None:
    slices = ct_slices(made_volume())
    sheets = ct_slices(made_volume(shape=(num_sheets, 5, 7), seed=1))
    for ds in sheets:
        ds.SOPInstanceUID += ".9"
        del ds.ImagePositionPatient, ds.ImageOrientationPatient
    if num_sheets > 3:
        assert refusal(files(slices + sheets)).reason == "MISSING_GEOMETRY"
    else:
        (series,) = group_series(files(slices + sheets)).series
        volume, _, warnings = load_volume(series)
        assert (len(volume.hu), warnings) == (6, ("PROJECTION_DROPPED",))


@pytest.mark.parametrize("keyword", ["AcquisitionNumber", "ConvolutionKernel", "TemporalPositionIdentifier"])
def test_nothing_is_interpolated_between_phases_of_which_one_lacks_a_slice(keyword: str) -> None:
    slices = ct_slices(made_volume(shape=(16, 5, 7)))
    for z, ds in enumerate(slices):
        setattr(ds, keyword, "12"[z % 2])
    del slices[7]
    policy = GeometryPolicy(uneven="resample")
    (series,) = group_series(files(slices), policy).series
    with pytest.raises(Refusal, match="between acquisitions") as refused:
        load_volume(series, policy)
    assert refused.value.reason == "UNEVEN_SPACING"


@pytest.mark.parametrize("spacing", ["1e-300", "0.001"])
def test_pixels_too_small_for_any_scanner(spacing: str) -> None:
    slices = ct_slices(made_volume())
    for ds in slices:
        ds.PixelSpacing = [spacing, spacing]
    assert refusal(files(slices)).reason == "BAD_SPACING"


@pytest.mark.parametrize(("stored", "warned"), [(40000, True), (32766, False)])
def test_clipping_is_told(stored: int, warned: bool) -> None:
    slices = ct_slices(made_volume())
    for ds in slices:
        ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept = 0, "1", "0"
        ds.PixelData = np.full((5, 7), stored, np.uint16).tobytes()
    _, _, warnings = load_volume(*group_series(files(slices)).series)
    assert ("HU_CLIPPED" in warnings) == warned


def test_values_that_cannot_be_clipped_are_not_looked_at() -> None:
    _, _, warnings = load_volume(*group_series(files(ct_slices(made_volume()))).series)
    assert warnings == ()


def test_several_kernels_in_one_stack_are_told() -> None:
    slices = ct_slices(made_volume())
    for number, ds in enumerate(slices):
        ds.ConvolutionKernel = ("B30f", "B60f")[number // 3]
    (series,) = group_series(files(slices)).series
    assert "MIXED_RECONSTRUCTION" in series.warnings


@pytest.mark.parametrize("image_type", ["SCOUT", "SCREEN_SAVE", "MATERIAL_IODINE", "CBF"])
def test_other_images_are_no_slices(image_type: str) -> None:
    slices = ct_slices(made_volume())
    for ds in slices:
        ds.ImageType = ["DERIVED", "PRIMARY", image_type]
    assert refusal(files(slices)).reason in ("LOCALIZER_ONLY", "PROJECTION_ONLY")


def test_a_small_file_that_claims_a_large_volume() -> None:
    ds = enhanced(ct_slices(made_volume()))
    ds.NumberOfFrames, ds.Rows, ds.Columns = 4000, 1000, 1000
    assert MAX_FILE_BYTES < 4000 * 1000 * 1000 * 2
    assert refusal({"one": to_bytes(ds)}).reason == "TOO_LARGE"


def test_the_volume_keeps_to_the_limit_of_its_caller() -> None:
    (series,) = group_series(files(ct_slices(made_volume()))).series
    num_bytes = made_volume().hu.nbytes
    load_volume(series, max_bytes=num_bytes)
    with pytest.raises(Refusal, match="TOO_LARGE"):
        load_volume(series, max_bytes=num_bytes - 1)


@pytest.mark.parametrize("change", [lambda data: data[:300] + b"  " + data[300:], lambda data: data[:-2]])
def test_a_file_that_changes_between_listing_and_reading(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    for name, content in files(ct_slices(made_volume())).items():
        (tmp_path / name).write_bytes(content)
    (series,) = group_series(tmp_path).series
    (tmp_path / "3.dcm").write_bytes(change((tmp_path / "3.dcm").read_bytes()))
    with pytest.raises(Refusal, match="UNREADABLE"):
        load_volume(series)


@pytest.mark.parametrize(
    ("said", "warned"),
    [
        ({"SliceThickness": "1.25"}, True),
        ({"SliceThickness": "2.5"}, False),
        ({"SliceThickness": "5"}, False),
        ({"SliceThickness": "1.25", "SpacingBetweenSlices": "2.5"}, False),
        ({"SliceThickness": "2.5", "SpacingBetweenSlices": "-1.25"}, True),
        ({"SliceThickness": "0"}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("multiframe", [False, True])
def test_gaps_that_the_positions_alone_cannot_show_are_told(
    said: dict[str, str], warned: bool, multiframe: bool
) -> None:
    """Every second slice of an even stack is an even stack."""
    slices = ct_slices(made_volume(shape=(6, 5, 7), spacing_mm=(2.5, 0.8, 0.6)))
    image = enhanced(slices)
    measures = image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    for ds in [measures] if multiframe else slices:
        del ds.SliceThickness
        for keyword, value in said.items():
            setattr(ds, keyword, value)
    content = {"one": to_bytes(image)} if multiframe else files(slices)
    _, _, warnings = load_volume(*group_series(content).series)
    assert ("SLICE_GAPS" in warnings) == warned


def test_a_slice_spacing_that_is_no_number_is_no_reason_to_refuse() -> None:
    slices = files(ct_slices(made_volume()))
    element = b"\x18\x00\x88\x00DS\x04\x00wide"
    broken = {name: _before(file, b"\x20\x00\x0d\x00", element) for name, file in slices.items()}
    _, _, warnings = load_volume(*group_series(broken).series)
    assert warnings == ()


def _before(file: bytes, tag: bytes, element: bytes) -> bytes:
    at = file.index(tag + b"UI", 132)
    return file[:at] + element + file[at:]


def test_a_disk_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (series,) = group_series(files(ct_slices(made_volume()))).series

    class Failing(BytesIO):
        def readinto(self, *_: Any) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(pixels, "open_source", lambda _: Failing())
    with pytest.raises(Refusal, match="UNREADABLE.*instance"):
        load_volume(series)
