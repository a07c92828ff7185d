"""Boxes on slices become lesions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mp3d.lesions import link_boxes, reach_in_slices, without_parts

A, B = [10, 10, 30, 30], [60, 60, 80, 90]


def linked(*found, **options):
    """``found``: box, slice, score and, if not 1, label of each."""
    boxes, slices, scores, *labels = zip(*((*each, 1)[:4] for each in found), strict=True)
    return link_boxes(np.array(boxes, float), np.array(slices), np.array(scores), np.array(labels[0]), **options)


def test_overlapping_boxes_on_neighbouring_slices_are_one_lesion():
    (lesion,) = linked((A, 4, 0.5), ([12, 11, 33, 30], 5, 0.9), ([14, 12, 34, 31], 6, 0.7))
    assert lesion.members == (0, 1, 2)
    assert lesion.box.tolist() == [10, 10, 4, 34, 31, 6]
    assert (lesion.score, lesion.best) == (0.9, 1)
    assert lesion.size_mm((2.5, 0.5, 0.8)) == pytest.approx((24 * 0.8, 21 * 0.5, 3 * 2.5))


def test_two_places_are_two_lesions_best_first():
    first, second = linked((A, 4, 0.5), (B, 4, 0.9), (A, 5, 0.6))
    assert first.members == (1,)
    assert second.members == (0, 2)


def test_a_missing_slice_is_bridged_within_the_reach():
    assert len(linked((A, 4, 0.5), (A, 6, 0.6))) == 2
    assert len(linked((A, 4, 0.5), (A, 6, 0.6), reach=2)) == 1
    assert len(linked((A, 4, 0.5), (A, 7, 0.6), reach=2)) == 2


def test_a_lesion_has_one_box_on_a_slice_and_the_best_overlap_goes_on():
    near, nearer = [10, 10, 30, 26], [10, 10, 30, 29]
    lesions = linked((A, 1, 0.5), (near, 2, 0.95), (nearer, 2, 0.6))
    assert sorted(lesion.members for lesion in lesions) == [(0, 2), (1,)]


def test_classes_are_kept_apart_and_little_overlap_too():
    assert len(linked((A, 1, 0.5, 1), (A, 2, 0.5, 2))) == 2
    assert len(linked((A, 1, 0.5), ([22, 10, 42, 30], 2, 0.5))) == 2
    assert len(linked((A, 1, 0.5), ([22, 10, 42, 30], 2, 0.5), min_overlap=0.4)) == 1


def test_the_small_end_of_a_round_lesion_belongs_to_it():
    """A ball of radius 4.5 on slices 2.5 mm apart: the last cross-section has a twentieth of the area before it."""
    (lesion,) = linked(([18, 18, 22, 22], 0, 0.4), (A, 1, 0.9), ([17, 19, 21, 23], 2, 0.5))
    assert lesion.members == (0, 1, 2)


def test_nothing_is_no_lesion():
    assert link_boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), np.zeros(0, int)) == []


def test_a_part_of_a_lesion_is_no_other():
    whole, part, beside = [10, 10, 50, 50], [30, 30, 50, 50], [48, 10, 88, 50]
    found = linked(
        (whole, 3, 0.9), (whole, 4, 0.8), (part, 3, 0.4), (part, 4, 0.3), (beside, 3, 0.5), (part, 3, 0.2, 2)
    )
    kept = without_parts(found)
    assert [(lesion.score, lesion.label) for lesion in kept] == [(0.9, 1), (0.5, 1), (0.2, 2)]
    assert without_parts(kept) == kept


def test_the_reach_spans_one_missing_answer():
    assert reach_in_slices(5.0, 2.5) == 2
    assert reach_in_slices(2.5, 2.5) == 2
    assert reach_in_slices(1.0, 2.5) == 5
    assert reach_in_slices(1.25, None) == 2


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_the_order_of_boxes_changes_nothing(data):
    corner, side = st.integers(0, 12), st.integers(3, 10)
    box = st.tuples(corner, corner, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
    rows = data.draw(st.lists(st.tuples(box, st.integers(0, 5)), min_size=1, max_size=12, unique=True))
    scores = data.draw(st.permutations(range(len(rows))))
    order = data.draw(st.permutations(range(len(rows))))
    found = [(list(box), number, score / 20) for (box, number), score in zip(rows, scores, strict=True)]

    def shape(lesions):
        return [(lesion.box.tolist(), lesion.score, len(lesion.members)) for lesion in lesions]

    lesions = linked(*found, reach=2)
    assert shape(linked(*(found[i] for i in order), reach=2)) == shape(lesions)
    assert sorted(index for lesion in lesions for index in lesion.members) == list(range(len(found)))
    for lesion in lesions:
        numbers = [found[index][1] for index in lesion.members]
        assert numbers == sorted(set(numbers))
