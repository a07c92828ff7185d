"""The made world: true DICOM and JPEG files, contours that are the masks, lesions that only z tells from vessels."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRLittleEndian
from scipy.ndimage import uniform_filter

from mp3d.data.dicom_folder import read_dicom
from mp3d.data.series import CTSeries
from mp3d.data.synthetic import write_bad_files, write_ct_world, write_picture_world
from mp3d.data.synthetic.ct import draw_ct
from mp3d.data.synthetic.dicom_files import mask_contours
from mp3d.data.synthetic.pictures import draw_picture

NUM_PATIENTS = 30
AIR_HU, SOFT_TISSUE_HU = -1000, 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, write_ct_world(folder, num_patients=3, seed=7)


@pytest.fixture(scope="module")
def drawn_patients():
    return [draw_ct(np.random.default_rng([1, index]), size_px=128, num_slices=24) for index in range(NUM_PATIENTS)]


def even_odd_fill(polygons: list[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Pixels whose centre is inside an odd number of polygons of (x, y) pixel coordinates: rays cast to the left."""
    y, x = np.mgrid[:rows, :columns]
    inside = np.zeros((rows, columns), bool)
    for polygon in polygons:
        for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            if y1 != y2:
                inside ^= ((y1 > y) != (y2 > y)) & (x1 + (y - y1) * (x2 - x1) / (y2 - y1) < x)
    return inside


def read_series(folder: Path) -> list[pydicom.Dataset]:
    """Slices in ascending z."""
    return sorted(map(pydicom.dcmread, folder.glob("*.dcm")), key=lambda slice_: slice_.ImagePositionPatient[2])


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive is greater than a negative."""
    return float((np.asarray(positive)[:, None] > np.asarray(negative)).mean())


def cross_sections(masks: np.ndarray, hu: np.ndarray, every: int) -> list[list[float]]:
    """Area, mean and spread of HU, contrast to what is around, elongation and place, on every n-th slice of a mask."""
    features = []
    for mask in masks:
        for z in np.flatnonzero(mask.any((1, 2)))[::every]:
            rows, columns = np.nonzero(mask[z])
            minor, major = np.sqrt(np.linalg.eigvalsh(np.cov(columns, rows)))
            x, y, values = columns.mean(), rows.mean(), hu[z][mask[z]]
            around = hu[z, max(0, int(y) - 14) : int(y) + 15, max(0, int(x) - 14) : int(x) + 15]
            features.append(
                [len(rows), values.mean(), values.std(), values.mean() - np.median(around), major / minor, x, y]
            )
    return features


def test_series_is_regular_ct_in_hounsfield_units(world):
    folder, truth = world
    for index, patient in enumerate(truth.patients):
        slices = read_series(folder / patient.patient / "CT")
        drawn = draw_ct(np.random.default_rng([7, index]), size_px=128, num_slices=24)
        assert len(slices) == 24
        assert {(s.Modality, s.PatientID, s.SeriesInstanceUID, s.FrameOfReferenceUID) for s in slices} == {
            ("CT", f"{patient.patient}-7", slices[0].SeriesInstanceUID, slices[0].FrameOfReferenceUID)
        }
        assert len({s.SOPInstanceUID for s in slices}) == 24
        assert all(uid.is_valid for s in slices for uid in (s.SOPInstanceUID, s.SeriesInstanceUID, s.StudyInstanceUID))
        assert all(s.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian for s in slices)
        assert [s.InstanceNumber for s in slices] == list(range(24, 0, -1))

        hu = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])
        np.testing.assert_array_equal(hu, drawn.volume.hu)
        assert np.median(hu[:, :8, :8]) == pytest.approx(AIR_HU, abs=10)
        assert np.median(hu[:, 40:80, 40:80]) == pytest.approx(SOFT_TISSUE_HU, abs=40)

        z_mm = np.diff([float(s.ImagePositionPatient[2]) for s in slices])
        np.testing.assert_allclose(z_mm, patient.spacing_mm[0], atol=1e-3)
        assert [float(v) for v in slices[0].PixelSpacing] == pytest.approx(patient.spacing_mm[1:])
        np.testing.assert_allclose([float(v) for v in slices[0].ImagePositionPatient], drawn.volume.affine[:3, 3])


def test_contours_fill_to_the_drawn_masks(world):
    folder, truth = world
    for index, patient in enumerate(truth.patients):
        drawn = draw_ct(np.random.default_rng([7, index]), size_px=128, num_slices=24)
        slices = {s.SOPInstanceUID: z for z, s in enumerate(read_series(folder / patient.patient / "CT"))}
        rtstruct = pydicom.dcmread(folder / patient.patient / "RS.dcm")
        assert rtstruct.Modality == "RTSTRUCT"
        names = [roi.ROIName for roi in rtstruct.StructureSetROISequence]
        assert names == [f"LESION {n + 1}" for n in range(len(patient.lesions))]

        to_pixels = np.linalg.inv(drawn.volume.affine)
        for roi, mask, lesion in zip(rtstruct.ROIContourSequence, drawn.lesion_masks, patient.lesions, strict=True):
            polygons: dict[int, list[np.ndarray]] = {}
            for contour in roi.ContourSequence:
                points_mm = np.array(contour.ContourData, float).reshape(-1, 3)
                assert len(points_mm) == contour.NumberOfContourPoints
                pixels = np.column_stack([points_mm, np.ones(len(points_mm))]) @ to_pixels.T
                z = slices[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
                np.testing.assert_allclose(pixels[:, 2], z, atol=1e-3)
                polygons.setdefault(z, []).append(pixels[:, :2])
            assert (min(polygons), max(polygons) + 1) == lesion.slices
            for z in range(24):
                np.testing.assert_array_equal(even_odd_fill(polygons.get(z, []), 128, 128), mask[z])


def test_the_ordinary_reader_reads_what_was_drawn(world):
    folder, truth = world
    items = read_dicom(folder).items
    assert len(items) == len(truth.patients)
    for index, item in enumerate(items):
        series = item.load()
        assert isinstance(series, CTSeries)
        drawn = draw_ct(np.random.default_rng([7, index]), size_px=128, num_slices=24)
        assert (series.patient, series.warnings) == (f"{truth.patients[index].patient}-7", ())
        np.testing.assert_array_equal(series.volume.hu, drawn.volume.hu)
        np.testing.assert_allclose(series.volume.affine, drawn.volume.affine, atol=1e-3)
        num_boxes = [len(truth.boxes) for truth in series.truths if truth.boxes is not None]
        assert num_boxes == drawn.lesion_masks.any((2, 3)).sum(0).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_contours_of_any_mask_fill_to_it(seed):
    """Holes, islands, pixels that touch at a corner, pixels on the border."""
    mask = np.random.default_rng(seed).random((13, 17)) < 0.5
    np.testing.assert_array_equal(even_odd_fill(mask_contours(mask), 13, 17), mask)


def test_contours_have_corners_only():
    mask = np.zeros((9, 9), bool)
    mask[2:5, 3:8] = True
    (polygon,) = mask_contours(mask)
    assert sorted(map(tuple, polygon)) == [(2.5, 1.5), (2.5, 4.5), (7.5, 1.5), (7.5, 4.5)]


def test_truth_in_millimetres_is_where_the_pixels_are(drawn_patients):
    for drawn in drawn_patients:
        for lesion, mask in zip(drawn.lesions, drawn.lesion_masks, strict=True):
            z, y, x = np.argwhere(mask).mean(0)
            found_mm = (drawn.volume.affine @ [x, y, z, 1])[:3]
            dz, dy, dx = drawn.volume.spacing_mm
            # The slices sample a lesion unevenly about its centre, and it follows its bent tube.
            np.testing.assert_allclose(found_mm, lesion.centre_mm, atol=max(dz, 1.5 * dx))
            largest_mm2 = mask.sum((1, 2)).max() * dy * dx
            assert largest_mm2 == pytest.approx(np.pi * lesion.radii_mm[0] * lesion.radii_mm[1], rel=0.25)
            assert abs(np.diff(lesion.slices)[0] * dz - 2 * lesion.radii_mm[2]) <= dz


def test_every_patient_has_lesions_that_end_and_vessels_that_do_not(drawn_patients):
    for drawn in drawn_patients:
        assert 1 <= len(drawn.lesions) <= 3
        assert 2 <= len(drawn.vessels) <= 4
        assert all(lesion.slices[0] > 0 and lesion.slices[1] < 24 for lesion in drawn.lesions)
        assert all(vessel.slices == (0, 24) for vessel in drawn.vessels)
        masks = np.concatenate([drawn.lesion_masks, drawn.vessel_masks])
        assert masks.sum(0).max() == 1, "no two overlap"
        largest = drawn.lesion_masks.sum((2, 3)).max(1)
        smallest = np.where(drawn.lesion_masks.any((2, 3)), drawn.lesion_masks.sum((2, 3)), 10**6).min(1)
        assert np.all(smallest > 0.25 * largest), "no thin tip is outlined"


def test_one_slice_does_not_tell_lesions_from_vessels(drawn_patients):
    lesions, vessels = [], []
    for drawn in drawn_patients:
        hu, every = drawn.volume.hu.astype(float), max(1, round(2.5 / drawn.volume.spacing_mm[0]))
        lesions.append(np.array(cross_sections(drawn.lesion_masks, hu, every)))
        vessels.append(np.array(cross_sections(drawn.vessel_masks, hu, every)))
    for feature in range(lesions[0].shape[1]):
        separated = auc(np.concatenate(lesions)[:, feature], np.concatenate(vessels)[:, feature])
        assert 0.35 < separated < 0.65, feature

    # The best linear mixture of them (Fisher's), fitted on one half of the patients, fails on the other.
    half = NUM_PATIENTS // 2
    a, b = np.concatenate(lesions[:half]), np.concatenate(vessels[:half])
    direction = np.linalg.solve(np.cov(a.T) + np.cov(b.T), a.mean(0) - b.mean(0))
    assert 0.35 < auc(np.concatenate(lesions[half:]) @ direction, np.concatenate(vessels[half:]) @ direction) < 0.65


def test_ten_millimetres_away_lesions_are_gone_and_vessels_are_not(drawn_patients):
    """From every annotated slice: the fainter of what is left 10 mm above and below, wherever it has drifted to."""
    lesions, vessels = [], []
    for drawn in drawn_patients:
        hu, reach = drawn.volume.hu.astype(float), round(10 / drawn.volume.spacing_mm[0])
        smooth = uniform_filter(hu, 3, axes=(1, 2))
        for masks, scores in ((drawn.lesion_masks, lesions), (drawn.vessel_masks, vessels)):
            for mask in masks:
                for z in np.flatnonzero(mask.any((1, 2))):
                    y, x = np.argwhere(mask[z]).mean(0).astype(int)
                    near = (slice(max(0, y - 4), y + 5), slice(max(0, x - 4), x + 5))
                    around = (slice(max(0, y - 14), y + 15), slice(max(0, x - 14), x + 15))
                    scores.append(
                        min(
                            smooth[end][near].max() - np.median(hu[end][around])
                            for end in (z - reach, z + reach)
                            if 0 <= end < len(hu)
                        )
                    )
    assert auc(np.array(vessels), np.array(lesions)) > 0.95


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("once", "again"):
        write_ct_world(tmp_path / name / "ct", num_patients=2, seed=3, size_px=64, num_slices=12)
        write_picture_world(tmp_path / name / "pictures", num_per_class=2, seed=3)
        write_bad_files(tmp_path / name / "bad")
    write_ct_world(tmp_path / "other" / "ct", num_patients=2, seed=4, size_px=64, num_slices=12)
    once = {p.relative_to(tmp_path / "once"): p.read_bytes() for p in (tmp_path / "once").rglob("*.*") if p.is_file()}
    again = {
        p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*.*") if p.is_file()
    }
    assert once == again
    other = {p.relative_to(tmp_path / "other"): p.read_bytes() for p in (tmp_path / "other").rglob("*.dcm")}
    assert other
    assert all(once[path] != content for path, content in other.items())


def test_a_volume_too_short_or_too_coarse_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 7"):
        write_ct_world(tmp_path, num_patients=1, seed=0, num_slices=6)
    with pytest.raises(ValueError, match="size_px is 32"):
        write_ct_world(tmp_path, num_patients=1, seed=0, size_px=32)
    assert write_ct_world(tmp_path, num_patients=1, seed=0, num_slices=7, size_px=64).patients[0].spacing_mm[0] == 5


def test_pictures_are_class_folders_of_small_jpegs(tmp_path):
    names = write_picture_world(tmp_path, num_per_class=4, seed=0)
    assert len(names) == 8
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == list(names)
    assert len(list((tmp_path / "train").rglob("*.jpg"))) == 32
    assert len(list((tmp_path / "val").rglob("*.jpg"))) == 8
    with Image.open(tmp_path / "train" / names[0] / "00000.jpg") as picture:
        assert (picture.format, picture.size, picture.mode) == ("JPEG", (64, 64), "RGB")


def test_only_planes_together_tell_the_relation():
    """Brightness and spread of one plane are alike in both relations; what all planes share is not."""
    single: dict[str, list[float]] = {"same_place": [], "own_place": []}
    shared: dict[str, list[float]] = {"same_place": [], "own_place": []}
    for relation in single:
        for index in range(80):
            picture = draw_picture(np.random.default_rng([index, len(relation)]), "disc", relation, 64).astype(float)
            plane = picture[..., index % 3]
            single[relation].append((plane - plane.mean()).clip(0).std())
            smooth = uniform_filter(picture - picture.mean((0, 1)), 3, axes=(0, 1))
            shared[relation].append(smooth.min(2).max())
    assert 0.35 < auc(np.array(single["same_place"]), np.array(single["own_place"])) < 0.65
    assert auc(np.array(shared["same_place"]), np.array(shared["own_place"])) > 0.95


def test_bad_files_are_bad_each_in_its_way(tmp_path):
    bad = write_bad_files(tmp_path)
    assert all(path.parent.name == "CT" for path in bad.values())
    with pytest.raises(InvalidDicomError):
        pydicom.dcmread(bad["broken"])
    cut = pydicom.dcmread(bad["truncated"])
    assert cut.Modality == "CT"
    assert len(cut.PixelData) < cut.Rows * cut.Columns * 2
    assert pydicom.dcmread(bad["not_ct"]).Modality == "MR"
    assert {name: refusal.reason for name, refusal in read_dicom(tmp_path).refused} == {
        str(bad["broken"].relative_to(tmp_path)): "NOT_DICOM",
        str(bad["truncated"].relative_to(tmp_path)): "TRUNCATED",
        str(bad["not_ct"].relative_to(tmp_path)): "NOT_CT",
    }
