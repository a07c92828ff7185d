"""COCO's average precision against tables worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mp3d.errors import DataError
from mp3d.metrics.average_precision import average_precision


def boxes(*rows):
    return np.array(rows, dtype=float).reshape(-1, 4)


A, B, C = [0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 70, 80]
NOWHERE = [200, 200, 210, 210]


def scored(*pairs):
    return boxes(*(box for box, _ in pairs)), np.array([score for _, score in pairs], dtype=float)


def test_perfect_detections_score_one():
    assert average_precision([scored((A, 0.9), (B, 0.2)), scored((C, 0.5))], [boxes(A, B), boxes(C)]) == 1


def test_hand_computed_curve():
    # hit, false, hit, false, false, hit of 4 lesions:
    #   recall     1/4  1/4  2/4  2/4  2/4  3/4
    #   precision  1    1/2  2/3  1/2  2/5  1/2    best from there on: 1, 2/3, 2/3, 1/2, 1/2, 1/2
    # recall levels 0..0.25 (26) read 1, 0.26..0.50 (25) read 2/3, 0.51..0.75 (25) read 1/2, 0.76..1 (25) read 0
    detections = [scored((A, 0.9), (NOWHERE, 0.8), (B, 0.7)), scored((NOWHERE, 0.6), (NOWHERE, 0.5), (C, 0.4))]
    truths = [boxes(A, B), boxes(C, [100, 100, 120, 120])]
    assert average_precision(detections, truths) == pytest.approx((26 + 25 * 2 / 3 + 25 / 2) / 101)


def test_a_second_hit_is_a_false_positive():
    # hit, false (the same lesion again), hit of 2 lesions: 51 levels read 1, 50 read 2/3
    detections = [scored((A, 0.9), (A, 0.8), (B, 0.7))]
    assert average_precision(detections, [boxes(A, B)]) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_detection_takes_the_lesion_it_overlaps_most():
    # Both truths overlap the first box by more than 0.5; were it given the worse one, the second box would find none.
    near, nearer = [0, 0, 10, 10], [0, 0, 10, 13]
    first, second = [0, 0, 10, 14], [0, 0, 10, 7]
    assert average_precision([scored((first, 0.9), (second, 0.8))], [boxes(near, nearer)]) == 1


def test_a_taken_lesion_leaves_the_next_best():
    overlapping = [0, 0, 10, 9]
    assert average_precision([scored((A, 0.9), (A, 0.8))], [boxes(A, overlapping)]) == 1


def test_only_the_best_hundred_of_an_image_count():
    crowd = [(NOWHERE, 0.5 + i / 1000) for i in range(100)]
    assert average_precision([scored(*crowd, (A, 0.4))], [boxes(A)]) == 0
    assert average_precision([scored(*crowd[1:], (A, 0.4))], [boxes(A)]) == pytest.approx(1 / 100)


def test_overlap_at_the_threshold_is_enough():
    half = [0, 0, 10, 5]
    assert average_precision([scored((half, 0.9))], [boxes(A)]) == 1
    assert average_precision([scored((half, 0.9))], [boxes(A)], iou_threshold=0.51) == 0


def test_nothing_detected_and_nothing_true():
    assert average_precision([scored()], [boxes(A)]) == 0
    with pytest.raises(DataError, match="hold no true box"):
        average_precision([scored((A, 0.9))], [boxes()])


@given(st.permutations(range(6)))
def test_the_order_of_detections_changes_nothing(order):
    pairs = [(A, 0.9), (NOWHERE, 0.8), (B, 0.7), (A, 0.6), (NOWHERE, 0.5), (C, 0.4)]
    truths = [boxes(A, B, C)]
    assert average_precision([scored(*(pairs[i] for i in order))], truths) == average_precision(
        [scored(*pairs)], truths
    )
