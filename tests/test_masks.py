"""Contours to masks, masks to boxes."""

import numpy as np
import pytest
from matplotlib.path import Path as Polygon

from mp3d.data.masks import boxes_from_mask, fill_contours, truths_from_mask
from mp3d.data.series import boxes_3d


def test_one_pixel_is_one_box() -> None:
    mask = np.zeros((5, 7), np.uint8)
    mask[3, 1] = 1
    boxes, labels = boxes_from_mask(mask, min_pixels=1)
    assert boxes.tolist() == [[1, 3, 2, 4]]
    assert (boxes.dtype, labels.tolist(), labels.dtype) == (np.float32, [1], np.int64)


def test_no_lesion_gives_empty_arrays_of_the_right_shape() -> None:
    boxes, labels = boxes_from_mask(np.zeros((5, 7), np.uint8))
    assert (boxes.shape, boxes.dtype, labels.shape) == ((0, 4), np.float32, (0,))


def test_pieces_that_touch_at_a_corner_are_one() -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[1:3, 1:3] = mask[3:5, 3:6] = 1
    assert boxes_from_mask(mask)[0].tolist() == [[1, 1, 6, 5]]


def test_labels_are_boxed_apart_even_where_they_touch() -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[0:2, 0:3], mask[2:4, 0:3], mask[2:4, 5:8] = 3, 1, 1
    boxes, labels = boxes_from_mask(mask)
    assert boxes.tolist() == [[0, 2, 3, 4], [5, 2, 8, 4], [0, 0, 3, 2]]
    assert labels.tolist() == [1, 1, 3]


def test_specks_are_dropped() -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[0, :3], mask[3:5, 3:5] = 1, 1
    assert boxes_from_mask(mask)[0].tolist() == [[3, 3, 5, 5]]
    assert len(boxes_from_mask(mask, min_pixels=3)[0]) == 2


def test_components_of_the_volume_number_the_boxes_of_its_slices() -> None:
    """Label 2 is a slanted rod that only corners hold together, beside it a block; label 1 a speck and a block."""
    mask = np.zeros((5, 20, 30), np.uint8)
    for z in range(4):
        mask[z, 2 + 2 * z : 4 + 2 * z, 3 + 2 * z : 5 + 2 * z] = 2
    mask[1:3, 10:14, 20:26] = 2
    mask[4, 0, 0] = 1
    mask[0, 15:18, 1:4] = 1
    truths = truths_from_mask(mask)
    for plane, truth in zip(mask, truths, strict=True):
        boxes, labels = boxes_from_mask(plane)
        np.testing.assert_array_equal(truth.boxes, boxes)
        np.testing.assert_array_equal(truth.labels, labels)
        np.testing.assert_array_equal(truth.mask, plane)
    boxes, labels, instances = boxes_3d(truths)
    assert boxes.tolist() == [[1, 15, 0, 4, 18, 1], [3, 2, 0, 11, 10, 4], [20, 10, 1, 26, 14, 3]]
    assert labels.tolist() == [1, 2, 2]
    assert instances.tolist() == [1, 3, 4]  # the speck of label 1 is 2 and has no box


def test_a_hook_is_one_instance_with_two_boxes_on_a_slice() -> None:
    mask = np.zeros((3, 12, 16), np.uint8)
    mask[0, 3:6, 2:14] = mask[1, 3:6, 2:5] = mask[1, 3:6, 10:14] = 1
    instances = [truth.instances for truth in truths_from_mask(mask)]
    assert [[] if numbers is None else numbers.tolist() for numbers in instances] == [[1], [1, 1], []]


def test_only_chosen_labels_are_boxed_but_the_mask_is_whole() -> None:
    mask = np.zeros((3, 12, 16), np.uint8)
    mask[:, 2:10, 2:14] = 1
    mask[1, 4:7, 5:9] = 2
    truths = truths_from_mask(mask, boxed=(2,))
    assert boxes_3d(truths)[0].tolist() == [[5, 4, 1, 9, 7, 2]]
    np.testing.assert_array_equal([truth.mask for truth in truths], mask)
    assert all(truth.boxes is not None for truth in truths)


def rectangle(x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], float)


def test_centres_inside_are_filled() -> None:
    filled = fill_contours([rectangle(0.6, 1.4, 3.5, 2.6)], (5, 6))
    expected = np.zeros((5, 6), bool)
    expected[2, 1:4] = True
    np.testing.assert_array_equal(filled, expected)


def test_direction_and_starting_point_do_not_matter() -> None:
    contour = np.array([[0.3, 0.2], [4.8, 1.1], [3.3, 4.7], [1.2, 3.9]])
    filled = fill_contours([contour], (6, 6))
    assert filled.any()
    for other in (contour[::-1], np.roll(contour, 2, axis=0)):
        np.testing.assert_array_equal(fill_contours([other], (6, 6)), filled)


def test_neighbours_share_an_edge_without_gap_or_overlap() -> None:
    left, right = rectangle(0, 0, 2, 3), rectangle(2, 0, 5, 3)
    fills = [fill_contours([contour], (4, 6)) for contour in (left, right)]
    assert not (fills[0] & fills[1]).any()
    np.testing.assert_array_equal(fills[0] | fills[1], fill_contours([rectangle(0, 0, 5, 3)], (4, 6)))
    assert (fills[0] | fills[1]).sum() == 15


def test_a_contour_inside_is_a_hole_and_one_beside_adds() -> None:
    outer, hole, beside = rectangle(-0.5, -0.5, 4.5, 4.5), rectangle(0.5, 0.5, 2.5, 3.5), rectangle(5.5, 0.5, 7.5, 2.5)
    filled = fill_contours([outer, hole, beside], (5, 8))
    assert filled.sum() == 25 - 6 + 4
    assert not filled[1:4, 1:3].any()


def test_contours_over_the_border_are_cut_there() -> None:
    filled = fill_contours([rectangle(-9, -9, 1.5, 99), rectangle(20, 1, 30, 3)], (4, 6))
    np.testing.assert_array_equal(np.flatnonzero(filled.all(axis=0)), [0, 1])
    assert filled.sum() == 8


def test_nothing_to_fill() -> None:
    assert not fill_contours([], (3, 4)).any()
    assert not fill_contours([np.zeros((0, 2)), np.array([[1.0, 1.0]])], (3, 4)).any()


@pytest.mark.parametrize("seed", range(10))
def test_agrees_with_another_point_in_polygon_rule(seed: int) -> None:
    """Star-shaped polygons with random corners, off the pixel centres."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 25))
    radii = rng.uniform(3, 14, 25)
    contour = np.stack([17.3 + radii * np.cos(angles), 15.1 + radii * np.sin(angles)], axis=1)
    rows, columns = np.indices((32, 36))
    inside = Polygon(contour).contains_points(np.stack([columns.ravel(), rows.ravel()], axis=1)).reshape(32, 36)
    np.testing.assert_array_equal(fill_contours([contour], (32, 36)), inside)
