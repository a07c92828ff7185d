"""Enhanced and legacy-converted CT: frames are slices like any other."""

from collections.abc import Callable

import numpy as np
import pytest
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import encapsulate, generate_frames

from mp3d.config import GeometryPolicy
from mp3d.data.decode import Limits, Pool
from mp3d.data.dicom import StoredSlice, group_series, isolated, load_volume
from mp3d.data.dicom.frames import MAX_FRAMES
from mp3d.errors import Refusal
from mp3d.predict import Finding
from mp3d.serving.engine import finding_out
from tests.dicom_files import (
    FUNCTIONAL_GROUPS,
    SERIES_UID,
    ct_slices,
    dcmread_bytes,
    enhanced,
    made_volume,
    random_orientation,
    rewritten,
    set_stored,
    to_bytes,
)
from tests.test_dicom import SYNTAXES, check_equal

TRUTH = made_volume(shape=(5, 33, 37), orientation=random_orientation(np.random.default_rng(1)))


def load(*files: bytes, policy: GeometryPolicy | None = None):
    listing = group_series({f"canary{number}": file for number, file in enumerate(files)}, policy)
    assert listing.refused == []
    (series,) = listing.series
    return load_volume(series, policy)


def refused(file: bytes) -> Refusal:
    listing = group_series({"canary": file})
    if listing.refused:
        ((name, refusal),) = listing.refused
        assert name == "canary"
    else:
        with pytest.raises(Refusal) as caught:
            load_volume(listing.series[0])
        refusal = caught.value
    assert "canary" not in str(refusal).lower()
    return refusal


@pytest.mark.parametrize("own", [("PlanePositionSequence",), FUNCTIONAL_GROUPS], ids=["shared", "own"])
@pytest.mark.parametrize("syntax", [one for one in SYNTAXES if "Deflated" not in one.name], ids=lambda one: one.name)
def test_is_the_volume_of_its_frames(own: tuple[str, ...], syntax: uid.UID) -> None:
    slices = ct_slices(TRUTH)
    order = [3, 0, 4, 1, 2]
    volume, stored, warnings = load(to_bytes(enhanced([slices[z] for z in order], own), syntax))
    check_equal(volume, TRUTH)
    assert set(warnings) <= {"NOT_AXIAL"}
    assert stored == tuple(StoredSlice(f"{SERIES_UID}.0.2", 1 + order.index(z)) for z in range(5))


def test_each_frame_has_its_own_slope() -> None:
    truth = made_volume()
    slices = ct_slices(truth)
    exact = np.empty(truth.hu.shape)
    for z, ds in enumerate(slices):
        slope, intercept = (1.0, -1024.0) if z == 0 else (0.377, -1000.5 + z)
        stored = np.rint((truth.hu[z] - intercept) / slope)
        set_stored(ds, stored)
        ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
        exact[z] = slope * stored + intercept
    volume, _, _ = load(to_bytes(enhanced(slices, FUNCTIONAL_GROUPS)))
    assert np.abs(volume.hu - exact).max() <= 0.5 + 1e-3


def test_legacy_converted_with_unassigned_attributes() -> None:
    ds = enhanced(ct_slices(TRUTH))
    ds.SOPClassUID = uid.LegacyConvertedEnhancedCTImageStorage
    shared = ds.SharedFunctionalGroupsSequence[0]
    del shared.PixelValueTransformationSequence
    unassigned = Dataset()
    unassigned.RescaleSlope, unassigned.RescaleIntercept, unassigned.ConvolutionKernel = "1", "-1024", ["B30f", "2"]
    shared.UnassignedSharedConvertedAttributesSequence = [unassigned]
    check_equal(load(to_bytes(ds))[0], TRUTH)


def test_frames_of_several_fragments_are_found_by_the_offset_table() -> None:
    ds = dcmread_bytes(to_bytes(enhanced(ct_slices(TRUTH)), uid.JPEG2000Lossless))
    frames = list(generate_frames(ds.PixelData, number_of_frames=5))
    ds.PixelData = encapsulate(frames, fragments_per_frame=3, has_bot=True)
    check_equal(load(rewritten(ds))[0], TRUTH)
    ds.PixelData = encapsulate(frames, fragments_per_frame=3, has_bot=False)
    assert refused(rewritten(ds)).reason == "DECODE_FAILED"
    ds.PixelData = encapsulate(frames[:4], has_bot=False)
    assert refused(rewritten(ds)).reason == "DECODE_FAILED"


def test_an_image_that_lies_there_twice_is_used_once() -> None:
    file = to_bytes(enhanced(ct_slices(TRUTH)))
    volume, _, warnings = load(file, file)
    check_equal(volume, TRUTH)
    assert "DUPLICATE_DROPPED" in warnings


def test_phases_in_one_image_are_split() -> None:
    first, second = made_volume(seed=1), made_volume(seed=2)
    slices = ct_slices(first)
    for ds in ct_slices(second):
        ds.AcquisitionNumber = 2
        slices.append(ds)
    listing = group_series({"one": to_bytes(enhanced(slices, FUNCTIONAL_GROUPS))})
    assert len({series.key for series in listing.series}) == len({series.series for series in listing.series}) == 2
    for series, truth in zip(listing.series, (first, second), strict=True):
        assert series.warnings == ("SPLIT_BY_ACQUISITION",)
        check_equal(load_volume(series)[0], truth)


def test_stacks_and_localizers_inside() -> None:
    slices = ct_slices(made_volume())
    scout = ct_slices(made_volume(shape=(1, 5, 7), orientation=(0, 1, 0, 0, 0, -1)))
    ds = enhanced([*scout, *slices], FUNCTIONAL_GROUPS)
    check_equal(load(to_bytes(ds))[0], made_volume())
    slices = ct_slices(made_volume(shape=(12, 5, 7)))
    ds = enhanced(slices, FUNCTIONAL_GROUPS)
    for group in ds.PerFrameFunctionalGroupsSequence[6:]:
        group.CTImageFrameTypeSequence[0].FrameType = ["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]
    volume, _, warnings = load(to_bytes(ds))
    np.testing.assert_array_equal(volume.hu, made_volume(shape=(12, 5, 7)).hu[:6])
    assert warnings == ("PROJECTION_DROPPED",)


def test_gates_name_the_frame() -> None:
    slices = ct_slices(made_volume())
    del slices[3]
    refusal = refused(to_bytes(enhanced(slices)))
    assert refusal.reason == "MISSING_SLICE"
    assert "slice 3 of 5 (frame 3)" in refusal.detail


def _drop(macro: str) -> Callable[[Dataset], None]:
    return lambda ds: delattr(ds.SharedFunctionalGroupsSequence[0], macro)


def _set(keyword: str, value: object) -> Callable[[Dataset], None]:
    return lambda ds: setattr(ds, keyword, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_drop("PixelMeasuresSequence"), "MISSING_GEOMETRY"),
        (_drop("PlaneOrientationSequence"), "MISSING_GEOMETRY"),
        (_drop("PixelValueTransformationSequence"), "MISSING_RESCALE"),
        (lambda ds: delattr(ds, "PerFrameFunctionalGroupsSequence"), "BAD_HEADER"),
        (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), "BAD_HEADER"),
        (_set("NumberOfFrames", 5), "BAD_HEADER"),
        (_set("NumberOfFrames", 2**31 - 1), "TOO_LARGE"),
        (_set("NumberOfFrames", -1), "TOO_LARGE"),
        (_set("SOPClassUID", uid.CTImageStorage), "MULTIFRAME_UNSUPPORTED"),
        (_set("Rows", 6), "PIXEL_LENGTH"),
        (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-2]), "PIXEL_LENGTH"),
        (lambda ds: delattr(ds, "PixelData"), "NO_PIXELS"),
        (_set("BitsAllocated", 8), "BAD_PIXEL_FORMAT"),
        (
            lambda ds: setattr(
                ds.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0], "ImagePositionPatient", [0, 1]
            ),
            "BAD_HEADER",
        ),
        (_set("Modality", "MR"), "NOT_CT"),
    ],
)
def test_what_is_wrong_is_named_once(change: Callable[[Dataset], object], reason: str) -> None:
    ds = enhanced(ct_slices(made_volume()))
    change(ds)
    assert refused(to_bytes(ds)).reason == reason


def test_a_deflated_one_is_refused() -> None:
    file = to_bytes(enhanced(ct_slices(made_volume())), uid.DeflatedExplicitVRLittleEndian)
    assert refused(file).reason == "MULTIFRAME_UNSUPPORTED"


def test_cut_anywhere(tmp_path) -> None:
    file = to_bytes(enhanced(ct_slices(made_volume())))
    assert dcmread(_write(tmp_path, file)).NumberOfFrames == 6
    for length in range(len(file) - 40, 400, -97):
        assert refused(file[:length]).reason == "TRUNCATED"


def _write(folder, file: bytes):
    path = folder / "whole.dcm"
    path.write_bytes(file)
    return path


def test_a_finding_names_its_frame() -> None:
    finding = Finding((1, 2, 3, 4), 0, ((0, 0, 0),) * 4, (0, 0, 0), 2.0, 0.5, 1)
    told = finding_out(finding, StoredSlice("1.2.3", frame=7, row_offset=0.5))
    assert (told.sop_instance_uid, told.frame_number, told.box_px) == ("1.2.3", 7, (1, 1.5, 3, 3.5))
    assert finding_out(finding, StoredSlice("1.2.3")).frame_number is None


def test_as_many_frames_as_are_read_stay_within_the_limits_of_a_file() -> None:
    """The headers of 4,096 frames with functional groups of their own."""
    few = enhanced(ct_slices(made_volume(shape=(8, 2, 2))), FUNCTIONAL_GROUPS)
    few.PerFrameFunctionalGroupsSequence = list(few.PerFrameFunctionalGroupsSequence) * (MAX_FRAMES // 8)
    few.NumberOfFrames, few.PixelData = MAX_FRAMES, few.PixelData * (MAX_FRAMES // 8)
    with Pool(limits=Limits(wall_s=60.0)) as pool:  # a busy machine is no fault of a file
        ((_, headers),) = isolated.image_headers([("", to_bytes(few))], pool)
    assert not isinstance(headers, Refusal)
    assert len(headers) == MAX_FRAMES
    assert len({header.image_position_patient for header in headers}) == 8
