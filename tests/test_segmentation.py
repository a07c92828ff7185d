"""DICOM SEG: segments of many frames to a mask on the slices they were drawn on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, uid

from mp3d.data.dicom import Header, StoredSlice, group_series, load_volume, read_header
from mp3d.data.dicom_folder import read_dicom
from mp3d.data.segmentation import Segmentation, mask_from_frames, read_segmentation
from mp3d.data.series import CTSeries, Volume
from mp3d.errors import Refusal
from tests.dicom_files import (
    FRAME_UID,
    SERIES_UID,
    ct_slices,
    enhanced,
    made_volume,
    random_orientation,
    segmentation,
    structure_set,
    to_bytes,
)
from tests.test_dicom_folder import load, write
from tests.test_rtstruct import outline

VOLUME = made_volume(shape=(6, 12, 14))
STORED = tuple(StoredSlice(f"{SERIES_UID}.{z + 1}") for z in range(6))


def boxes_of(*regions: tuple[slice, slice, slice], shape: tuple[int, int, int] = (6, 12, 14)) -> np.ndarray:
    inside = np.zeros(shape, bool)
    for region in regions:
        inside[region] = True
    return inside


LESION = boxes_of(np.s_[2:4, 3:7, 5:9], np.s_[3:4, 9:12, 0:3])
OTHER = boxes_of(np.s_[3:5, 5:10, 7:13])


def read(ds: Dataset, segment: str = "(?i)lesion") -> Segmentation:
    return read_segmentation(read_header(to_bytes(ds)), segment)


def header(ds: Dataset, **changes: object) -> Header:
    return replace(read_header(to_bytes(ds)), **changes)


def mask(ds: Dataset, volume: Volume = VOLUME, segment: str = "(?i)lesion") -> np.ndarray:
    found, num_outside = mask_from_frames(read(ds, segment).frames, volume, STORED)
    assert num_outside == 0
    return found


def drawn_on(ds: Dataset, numbers: list[int]) -> Dataset:
    """With the image of each frame, counted from 1, ascending."""
    for group, number in zip(ds.PerFrameFunctionalGroupsSequence, numbers, strict=True):
        image, derivation = Dataset(), Dataset()
        image.ReferencedSOPInstanceUID = f"{SERIES_UID}.{number}"
        derivation.SourceImageSequence = [image]
        group.DerivationImageSequence = [derivation]
    return ds


@pytest.mark.parametrize(
    "syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian]
)
def test_binary_frames_of_overlapping_segments(syntax: uid.UID):
    """12 x 13 pixels are no whole number of bytes: frames begin within one."""
    volume = made_volume(shape=(6, 12, 13))
    lesion, other = LESION[:, :, :13], OTHER[:, :, :13]
    file = to_bytes(segmentation(volume, {"Lesion 1": lesion, "Organ": other}), syntax)
    found = read_segmentation(read_header(file), "Lesion")
    assert found.series_instance_uids == {SERIES_UID}
    assert found.frame_of_reference_uids == {FRAME_UID}
    assert (found.num_segments, len(found.frames)) == (1, 2)
    np.testing.assert_array_equal(mask_from_frames(found.frames, volume, STORED)[0], lesion)
    both = read_segmentation(read_header(file), "Lesion|Organ")
    np.testing.assert_array_equal(mask_from_frames(both.frames, volume, STORED)[0], lesion | other)


def test_fractions_count_from_one_half():
    fractions = LESION * np.linspace(0, 1, 14)
    assert (fractions == 0.5).sum() == 0
    found = mask(segmentation(VOLUME, {"Lesion": fractions}, fractional=True))
    np.testing.assert_array_equal(found, fractions >= 0.5)
    half = np.full((6, 12, 14), 0.5)
    assert mask(segmentation(VOLUME, {"Lesion": half}, fractional=True)).all()
    assert not mask(segmentation(VOLUME, {"Lesion": half - 0.005}, fractional=True)).any()


@pytest.mark.parametrize("seed", range(3))
def test_on_an_oblique_grid(seed: int):
    volume = made_volume(shape=(6, 12, 14), orientation=random_orientation(np.random.default_rng(seed)))
    np.testing.assert_array_equal(mask(segmentation(volume, {"Lesion": LESION}), volume), LESION)


def test_segments_are_chosen_by_label_or_type():
    ds = segmentation(VOLUME, {"1": LESION, "2": OTHER})
    ds.SegmentSequence[1].SegmentedPropertyTypeCodeSequence[0].CodeMeaning = "Neoplasm"
    np.testing.assert_array_equal(mask(ds, segment="^Neoplasm$"), OTHER)
    np.testing.assert_array_equal(mask(ds, segment="^1$"), LESION)
    assert read(ds, "liver").num_segments == 0
    del ds.SegmentSequence[0].SegmentedPropertyTypeCodeSequence
    assert read(ds, "Neoplasm").num_segments == 1


def test_a_cropped_or_larger_frame():
    cropped = replace(VOLUME, hu=VOLUME.hu[:, 2:10, 4:12], affine=VOLUME.affine.copy())
    cropped.affine[:3, 3] = (VOLUME.affine @ [4, 2, 0, 1])[:3]
    ds = segmentation(cropped, {"Lesion": LESION[:, 2:10, 4:12]})
    expected = np.zeros_like(LESION)
    expected[:, 2:10, 4:12] = LESION[:, 2:10, 4:12]
    np.testing.assert_array_equal(mask(ds), expected)
    larger = segmentation(VOLUME, {"Lesion": LESION})
    found, _ = mask_from_frames(read(larger).frames, cropped, STORED)
    np.testing.assert_array_equal(found, LESION[:, 2:10, 4:12])


def test_planes_beyond_the_slices_are_counted():
    upper = replace(VOLUME, hu=VOLUME.hu[3:], affine=VOLUME.affine.copy())
    upper.affine[:3, 3] = (VOLUME.affine @ [0, 0, 3, 1])[:3]
    found, num_outside = mask_from_frames(read(segmentation(VOLUME, {"Lesion": LESION})).frames, upper, STORED[3:])
    assert num_outside == 1
    np.testing.assert_array_equal(found, LESION[3:])


def test_without_position_the_image_decides():
    ds = drawn_on(segmentation(VOLUME, {"Lesion": LESION}), [3, 4])
    for group in ds.PerFrameFunctionalGroupsSequence:
        del group.PlanePositionSequence
    np.testing.assert_array_equal(mask(ds), LESION)
    frames = read(ds).frames
    assert mask_from_frames(frames, replace(VOLUME, hu=VOLUME.hu[:3]), STORED[:3])[1] == 1
    with pytest.raises(Refusal, match="MASK_MISMATCH.*neither a position"):
        mask_from_frames(frames, made_volume(shape=(6, 12, 15)), STORED)
    for group in ds.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence
    with pytest.raises(Refusal, match="MASK_MISMATCH.*neither a position"):
        mask(ds)


def test_position_and_image_must_agree():
    ds = drawn_on(segmentation(VOLUME, {"Lesion": LESION}), [3, 4])
    np.testing.assert_array_equal(mask(ds), LESION)
    with pytest.raises(Refusal, match="MASK_MISMATCH.*slice 3 by its position, on slice 5 by the image"):
        mask(drawn_on(ds, [5, 4]))
    several = ds.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0]
    several.SourceImageSequence = [*several.SourceImageSequence, Dataset()]  # then the position alone decides
    np.testing.assert_array_equal(mask(ds), LESION)


@pytest.mark.parametrize("step", [[0.4, 0, 0], [0, 0.4, 0], [0, 0, 0.4], [float("nan"), 0, 0]])
def test_another_grid_is_refused(step: list[float]):
    volume = replace(VOLUME, affine=VOLUME.affine.copy())
    frames = read(segmentation(VOLUME, {"Lesion": LESION})).frames
    volume.affine[:3, 3] += volume.affine[:3, :3] @ step
    with pytest.raises(Refusal, match="MASK_MISMATCH.*resample"):
        mask_from_frames(frames, volume, STORED)


@pytest.mark.parametrize(
    "other",
    [
        made_volume(shape=(6, 12, 14), spacing_mm=(2.5, 0.8, 0.65)),
        made_volume(shape=(6, 12, 14), orientation=(0, 1, 0, 1, 0, 0)),
    ],
)
def test_another_spacing_or_orientation_is_refused(other: Volume):
    with pytest.raises(Refusal, match="MASK_MISMATCH"):
        mask_from_frames(read(segmentation(VOLUME, {"Lesion": LESION})).frames, other, STORED)


class TestBroken:
    DS = segmentation(VOLUME, {"Lesion": LESION, "Organ": OTHER})

    def refused(self, reason: str, match: str = "", **changes: object) -> None:
        ds = segmentation(VOLUME, {"Lesion": LESION, "Organ": OTHER})
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
        with pytest.raises(Refusal, match=f"{reason}.*{match}"):
            read(ds)

    def test_cut_off(self):
        file = to_bytes(self.DS)
        with pytest.raises(Refusal, match="BAD_SEGMENTATION.*ends before"):
            read_segmentation(read_header(file[:-40]))
        with pytest.raises(Refusal, match="BAD_SEGMENTATION.*ends before"):
            read_segmentation(header(self.DS, pixels=None))

    def test_pixels_that_do_not_fit(self):
        self.refused("PIXEL_LENGTH", "80 bytes", PixelData=bytes(80))
        self.refused("PIXEL_LENGTH", Rows=0)
        self.refused("PIXEL_LENGTH", Rows=13)

    def test_types(self):
        self.refused("BAD_SEGMENTATION", "another Segmentation Type", SegmentationType="LABELMAP")
        self.refused("BAD_SEGMENTATION", "8 Bits Allocated", BitsAllocated=8)

    def test_frames_without_groups(self):
        self.refused("BAD_SEGMENTATION", "3 frames .*groups .*for 4", NumberOfFrames=3)

    @pytest.mark.parametrize("keyword", ["SegmentSequence", "PerFrameFunctionalGroupsSequence", "SegmentationType"])
    def test_missing_elements(self, keyword: str):
        ds = segmentation(VOLUME, {"Lesion": LESION})
        delattr(ds, keyword)
        with pytest.raises(Refusal, match="BAD_SEGMENTATION.*cannot be parsed"):
            read(ds)

    def test_compressed(self):
        ds = segmentation(VOLUME, {"Lesion": LESION}, fractional=True)
        with pytest.raises(Refusal, match="UNSUPPORTED_TRANSFER_SYNTAX"):
            read_segmentation(read_header(to_bytes(ds, uid.RLELossless)), "Lesion")

    def test_more_than_any_lesion_has(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("mp3d.data.segmentation.MAX_FRAME_PIXELS", 300)
        self.refused("TOO_LARGE", "2 frames of 12 x 14 pixels")

    def test_no_message_names_anybody(self):
        ds = segmentation(VOLUME, {"CANARY lesion": LESION})
        ds.PatientID = ds.ContentLabel = "CANARY"
        del ds.PerFrameFunctionalGroupsSequence
        with pytest.raises(Refusal) as caught:
            read(ds, "lesion")
        assert "CANARY" not in str(caught.value)


class TestSeries:
    """As the reader ``dicom`` takes it."""

    def test_boxes_of_a_segmentation(self, tmp_path: Path):
        ds = segmentation(VOLUME, {"Lesion": LESION})
        series = load(write(tmp_path, ct_slices(VOLUME), **{"seg.dcm": to_bytes(ds)}))
        assert [None if truth.boxes is None else truth.boxes.tolist() for truth in series.truths] == [
            [], [], [[5, 3, 9, 7]], [[5, 3, 9, 7], [0, 9, 3, 12]], [], [],
        ]  # fmt: skip
        np.testing.assert_array_equal([truth.mask for truth in series.truths], LESION)

    def test_an_empty_segment_was_searched_and_a_strange_one_not(self, tmp_path: Path):
        ds = segmentation(VOLUME, {"Lesion": np.zeros_like(LESION), "Organ": OTHER})
        root = write(tmp_path, ct_slices(VOLUME), **{"seg.dcm": to_bytes(ds)})
        assert [truth.boxes is not None and len(truth.boxes) for truth in load(root).truths] == [0] * 6
        series = load(root, roi="spleen")
        assert series.warnings == ("ROI_NOT_FOUND",)
        assert all(truth.boxes is None for truth in series.truths)

    def test_adds_up_with_a_structure_set(self, tmp_path: Path):
        outlined = structure_set([[outline(VOLUME, 0, 0.5, 0.5, 3.5, 3.5)]], ["GTV"])
        segmented = segmentation(VOLUME, {"Lesion": LESION})
        root = write(tmp_path, ct_slices(VOLUME), a=to_bytes(outlined), b=to_bytes(segmented))
        assert [0 if truth.boxes is None else len(truth.boxes) for truth in load(root).truths] == [1, 0, 1, 2, 0, 0]

    def test_attached_by_frame_of_reference(self, tmp_path: Path):
        ds = segmentation(VOLUME, {"Lesion": LESION})
        del ds.ReferencedSeriesSequence
        assert load(write(tmp_path, ct_slices(VOLUME), seg=to_bytes(ds))).truths[2].boxes is not None
        ds.FrameOfReferenceUID += ".7"
        write(tmp_path, [], seg=to_bytes(ds))
        assert read_dicom(tmp_path).notes == ("1 structure sets or segmentations belong to no series here",)

    def test_a_broken_one_is_refused_and_the_series_kept(self, tmp_path: Path):
        file = to_bytes(segmentation(VOLUME, {"Lesion": LESION}))[:-50]
        source = read_dicom(write(tmp_path, ct_slices(VOLUME), **{"seg.dcm": file}))
        assert [(key, refusal.reason) for key, refusal in source.refused] == [("seg.dcm", "BAD_SEGMENTATION")]
        assert len(source.items) == 1

    def test_off_the_grid_the_series_is_refused(self, tmp_path: Path):
        moved = replace(VOLUME, affine=VOLUME.affine.copy())
        moved.affine[0, 3] += 0.3
        ds = segmentation(moved, {"Lesion": LESION})
        with pytest.raises(Refusal, match="MASK_MISMATCH"):
            load(write(tmp_path, ct_slices(VOLUME), seg=to_bytes(ds)))

    def test_on_slices_that_were_interpolated(self, tmp_path: Path):
        slices = ct_slices(VOLUME)
        for ds in slices[3:]:
            ds.ImagePositionPatient[2] += 1
        root = write(tmp_path, slices, seg=to_bytes(segmentation(VOLUME, {"Lesion": LESION})))
        with pytest.raises(Refusal, match="MASK_MISMATCH.*interpolated"):
            load(root, uneven="resample")

    def test_frames_of_an_enhanced_ct(self, tmp_path: Path):
        image = enhanced(ct_slices(VOLUME))
        ds = segmentation(VOLUME, {"Lesion": LESION})
        for group, number in zip(drawn_on(ds, [1, 1]).PerFrameFunctionalGroupsSequence, [3, 4], strict=True):
            source = group.DerivationImageSequence[0].SourceImageSequence[0]
            source.ReferencedSOPInstanceUID, source.ReferencedFrameNumber = image.SOPInstanceUID, number
            del group.PlanePositionSequence
        (tmp_path / "image.dcm").write_bytes(to_bytes(image))
        (tmp_path / "seg.dcm").write_bytes(to_bytes(ds))
        (item,) = read_dicom(tmp_path).items
        series = item.load()
        assert isinstance(series, CTSeries)
        np.testing.assert_array_equal([truth.mask for truth in series.truths], LESION)


def test_the_slices_of_a_volume_are_those_of_the_frames(tmp_path: Path):
    """Instance Number falls as z rises, and files come in any order."""
    root = write(tmp_path, ct_slices(VOLUME))
    volume, stored, _ = load_volume(*group_series(root).series)
    ds = drawn_on(segmentation(VOLUME, {"Lesion": LESION}), [3, 4])
    np.testing.assert_array_equal(mask_from_frames(read(ds).frames, volume, stored)[0], LESION)
