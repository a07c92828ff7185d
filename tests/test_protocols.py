"""Every FROC protocol against its authors' loop written out, hand-made cases, and what must not change a result."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mp3d.errors import DataError
from mp3d.metrics.boxes import box_iobb, box_iobb_plus_one, box_iou, centre_closeness
from mp3d.metrics.froc import block_ends, froc, match
from mp3d.metrics.froc_replicates import froc_intervals
from mp3d.metrics.protocols import (
    IOBB,
    LENS_3D,
    LUNA16,
    MP3D_PORT,
    NNDETECTION_10,
    NNDETECTION_50,
    PROTOCOLS,
    THREE_DCE_MULAN,
)
from tests.test_froc import boxes, made_images, scored, slow_froc

LESION = [10, 10, 30, 30]


def one_image(*detections, true=(LESION,), protocol=MP3D_PORT):
    return froc([scored(*detections)], [boxes(*true)], protocol)


def test_there_are_six_protocols_of_slices():
    assert [protocol.name for protocol in PROTOCOLS] == [
        "MP3D port", "3DCE/MULAN", "IoBB", "LUNA16", "nnDetection, IoU 0.1", "nnDetection, IoU 0.5",
    ]  # fmt: skip
    assert all(protocol.source for protocol in PROTOCOLS)


def test_a_duplicate_is_ignored_or_a_false_positive():
    twice = [[*LESION, 0.9], [*LESION, 0.8]]
    assert one_image(*twice, protocol=MP3D_PORT).last_fps_per_image == 0
    assert one_image(*twice, protocol=LUNA16).last_fps_per_image == 0
    assert one_image(*twice, protocol=NNDETECTION_50).last_fps_per_image == 1


def test_one_box_over_two_lesions_finds_both_or_one():
    true = [[10, 10, 30, 30], [12, 12, 32, 32]]
    over_both = [11, 11, 31, 31, 0.9]
    assert one_image(over_both, true=true).sensitivity.tolist() == [1]
    assert one_image(over_both, true=true, protocol=NNDETECTION_50).sensitivity.tolist() == [0.5]


def test_a_small_box_inside_a_lesion_is_a_hit_by_iobb_and_by_its_centre():
    inside = [18, 18, 22, 22, 0.9]
    found = {p.name: one_image(inside, protocol=p).sensitivity[-1] for p in PROTOCOLS}
    assert found == {
        "MP3D port": 0, "3DCE/MULAN": 0, "IoBB": 1, "LUNA16": 1, "nnDetection, IoU 0.1": 0, "nnDetection, IoU 0.5": 0,
    }  # fmt: skip


def test_a_large_box_around_a_lesion_is_a_hit_by_its_centre_only():
    assert one_image([0, 0, 60, 60, 0.9], true=[[10, 10, 50, 50]], protocol=IOBB).sensitivity[-1] == 0
    assert one_image([0, 0, 60, 60, 0.9], true=[[10, 10, 50, 50]], protocol=LUNA16).sensitivity[-1] == 1


def test_a_centre_on_the_radius_is_outside():
    assert one_image([20, 10, 40, 30, 0.9], protocol=LUNA16).sensitivity[-1] == 0  # 10 mm away, the radius is 10
    assert one_image([19.9, 10, 39.9, 30, 0.9], protocol=LUNA16).sensitivity[-1] == 1


def test_equal_scores_enter_with_their_false_positives_first_or_together():
    """A hit and two false positives of one score: together the curve goes straight from the origin to (2, 1)."""
    tie = [[*LESION, 0.5], [50, 50, 60, 60, 0.5], [70, 70, 80, 80, 0.5]]
    assert (one_image(*tie).sensitivity_at[1], one_image(*tie).sensitivity_at[2]) == (0, 1)
    assert one_image(*tie, protocol=NNDETECTION_50).sensitivity_at[1] == pytest.approx(0.5)
    assert one_image(*tie, protocol=NNDETECTION_50).sensitivity_at[0.5] == pytest.approx(0.25)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_no_detections_and_no_lesions(protocol):
    silent = one_image(protocol=protocol)
    assert silent.mean_sensitivity == 0
    assert all(np.isnan(threshold) for threshold in silent.threshold_at.values())
    with pytest.raises(DataError, match="hold no true box"):
        one_image([*LESION, 0.9], true=(), protocol=protocol)


def slow_one_to_one(detections, truths, threshold):
    """nnDetection's ``_matching_single_image_single_class``, then scikit-learn's blocks of equal scores."""
    pooled = []
    for (image_boxes, scores), true_boxes in zip(detections, truths, strict=True):
        free = list(range(len(true_boxes)))
        for index in np.argsort(-scores, kind="mergesort"):
            best, best_iou = None, threshold
            for gt in free:
                iou = float(box_iou(image_boxes[index], true_boxes[gt]))
                if iou >= best_iou:
                    best, best_iou = gt, iou
            if best is not None:
                free.remove(best)
            pooled.append((float(scores[index]), best is not None))
    fps, found = [0.0], [0.0]
    for score in sorted({score for score, _ in pooled}, reverse=True):
        kept = [hit for each, hit in pooled if each >= score]
        fps.append(kept.count(False) / len(truths))
        found.append(kept.count(True) / sum(map(len, truths)))
    return fps, found


@given(made_images())
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("protocol", [NNDETECTION_10, NNDETECTION_50], ids=lambda protocol: protocol.name)
def test_one_to_one_equals_the_loop(protocol, made):
    detections, truths, _ = made
    fps, found = slow_one_to_one(detections, truths, protocol.threshold)
    expected = {rate: float(np.interp(rate, fps, found)) for rate in protocol.fps_per_image}
    assert froc(detections, truths, protocol).sensitivity_at == pytest.approx(expected, abs=1e-12)


@given(made_images())
@settings(max_examples=100, deadline=None)
def test_luna16_equals_the_loop(made):
    """``noduleCADEvaluationLUNA16.py``: per nodule the candidates within the radius; the best of them stands for it."""
    detections, truths, _ = made
    hits, alarms = [], []
    for (image_boxes, scores), true_boxes in zip(detections, truths, strict=True):
        left = set(range(len(scores)))
        centres = (image_boxes[:, :2] + image_boxes[:, 2:]) / 2
        for x1, y1, x2, y2 in true_boxes:
            radius = max(x2 - x1, y2 - y1) / 2
            distance = ((centres - [(x1 + x2) / 2, (y1 + y2) / 2]) ** 2).sum(1)
            inside = [i for i in range(len(scores)) if distance[i] < radius**2]
            left -= set(inside)
            hits.append(max((scores[i] for i in inside), default=None))
        alarms += [scores[i] for i in left]
    found = [score for score in hits if score is not None]
    points = sorted({*found, *alarms}, reverse=True)
    fps = [0.0, *(sum(alarm >= at for alarm in alarms) / len(truths) for at in points)]
    sensitivity = [0.0, *(sum(score >= at for score in found) / len(hits) for at in points)]
    expected = {rate: float(np.interp(rate, fps, sensitivity)) for rate in LUNA16.fps_per_image}
    assert froc(detections, truths, LUNA16).sensitivity_at == pytest.approx(expected, abs=1e-12)


@given(made_images())
@settings(max_examples=60, deadline=None)
def test_no_protocol_minds_the_order_of_images_and_boxes(made):
    detections, truths, random = made
    images = list(range(len(truths)))
    random.shuffle(images)

    def shuffled(*arrays):
        order = list(range(len(arrays[0])))
        random.shuffle(order)
        return tuple(array[order] for array in arrays)

    mixed = [shuffled(*detections[i]) for i in images], [shuffled(truths[i])[0] for i in images]
    for protocol in PROTOCOLS:
        before, after = froc(detections, truths, protocol), froc(*mixed, protocol)
        assert after.sensitivity_at == before.sensitivity_at
        assert after.threshold_at == pytest.approx(before.threshold_at, nan_ok=True)


def test_a_box_between_two_lesions_takes_the_same_one_in_whatever_order_they_are_listed():
    lesions = [[10, 10, 30, 30], [14, 10, 34, 30]]
    between, beyond = [12, 10, 32, 30, 0.9], [17, 10, 37, 30, 0.8]
    for true in (lesions, lesions[::-1]):
        assert one_image(between, beyond, true=true, protocol=NNDETECTION_50).sensitivity[-1] == 0.5


@st.composite
def tied_images(draw):
    """As :func:`made_images`, but with two scores only, and patients of two images each."""
    detections, truths, random = draw(made_images())
    level = st.sampled_from([0.25, 0.5])
    tied = [(found, np.array([draw(level) for _ in scores])) for found, scores in detections]
    return tied, truths, random


def reordered(random, detections, truths):
    """The same images and detections in another order, and the order of the images."""
    images = list(range(len(truths)))
    random.shuffle(images)
    found, true = [], []
    for i in images:
        order = list(range(len(detections[i][1])))
        random.shuffle(order)
        found.append((detections[i][0][order], detections[i][1][order]))
        rows = list(range(len(truths[i])))
        random.shuffle(rows)
        true.append(truths[i][rows])
    return found, true, images


@given(tied_images())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("protocol", [*PROTOCOLS, LENS_3D], ids=lambda protocol: protocol.name)
def test_the_order_of_boxes_with_equal_scores_changes_nothing(protocol, made):
    detections, truths, random = made
    if protocol is LENS_3D:
        detections = [(boxes[:, [0, 1, 1, 2, 3, 3]], scores) for boxes, scores in detections]
        truths = [boxes[:, [0, 1, 1, 2, 3, 3]] for boxes in truths]
    found, true, images = reordered(random, detections, truths)
    before, after = froc(detections, truths, protocol), froc(found, true, protocol)
    np.testing.assert_array_equal(after.fps_per_image, before.fps_per_image)
    np.testing.assert_array_equal(after.sensitivity, before.sensitivity)
    np.testing.assert_array_equal(after.thresholds, before.thresholds)
    assert after.sensitivity_at == before.sensitivity_at
    assert after.threshold_at == pytest.approx(before.threshold_at, nan_ok=True)
    patients = [f"patient {i // 2}" for i in range(len(truths))]
    first, second = (
        froc_intervals(match(*of, protocol), names, protocol, num_replicates=100)
        for of, names in (((detections, truths), patients), ((found, true), [patients[i] for i in images]))
    )
    assert np.array(second.mean_sensitivity) == pytest.approx(np.array(first.mean_sensitivity), nan_ok=True)


@given(tied_images())
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("protocol", [MP3D_PORT, THREE_DCE_MULAN, IOBB], ids=lambda protocol: protocol.name)
def test_at_every_score_there_is_the_curve_is_that_of_the_authors_loop(protocol, made):
    """In whatever order the loop takes equal scores; and between them no lesion is found."""
    detections, truths, random = made
    result = froc(detections, truths, protocol)
    found, true, _ = reordered(random, detections, truths)
    fps, sensitivity = slow_froc(found, true, protocol)
    ends = block_ends(result.thresholds)
    assert result.fps_per_image[ends] == pytest.approx(np.array(fps)[ends])
    assert result.sensitivity[ends] == pytest.approx(np.array(sensitivity)[ends])
    assert set(np.flatnonzero(np.diff(result.sensitivity, prepend=0)).tolist()) <= set(ends.tolist())


def test_of_equal_scores_the_box_that_fits_best_takes_the_lesion_first():
    """One to one: the better box overlaps both lesions (0.91, 0.69), the other only one (0.6), which then is taken."""
    lesions = [[0, 0, 10, 10], [0, 0, 10, 16]]
    better, other = [0, 0, 10, 11, 0.5], [0, 0, 10, 6, 0.5]
    for both in ([better, other], [other, better]):
        result = one_image(*both, true=lesions, protocol=NNDETECTION_50)
        assert (result.sensitivity[-1], result.last_fps_per_image) == (0.5, 1)


def test_overlaps_in_space():
    box = np.array([[0, 0, 0, 9, 9, 9.0]])
    half = np.array([[0, 0, 5, 9, 9, 14.0]])
    assert box_iobb_plus_one(box, half).tolist() == [0.5]  # ten slices each, five in common
    assert box_iobb(box, half).tolist() == [pytest.approx(4 / 9)]
    assert box_iou(box, half, plus_one=True).tolist() == [pytest.approx(1 / 3)]
    assert centre_closeness(box, half).tolist() == [0]
    assert centre_closeness(box, box).tolist() == [1]


def test_lens_judges_sub_volumes():
    """Two sub-volumes; a flat box inside a lesion is a hit, one beside it a false positive."""
    true = [np.array([[10, 10, 3, 29, 29, 8.0]]), np.zeros((0, 6))]
    found = [
        (np.array([[12, 12, 5, 20, 20, 5.0]]), np.array([0.9])),
        (np.array([[12, 12, 5, 20, 20, 5.0]]), np.array([0.8])),
    ]
    result = froc(found, true, LENS_3D)
    assert result.sensitivity.tolist() == [1, 1]
    assert result.fps_per_image.tolist() == [0, 0.5]
    assert LENS_3D.mean_over == (0.125, 0.25, 0.5, 1, 2, 4, 8)


def test_the_extra_pixel_belongs_to_one_protocol():
    borderline = [10, 10, 19, 19, 0.9]
    true = [[10, 10, 14, 19]]
    assert one_image(borderline, true=true, protocol=THREE_DCE_MULAN).mean_sensitivity == 1
    assert one_image(borderline, true=true, protocol=MP3D_PORT).mean_sensitivity == 0
    assert one_image(borderline, true=true, protocol=replace(MP3D_PORT, threshold=4 / 9)).mean_sensitivity == 1
