"""Readers' outlines to nodules: which are one, what is inside, how they are rated."""

import math
from itertools import permutations

import numpy as np
import pytest

from mp3d.data.lidc_annotations import Annotation, Outline
from mp3d.data.lidc_consensus import Nodule, fill_outlines, find_nodules
from tests.lidc_files import ring

SPACING = (2.5, 0.7, 0.7)


def outline(points, z: float = 0.0, inclusion: bool = True) -> Outline:
    return Outline(np.array(points, np.int32), z, "", inclusion)


def square(x: int, reader: int | None = None, z: float = 0.0, malignancy: int = 3, size: int = 6) -> Annotation:
    """What a reader outlined: ``size`` pixels each way from column x on; its outline is one pixel wider."""
    return Annotation(reader, (outline(ring(x, 20, x + size, 20 + size), z),), malignancy)


def columns(nodules: list[Nodule]) -> list[list[int]]:
    """First column of each annotation of each nodule."""
    return [[int(a.outlines[0].points[:, 0].min()) + 1 for a in nodule.annotations] for nodule in nodules]


def winds(point: tuple[int, int], polygon: np.ndarray) -> bool:
    """Strictly inside, by the parity of a ray that meets no corner; another way than the one under test."""
    x, y = point
    inside = False
    for (x0, y0), (x1, y1) in zip(polygon.tolist(), np.roll(polygon, -1, axis=0).tolist(), strict=True):
        cross = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)
        if cross == 0 and min(x0, x1) <= x <= max(x0, x1) and min(y0, y1) <= y <= max(y0, y1):
            return False  # on the outline
        slope = 1e-5  # the ray climbs a little, so that it passes between the corners
        if (y0 - y - slope * (x0 - x) > 0) != (y1 - y - slope * (x1 - x) > 0):
            t = (y - y0 + slope * (x0 - x)) / ((y1 - y0) - slope * (x1 - x0))
            inside ^= x0 + t * (x1 - x0) > x
    return inside


@pytest.mark.parametrize("seed", range(20))
def test_inside_is_strictly_inside(seed: int):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * math.pi, 15))
    radii = rng.uniform(3, 14, 15)
    points = np.rint(np.stack([16 + radii * np.cos(angles), 15 + radii * np.sin(angles)], axis=1)).astype(int)
    expected = [[winds((x, y), points) for x in range(33)] for y in range(31)]
    np.testing.assert_array_equal(fill_outlines([outline(points)], (31, 33)), expected)


def test_a_closed_and_an_open_outline_are_the_same():
    points = ring(3, 4, 9, 8)
    closed = fill_outlines([outline([*points, points[0]])], (12, 12))
    np.testing.assert_array_equal(closed, fill_outlines([outline(points)], (12, 12)))
    assert closed.sum() == 6 * 4


def test_lines_and_points_enclose_nothing():
    assert not fill_outlines([outline([(3, 3), (9, 3)]), outline([(1, 1), (1, 1), (2, 2)])], (12, 12)).any()


def test_holes_are_cut_from_all_outlines_of_a_slice():
    parts = [outline(ring(2, 2, 12, 12)), outline(ring(14, 2, 20, 12)), outline(ring(5, 5, 7, 7), inclusion=False)]
    for order in permutations(parts):
        inside = fill_outlines(order, (24, 24))
        assert inside.sum() == 100 + 60 - 16
        assert not inside[4:8, 4:8].any()


def test_distance_joins_and_chains():
    """3 pixels of 0.7 mm between outlines are within a slice spacing of 2.5 mm, 4 are not."""
    near = [square(10), square(10 + 10), square(10 + 21)]
    assert columns(find_nodules(near, SPACING)) == [[10, 20], [31]]
    assert columns(find_nodules([square(10), square(20), square(30)], SPACING)) == [[10, 20, 30]]


def test_neighbouring_slices_join_and_others_do_not():
    assert len(find_nodules([square(10), square(10, z=2.5)], SPACING)) == 1
    assert len(find_nodules([square(10), square(10, z=5.0)], SPACING)) == 2


def test_order_of_the_annotations_does_not_matter():
    annotations = [square(10, 0), square(12, 1), square(60, 0), square(61, 2), square(10, 3, z=50.0)]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 4, 1, 2, 0]):
        found = columns(find_nodules([annotations[i] for i in order], SPACING))
        assert [sorted(group) for group in found] == [[10, 12], [60, 61], [10]]
    assert find_nodules([], SPACING) == []


def test_two_annotations_of_one_reader_are_two_nodules():
    """Two readers see two neighbours; without their names they pass for one nodule of four readers."""
    marks = [(10, 0), (10, 1), (19, 0), (19, 1)]
    known = find_nodules([square(x, reader) for x, reader in marks], SPACING)
    assert columns(known) == [[10, 10], [19, 19]]
    assert [(nodule.num_readers, nodule.ambiguous) for nodule in known] == [(2, False), (2, False)]
    (unknown,) = find_nodules([square(x) for x, _ in marks], SPACING)
    assert unknown.num_readers == 4


def test_more_than_four_annotations_are_several_nodules():
    found = find_nodules([square(x) for x in (10, 10, 10, 19, 19)], SPACING)
    assert columns(found) == [[10, 10, 10], [19, 19]]


def test_only_the_ambiguous_group_is_divided():
    loose = [square(60, 2), square(70, 3)]  # 2.1 mm apart
    found = find_nodules([square(10, 0), square(10, 1), square(18, 0), square(18, 1), *loose], SPACING)
    assert columns(found) == [[10, 10], [18, 18], [60, 70]]


def test_what_cannot_be_divided_is_one_nodule():
    overlapping = [square(10, 0, malignancy=5), square(13, 0, malignancy=4), square(11, 1, malignancy=1)]
    (nodule,) = find_nodules(overlapping, SPACING)
    assert (nodule.ambiguous, nodule.num_readers) == (True, 2)
    assert nodule.malignancy("mean") == 2.75  # 4.5 and 1
    (unknown,) = find_nodules([square(10 + i) for i in range(5)], SPACING)
    assert (unknown.ambiguous, unknown.num_readers) == (True, 4)
    planes = nodule.consensus({0.0: 7}, (40, 40), 1.0)
    expected = np.zeros((40, 40), bool)
    expected[20:26, 11:17] = True  # both readers: the first with the sum of his two
    np.testing.assert_array_equal(planes[7], expected)


@pytest.mark.parametrize(
    ("ratings", "median", "mean", "mode"),
    [
        ((5,), 5, 5, 5),
        ((5, 5), 5, 5, 5),
        ((2, 4), 3, 3, 3),
        ((1, 3, 5), 3, 3, 3),
        ((1, 1, 4, 5), 2.5, 2.75, 1),
        ((2, 2, 3, 5), 2.5, 3, 2),
        ((1, 4, 4), 4, 3, 4),
    ],
)
def test_ratings_of_those_who_rated(ratings: tuple[int, ...], median: float, mean: float, mode: float):
    for readers in (range(len(ratings)), [None] * len(ratings)):
        nodule = Nodule(tuple(square(10, reader, malignancy=m) for reader, m in zip(readers, ratings, strict=True)))
        assert (nodule.malignancy("median"), nodule.malignancy("mean"), nodule.malignancy("mode")) == (
            median,
            mean,
            mode,
        )


@pytest.mark.parametrize("num_readers", [1, 2, 3, 4])
@pytest.mark.parametrize("level", [0.25, 0.5, 0.75, 1.0])
def test_share_of_the_readers(num_readers: int, level: float):
    """Each reader draws one pixel less on the right, so a column's votes can be counted from the right."""
    nodule = Nodule(tuple(square(10, reader, size=4 + reader) for reader in range(num_readers)))
    plane = nodule.consensus({0.0: 0}, (40, 40), level)[0]
    votes = np.array([sum(10 <= x < 14 + reader for reader in range(num_readers)) for x in range(40)])
    np.testing.assert_array_equal(plane[20], votes / num_readers >= level)


def test_slices_that_one_reader_drew_on_are_there_though_empty():
    nodule = Nodule((square(10, 0), square(10, 1), square(10, 2, z=2.5), square(30, 1, z=9.0)))
    planes = nodule.consensus({0.0: 4, 2.5: 5}, (40, 40), 0.5)
    assert {z: int(plane.sum()) for z, plane in planes.items()} == {4: 36, 5: 0}
