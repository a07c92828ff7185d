"""Real CT in the shared data: sarcoma (NIfTI, DICOM, RTSTRUCT), LIDC, a tilted gantry, six transfer syntaxes."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from mp3d.config import GeometryPolicy
from mp3d.data.dicom import StoredSlice, group_series, load_volume, read_header, read_hu
from mp3d.data.dicom_folder import read_dicom
from mp3d.data.segmentation import read_segmentation
from mp3d.data.series import CTSeries, Volume
from mp3d.data.volumes import load_image, load_mask, read_volumes
from mp3d.errors import Refusal

SHARED = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data in {SHARED}")

STS_VOXELS = {"STS_019": 5564, "STS_025": 9655, "STS_042": 11175}


def only_series(folder: str) -> tuple[Volume, tuple[StoredSlice, ...], tuple[str, ...]]:
    return load_volume(*group_series(SHARED / folder).series)


def masks(series: CTSeries) -> np.ndarray:
    return np.stack([truth.mask for truth in series.truths if truth.mask is not None])


class TestSarcoma:
    def test_all_cases_as_nifti(self) -> None:
        source = read_volumes(SHARED / "sts" / "nifti")
        assert (len(source.items), source.refused) == (16, ())
        series = next(item for item in source.items if item.patient == "STS_001").load()
        assert isinstance(series, CTSeries)
        assert series.volume.hu.shape == (59, 202, 198)
        assert (series.volume.hu.min(), series.volume.hu.max()) == (-1000, 1397)
        millilitres = masks(series).sum() * np.prod(series.volume.spacing_mm) / 1000
        assert millilitres == pytest.approx(365.3, abs=0.1)

    @pytest.mark.parametrize("patient", STS_VOXELS)
    def test_dicom_with_rtstruct_equals_nifti_with_mask(self, patient: str) -> None:
        source = read_dicom(SHARED / "sts" / "dicom" / patient)
        assert source.refused == ()
        (item,) = source.items
        dicom = item.load()
        (item,) = read_volumes(SHARED / "sts" / "nifti" / patient).items
        nifti = item.load()
        assert isinstance(dicom, CTSeries)
        assert isinstance(nifti, CTSeries)
        assert dicom.patient == nifti.patient == patient
        np.testing.assert_array_equal(dicom.volume.hu, nifti.volume.hu)
        np.testing.assert_allclose(dicom.volume.affine, nifti.volume.affine, atol=1e-3)
        np.testing.assert_array_equal(masks(dicom), masks(nifti))
        assert masks(dicom).sum() == STS_VOXELS[patient]
        for ours, theirs in zip(dicom.truths, nifti.truths, strict=True):
            assert ours.boxes is not None
            assert theirs.boxes is not None
            np.testing.assert_array_equal(ours.boxes, theirs.boxes)
            assert ours.mask is not None
            assert (len(ours.boxes) > 0) == (ours.mask.sum() >= 4)


class TestLidc:
    def test_hu_spacing_and_position(self) -> None:
        listing = group_series(SHARED / "lidc")
        assert listing.refused == []
        first, second = (load_volume(series)[0] for series in sorted(listing.series, key=lambda s: s.patient))
        assert first.hu.shape == (16, 512, 512)
        assert (first.hu.min(), first.hu.max()) == (-2048, 3071)
        assert first.spacing_mm == pytest.approx((2.5, 0.703125, 0.703125))
        assert first.affine[2, 3] == pytest.approx(-132.5)
        assert second.hu.shape == (12, 512, 512)
        assert (second.hu.min(), second.hu.max()) == (-3024, 1561)
        assert second.spacing_mm == pytest.approx((1.25, 0.681641, 0.681641))
        assert second.affine[2, 3] == pytest.approx(-94.5)

    def test_the_slices_keep_their_uids(self) -> None:
        (series, _) = group_series(SHARED / "lidc").series
        volume, stored, _ = load_volume(series)
        headers = {header.sop_instance_uid: header for header in series.slices}
        heights = [headers[uid].image_position_patient[2] for uid, _, _ in stored]
        np.testing.assert_allclose(heights, volume.affine[2, 3] + volume.affine[2, 2] * np.arange(len(stored)))


class TestTiltedGantry:
    """A head in two stacks, of 4 and 7 mm, sheared by 18.5 degrees."""

    FOLDER = SHARED / "odd" / "gantry_tilt_variable_spacing_GE"

    @pytest.mark.parametrize("uneven", ["refuse", "resample"])
    def test_is_refused_by_name(self, uneven: Literal["refuse", "resample"]) -> None:
        policy = GeometryPolicy(uneven=uneven)
        for series in group_series(self.FOLDER, policy).series:
            with pytest.raises(Refusal, match=r"GANTRY_TILT.* 18\.5 degrees"):
                load_volume(series, policy)

    def test_is_sheared_back_stack_by_stack(self) -> None:
        policy = GeometryPolicy(tilt="shear")
        spacings = []
        for series in group_series(self.FOLDER, policy).series:
            volume, stored, warnings = load_volume(series, policy)
            assert warnings == ("SPLIT_BY_SPACING", "TILT_CORRECTED")
            spacings.append(volume.spacing_mm[0])
            gram = volume.affine[:3, :3].T @ volume.affine[:3, :3]
            np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-6)  # orthogonal
            headers = {header.sop_instance_uid: header for header in series.slices}
            for z, origin in enumerate(stored):
                header = headers[origin.sop_instance_uid]
                first_pixel = (volume.affine @ [0, origin.row_offset, z, 1])[:3]
                np.testing.assert_allclose(first_pixel, header.image_position_patient, atol=1e-4)
                hu = np.maximum(read_hu(header), -1024).astype(float)
                at = np.arange(len(hu)) + np.ceil(origin.row_offset) - origin.row_offset
                rows = slice(int(np.ceil(origin.row_offset)), int(np.ceil(origin.row_offset)) + len(hu) - 1)
                expected = np.array([np.interp(at[:-1], np.arange(len(hu)), column) for column in hu.T[::64]]).T
                assert np.abs(volume.hu[z, rows, ::64] - expected).max() <= 0.501
        assert sorted(spacings) == pytest.approx([4.002, 6.999], abs=1e-3)

    def test_is_one_even_volume_when_both_are_asked_for(self) -> None:
        policy = GeometryPolicy(tilt="shear", uneven="resample")
        volume, stored, warnings = load_volume(*group_series(self.FOLDER, policy).series, policy)
        assert warnings == ("TILT_CORRECTED", "UNEVEN_RESAMPLED")
        assert volume.hu.shape == (37, 611, 512)
        assert len(set(stored)) == 28
        lowest = min(group_series(self.FOLDER).series[0].slices, key=lambda header: header.image_position_patient[2])
        assert stored[0] == (lowest.sop_instance_uid, 0, 99)
        np.testing.assert_array_equal(volume.hu[0, 99:], np.maximum(read_hu(lowest), -1024))
        assert (volume.hu[0, :99] == -1024).all()


def test_six_transfer_syntaxes_give_equal_hu() -> None:
    slices = [read_hu(read_header(path)) for path in sorted((SHARED / "odd" / "ct_transfer_syntaxes").iterdir())]
    assert len(slices) == 6
    assert (slices[0].min(), slices[0].max()) == (-3024, 1378)
    for other in slices[1:]:
        np.testing.assert_array_equal(other, slices[0])


class TestLiver:
    def test_over_anonymised_jpeg_2000(self) -> None:
        volume, stored, warnings = only_series("liver/totalsegmentator/example_ct_dicom")
        assert warnings == ("EMPTY_SERIES_UID", "UNKNOWN_PATIENT")
        assert volume.hu.shape == (20, 512, 512)
        assert (volume.hu.min(), volume.hu.max()) == (-1024, 1839)
        assert volume.spacing_mm == pytest.approx((2, 0.9765625, 0.9765625))  # the slices are 3 mm thick
        assert len(set(stored)) == 20  # from the meta information
        liver = load_mask(SHARED / "liver" / "totalsegmentator" / "example_seg_dicom.nii.gz", volume, 117) == 5
        assert liver.sum() == 366_708
        assert volume.hu[liver].mean() == pytest.approx(89, abs=1)
        assert volume.hu[liver].std() == pytest.approx(22, abs=1)

    def test_nifti_in_ras(self) -> None:
        folder = SHARED / "liver" / "totalsegmentator"
        volume, _ = load_image(folder / "example_ct.nii.gz")
        assert volume.hu.shape == (112, 101, 122)
        assert (volume.hu.min(), volume.hu.max()) == (-1207, 3382)
        np.testing.assert_allclose(volume.affine[:3, :3], 3 * np.eye(3), atol=1e-4)
        liver = load_mask(folder / "example_seg_fast_force_split.nii.gz", volume, 117) == 5
        assert liver.sum() == 41_692

    def test_three_slices_closer_than_thick(self) -> None:
        volume, _, warnings = only_series("liver/dcmqi_ct3")
        assert volume.hu.shape == (3, 512, 512)
        assert (volume.hu.min(), volume.hu.max()) == (-3024, 1381)
        assert volume.spacing_mm == pytest.approx((1, 0.810547, 0.810547))
        assert warnings == ()
        assert [header.modality for header in group_series(SHARED / "liver" / "dcmqi_ct3").objects] == ["SEG", "SEG"]


class TestLiverSegmentation:
    """DICOM SEG of three slices; the same mask as NRRD."""

    FOLDER = SHARED / "liver" / "dcmqi_ct3"

    def test_mask_equals_the_nrrd(self) -> None:
        source = read_dicom(self.FOLDER, roi="^Liver$")
        assert (source.refused, source.notes) == ((), ())
        (item,) = source.items
        series = item.load()
        assert isinstance(series, CTSeries)
        assert series.warnings == ()
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(self.FOLDER / "liver_seg.nrrd")))
        np.testing.assert_array_equal(masks(series), expected)
        assert masks(series).sum(axis=(1, 2)).tolist() == [36_233, 35_645, 35_220]
        liver = series.volume.hu[masks(series) > 0]
        assert (liver.mean(), liver.std()) == pytest.approx((37, 59), abs=1)
        assert [None if truth.boxes is None else len(truth.boxes) for truth in series.truths] == [1, 1, 1]

    def test_overlapping_segments_are_told_apart(self) -> None:
        header = read_header(self.FOLDER / "partial_overlaps.dcm")
        whole = read_segmentation(header, ".")
        assert (whole.num_segments, len(whole.frames)) == (5, 7)
        pixels = pydicom.dcmread(self.FOLDER / "partial_overlaps.dcm").pixel_array
        for frame, stored in zip(whole.frames, pixels, strict=True):
            np.testing.assert_array_equal(frame.inside, stored)
        (item,) = read_dicom(self.FOLDER, roi="^PURPLE$").items
        series = item.load()
        assert isinstance(series, CTSeries)
        np.testing.assert_array_equal(masks(series), pixels[2:5])  # its frames, from the lowest slice up

    def test_no_lesion_by_the_default_names(self) -> None:
        (item,) = read_dicom(self.FOLDER).items
        series = item.load()
        assert isinstance(series, CTSeries)
        assert series.warnings == ("ROI_NOT_FOUND",)
