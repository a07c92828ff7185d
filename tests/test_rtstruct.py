"""RT Structure Sets: contours in millimetres to masks and boxes on the slices they were drawn on."""

import numpy as np
import pytest
from pydicom import Dataset

from mp3d.data.dicom import read_header
from mp3d.data.rtstruct import mask_from_contours, read_structure_set
from mp3d.data.series import Volume
from mp3d.errors import Refusal
from tests.dicom_files import FRAME_UID, SERIES_UID, made_volume, random_orientation, structure_set, to_bytes


def outline(volume: Volume, z: float, x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    """A rectangle in index coordinates, as points in LPS mm."""
    corners = np.array([[x1, y1, z, 1], [x2, y1, z, 1], [x2, y2, z, 1], [x1, y2, z, 1]])
    return (corners @ volume.affine.T)[:, :3]


def structures(ds: Dataset, roi: str = "GTV"):
    return read_structure_set(read_header(to_bytes(ds)), roi)


@pytest.mark.parametrize("seed", range(3))
def test_mask_on_an_oblique_grid(seed: int) -> None:
    volume = made_volume(shape=(5, 8, 11), orientation=random_orientation(np.random.default_rng(seed)))
    contours = [outline(volume, 2, 0.6, 2.6, 3.4, 4.4), outline(volume, 3, 6.6, 0.6, 9.4, 6.4)]
    found = structures(structure_set([contours], ["GTV_Mass"]))
    assert found.series_instance_uids == {SERIES_UID}
    assert found.frame_of_reference_uids == {FRAME_UID}
    mask, num_outside = mask_from_contours(found.regions, volume)
    expected = np.zeros((5, 8, 11), np.uint8)
    expected[2, 3:5, 1:4] = expected[3, 1:7, 7:10] = 1
    np.testing.assert_array_equal(mask, expected)
    assert num_outside == 0


def test_holes_within_a_region_and_union_over_regions() -> None:
    volume = made_volume(shape=(4, 10, 12))
    ring = [outline(volume, 1, 0.5, 0.5, 8.5, 8.5), outline(volume, 1, 2.5, 2.5, 6.5, 6.5)]
    over = [outline(volume, 1, 4.5, 4.5, 9.5, 8.5)]
    mask, _ = mask_from_contours(structures(structure_set([ring, over], ["GTV 1", "gtv 2"]), "(?i)gtv").regions, volume)
    expected = np.zeros((10, 12), np.uint8)
    expected[1:9, 1:9] = 1
    expected[3:7, 3:7] = 0
    expected[5:9, 5:10] = 1
    np.testing.assert_array_equal(mask[1], expected)
    assert not mask[[0, 2, 3]].any()


def test_only_matching_regions_and_closed_contours() -> None:
    volume = made_volume()
    contour = outline(volume, 1, 0.5, 0.5, 3.5, 3.5)
    ds = structure_set([[contour], [contour]], ["Spinal cord", "GTV"])
    ds.ROIContourSequence[1].ContourSequence[0].ContourGeometricType = "POINT"
    assert structures(ds).regions == ()
    assert len(structures(ds, "cord").regions) == 1


def test_contours_beyond_the_slices_are_counted() -> None:
    volume = made_volume()
    region = [outline(volume, z, 0.5, 0.5, 3.5, 3.5) for z in (-1, 0, 5, 6)]
    mask, num_outside = mask_from_contours([region], volume)
    assert num_outside == 2
    assert mask.any(axis=(1, 2)).tolist() == [True, False, False, False, False, True]


def test_contour_between_slices_is_refused() -> None:
    volume = made_volume()
    with pytest.raises(Refusal, match=r"CONTOUR_OFF_PLANE.*slice 3 of 6"):
        mask_from_contours([[outline(volume, 2.4, 0, 0, 3, 3)]], volume)


def test_incomplete_structure_set() -> None:
    ds = structure_set([[outline(made_volume(), 1, 0, 0, 3, 3)]], ["GTV"])
    del ds.StructureSetROISequence
    with pytest.raises(Refusal, match="BAD_STRUCTURE_SET"):
        structures(ds)


def test_truncated_structure_set() -> None:
    file = to_bytes(structure_set([[outline(made_volume(), 1, 0, 0, 3, 3)]], ["GTV"]))
    with pytest.raises(Refusal, match="BAD_STRUCTURE_SET"):
        read_structure_set(read_header(file[:-40]))


def test_odd_number_of_coordinates() -> None:
    ds = structure_set([[outline(made_volume(), 1, 0, 0, 3, 3)]], ["GTV"])
    contour = ds.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = contour.ContourData[:-1]
    with pytest.raises(Refusal, match="BAD_STRUCTURE_SET"):
        structures(ds)
