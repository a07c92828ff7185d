"""Dice and surface distances against cases worked out by hand, and against all pairs of surface voxels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mp3d.config import UNKNOWN, SegmentationHead
from mp3d.errors import DataError
from mp3d.metrics import build_metric
from mp3d.metrics.dice import dice, hausdorff_95, overlap_counts

masks = arrays(np.bool_, st.tuples(*[st.integers(1, 5)] * 3))


def test_counts_and_dice_by_hand():
    predicted = np.array([[0, 1, 1], [2, 2, 0]])
    true = np.array([[0, 1, 0], [2, 1, 1]])
    counts = overlap_counts(predicted, true, num_classes=3)
    assert counts.tolist() == [[1, 2, 3], [1, 2, 1], [0, 0, 0]]
    assert dice(counts)[:2].tolist() == [2 / 5, 2 / 3]
    assert np.isnan(dice(counts)[2])


def test_unknown_voxels_are_not_counted():
    predicted, true = np.ones((2, 3), int), np.array([[1, 0, UNKNOWN], [UNKNOWN, 1, 1]])
    assert overlap_counts(predicted, true, 1).tolist() == [[3, 4, 3]]


def test_masks_of_two_grids_are_refused():
    with pytest.raises(DataError, match="must be one grid"):
        overlap_counts(np.zeros((2, 3)), np.zeros((3, 2)), 1)


def test_distance_of_two_voxels_in_mm():
    one, other = np.zeros((4, 5, 6), bool), np.zeros((4, 5, 6), bool)
    one[0, 0, 0] = other[3, 4, 1] = True
    assert hausdorff_95(one, other, (2.0, 0.5, 3.0)) == pytest.approx(np.sqrt(6**2 + 2**2 + 3**2))


def test_a_shifted_cube():
    one, other = np.zeros((20, 20, 20), bool), np.zeros((20, 20, 20), bool)
    one[4:14, 4:14, 4:14] = True
    other[4:14, 4:14, 7:17] = True
    assert hausdorff_95(one, other, (1.0, 1.0, 1.0)) == 3
    assert hausdorff_95(one, other, (1.0, 1.0, 0.5)) == 1.5


def test_the_farthest_twentieth_does_not_count():
    """One stray voxel beside 400 of a plane that agree."""
    true = np.zeros((1, 20, 60), bool)
    true[:, :, :20] = True
    predicted = true.copy()
    predicted[0, 0, 59] = True
    assert hausdorff_95(predicted, true, (1.0, 1.0, 1.0)) == 0


def test_equal_masks_are_no_distance_apart_and_empty_ones_undefined():
    mask = np.zeros((3, 3, 3), bool)
    assert np.isnan(hausdorff_95(mask, mask, (1.0, 1.0, 1.0)))
    mask[1] = True
    assert hausdorff_95(mask, mask, (1.0, 1.0, 1.0)) == 0
    assert np.isnan(hausdorff_95(mask, ~mask & False, (1.0, 1.0, 1.0)))


def surface_mm(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Places of the voxels with a neighbour outside the mask, one by one."""
    places = []
    for index in np.argwhere(mask):
        for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
            beside = index + step
            if ((beside < 0) | (beside >= mask.shape)).any() or not mask[tuple(beside)]:
                places.append(index * spacing_mm)
                break
    return np.array(places)


@settings(max_examples=60, deadline=None)
@given(masks, st.data())
def test_agrees_with_all_pairs_of_surface_voxels(one: np.ndarray, data: st.DataObject):
    other = data.draw(arrays(np.bool_, one.shape))
    spacing_mm = (2.5, 0.7, 0.9)
    found = hausdorff_95(one, other, spacing_mm)
    if not one.any() or not other.any():
        assert np.isnan(found)
        return
    ours, theirs = surface_mm(one, spacing_mm), surface_mm(other, spacing_mm)
    distances = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
    expected = max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))
    assert found == pytest.approx(expected)


def test_segmentation_metric_over_two_batches():
    metric = build_metric(SegmentationHead(num_classes=2))
    logits = np.zeros((3, 2, 2))
    logits[1, 0] = 5  # the upper row is said to be class 1, the lower one background
    metric.update([{"mask_logits": logits}], [{"mask": np.array([[1, 1], [0, 2]], np.uint8)}])
    metric.update([{"mask_logits": logits}, {"mask_logits": logits}], [{"mask": np.ones((2, 2), np.uint8)}, {}])
    scores = metric.compute()
    assert scores == {"dice": pytest.approx(0.4), "dice_1": pytest.approx(2 * 4 / (4 + 6)), "dice_2": 0}
    assert metric.score_name in scores


def test_segmentation_metric_of_nothing():
    metric = build_metric(SegmentationHead())
    metric.update([{"mask_logits": np.zeros((2, 2, 2))}], [{"mask": np.zeros((2, 2), np.uint8)}])
    with pytest.raises(DataError, match="no mask of the split marks anything"):
        metric.compute()
