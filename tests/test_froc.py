"""The FROC rule against hand-computed tables, and what must not change it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d

from mp3d.errors import DataError
from mp3d.metrics.boxes import box_iou
from mp3d.metrics.froc import froc
from mp3d.metrics.protocols import MP3D_PORT, THREE_DCE_MULAN, FrocProtocol


def boxes(*rows):
    return np.array(rows, dtype=float).reshape(-1, 4)


def scored(*rows):
    """One image's detections from ``(x1, y1, x2, y2, score)``."""
    table = np.array(rows, dtype=float).reshape(-1, 5)
    return table[:, :4], table[:, 4]


TWO_IMAGES = [boxes([10, 10, 30, 30], [12, 12, 32, 32]), boxes([50, 50, 70, 70])]


def test_one_detection_may_find_several_lesions():
    result = froc([scored([11, 11, 31, 31, 0.9]), scored()], TWO_IMAGES)
    assert result.sensitivity == pytest.approx([2 / 3])
    assert result.fps_per_image.tolist() == [0]
    assert (result.num_images, result.num_lesions) == (2, 3)


def test_a_second_hit_on_a_found_lesion_is_neither_hit_nor_false_positive():
    detections = [scored([10, 10, 30, 30, 0.9], [10, 10, 30, 30, 0.8]), scored([0, 0, 5, 5, 0.7])]
    result = froc(detections, TWO_IMAGES)
    assert result.sensitivity == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert result.fps_per_image == pytest.approx([0, 0, 0.5])
    assert result.thresholds.tolist() == [0.9, 0.8, 0.7]


def test_detections_of_all_images_are_ranked_together():
    detections = [
        scored([100, 100, 120, 120, 0.3]),
        scored([0, 0, 5, 5, 0.9], [50, 50, 70, 70, 0.6], [0, 0, 9, 9, 0.1]),
    ]
    result = froc(detections, [boxes([100, 100, 120, 120]), boxes([50, 50, 70, 70])])
    assert result.fps_per_image == pytest.approx([0.5, 0.5, 0.5, 1.0])
    assert result.sensitivity == pytest.approx([0, 0.5, 1, 1])
    assert result.sensitivity_at == {0.5: 1, 1: 1, 2: 1, 4: 1, 8: 1, 16: 1}
    assert result.last_fps_per_image == 1.0


def test_a_hit_in_another_image_does_not_count():
    result = froc([scored([50, 50, 70, 70, 0.9]), scored()], TWO_IMAGES)
    assert result.sensitivity.tolist() == [0]
    assert result.fps_per_image.tolist() == [0.5]


@pytest.mark.parametrize(("protocol", "found"), [(THREE_DCE_MULAN, True), (MP3D_PORT, False)])
def test_the_extra_pixel_decides_a_borderline_overlap(protocol: FrocProtocol, found: bool):
    result = froc([scored([10, 10, 19, 19, 0.9])], [boxes([10, 10, 14, 19])], protocol)
    assert result.mean_sensitivity == float(found)


def test_overlap_of_the_two_conventions():
    one, other = boxes([10, 10, 19, 19]), boxes([10, 10, 14, 19])
    assert box_iou(one, other, plus_one=True) == pytest.approx([0.5])
    assert box_iou(one, other) == pytest.approx([4 / 9])
    assert box_iou(boxes([0, 0, 0, 0]), boxes([0, 0, 0, 0])).tolist() == [0]
    assert box_iou(TWO_IMAGES[0][:, None], TWO_IMAGES[0][None]) == pytest.approx(
        np.array([[1, 324 / 476], [324 / 476, 1]])
    )


def test_sensitivity_between_two_points_is_linear():
    # One image, hit at 0 false positives (1/2), then four false positives and the second hit.
    miss = [[200 + 10 * i, 0, 205 + 10 * i, 5, 0.8 - 0.1 * i] for i in range(4)]
    result = froc(
        [scored([0, 0, 10, 10, 0.9], *miss, [50, 50, 70, 70, 0.1])], [boxes([0, 0, 10, 10], [50, 50, 70, 70])]
    )
    assert result.fps_per_image.tolist() == [0, 1, 2, 3, 4, 4]
    assert result.sensitivity_at == {0.5: 0.5, 1: 0.5, 2: 0.5, 4: 1, 8: 1, 16: 1}
    assert result.mean_sensitivity == pytest.approx(2.5 / 4)


def test_before_its_first_point_the_curve_is_zero():
    result = froc([scored([0, 0, 5, 5, 0.9], [10, 10, 30, 30, 0.8])], [boxes([10, 10, 30, 30])])
    assert result.sensitivity_at[0.5] == 0
    assert result.sensitivity_at[1] == 1
    assert math.isnan(result.threshold_at[0.5])
    assert result.threshold_at[1] == 0.8


def test_equal_scores_share_a_threshold():
    # Keeping 0.5 keeps both false positives of one image: two per image, not one.
    result = froc([scored([10, 10, 30, 30, 0.9], [0, 0, 5, 5, 0.5], [90, 90, 95, 95, 0.5])], [boxes([10, 10, 30, 30])])
    assert result.threshold_at[1] == 0.9
    assert result.threshold_at[2] == 0.5


def test_no_detection_finds_nothing():
    result = froc([scored(), scored()], TWO_IMAGES)
    assert result.mean_sensitivity == 0
    assert result.last_fps_per_image == 0
    assert all(math.isnan(threshold) for threshold in result.threshold_at.values())


def test_an_image_without_lesions_counts_in_the_denominator_of_false_positives():
    result = froc([scored([10, 10, 30, 30, 0.9]), scored([0, 0, 5, 5, 0.8])], [boxes([10, 10, 30, 30]), boxes()])
    assert result.fps_per_image.tolist() == [0, 0.5]
    assert result.sensitivity.tolist() == [1, 1]


def test_sensitivity_without_truth_is_refused():
    with pytest.raises(DataError, match="2 images hold no true box"):
        froc([scored([0, 0, 5, 5, 0.9]), scored()], [boxes(), boxes()])
    with pytest.raises(DataError, match="no image to evaluate"):
        froc([], [])


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="diverged"):
        froc([scored([0, 0, 5, 5, float("nan")])], [boxes([0, 0, 5, 5])])


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="1 lists of detections for 2 images"):
        froc([scored()], TWO_IMAGES)
    with pytest.raises(ValueError, match="one box and one score"):
        froc([(boxes([0, 0, 5, 5]), np.array([0.5, 0.6]))], [boxes([0, 0, 5, 5])])


def test_the_mean_is_taken_over_quoted_points_only():
    with pytest.raises(ValueError, match="mean_over"):
        replace(MP3D_PORT, fps_per_image=(1.0, 2.0), mean_over=(1.0, 4.0))


def slow_froc(detections, truths, protocol):
    """The authors' loop, one detection after the other."""
    pooled = [
        (score, i, box)
        for i, (image_boxes, scores) in enumerate(detections)
        for box, score in zip(image_boxes, scores, strict=True)
    ]
    found = [set() for _ in truths]
    num_false, fps, sensitivity = 0, [], []
    for _, i, box in sorted(pooled, key=lambda each: -each[0]):
        overlaps = [j for j, true_box in enumerate(truths[i]) if protocol.overlap(box, true_box) >= protocol.threshold]
        num_false += not overlaps
        found[i].update(overlaps)
        fps.append(num_false / len(truths))
        sensitivity.append(sum(map(len, found)) / sum(map(len, truths)))
    return fps, sensitivity


@st.composite
def made_images(draw):
    """A few images with a few boxes each on a coarse grid, so that overlaps are common; no two scores are equal."""
    corner, side = st.integers(0, 12), st.integers(2, 8)
    box = st.tuples(corner, corner, side, side).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
    num_images = draw(st.integers(1, 4))
    truths = [boxes(*draw(st.lists(box, max_size=3))) for _ in range(num_images)]
    truths[0] = boxes(*truths[0], draw(box))
    found = [boxes(*draw(st.lists(box, max_size=6))) for _ in range(num_images)]
    ranks = draw(st.permutations(range(sum(map(len, found)))))
    scores = np.split(np.array(ranks, dtype=float) / 30, np.cumsum([len(each) for each in found])[:-1])
    return list(zip(found, scores, strict=True)), truths, draw(st.randoms(use_true_random=False))


@given(made_images())
@settings(max_examples=150, deadline=None)
def test_the_order_of_images_and_boxes_changes_nothing_and_the_loop_agrees(made):
    detections, truths, random = made
    result = froc(detections, truths)
    fps, sensitivity = slow_froc(detections, truths, MP3D_PORT)
    assert result.fps_per_image == pytest.approx(fps)
    assert result.sensitivity == pytest.approx(sensitivity)

    images = list(range(len(truths)))
    random.shuffle(images)

    def shuffled(*arrays):
        order = list(range(len(arrays[0])))
        random.shuffle(order)
        return tuple(array[order] for array in arrays)

    again = froc([shuffled(*detections[i]) for i in images], [shuffled(truths[i])[0] for i in images])
    np.testing.assert_array_equal(again.fps_per_image, result.fps_per_image)
    np.testing.assert_array_equal(again.sensitivity, result.sensitivity)
    assert again.sensitivity_at == result.sensitivity_at


@given(made_images())
@settings(max_examples=100, deadline=None)
def test_inside_the_curve_it_is_read_as_scipy_reads_it(made):
    detections, truths, _ = made
    result = froc(detections, truths)
    for fps in MP3D_PORT.fps_per_image:
        if len(result.fps_per_image) > 1 and result.fps_per_image[0] <= fps <= result.last_fps_per_image:
            assert result.sensitivity_at[fps] == float(interp1d(result.fps_per_image, result.sensitivity)(fps))


@given(made_images())
@settings(max_examples=100, deadline=None)
def test_reporting_from_a_threshold_on_keeps_within_its_false_positives(made):
    detections, truths, _ = made
    for fps, threshold in froc(detections, truths).threshold_at.items():
        if not math.isnan(threshold):
            kept = [
                (image_boxes[scores >= threshold], scores[scores >= threshold]) for image_boxes, scores in detections
            ]
            assert froc(kept, truths).last_fps_per_image <= fps
