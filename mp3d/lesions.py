"""Boxes on slices become lesions in space: this project's own rule, as the method finds lesions slice by slice.

Slices are gone through in ascending order. A box goes on with a lesion whose last box, on a slice not farther than the
reach, it overlaps: they share enough of the smaller of the two, because the ends of a round lesion are far smaller than
what follows. Pairs are formed from the largest IoU down, one box a slice and lesion. What is left begins a lesion. So a
lesion has at most one box on a slice, and no order of the boxes changes the result.

A detector often boxes a lesion twice on a slice, the whole of it and a part, which overlap too little for one to be
left out there. In space the part lies inside: of two such lesions :func:`without_parts` keeps the better one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mp3d.metrics.boxes import box_iobb, box_iou

LINK_OVERLAP = 0.5
"""Share of the smaller box that two boxes of one lesion have in common."""


@dataclass(frozen=True, eq=False)
class LinkedLesion:
    """Boxes of one lesion.

    Attributes:
        members: places of its boxes in what was linked, in order of their slices.
        box: ``x1 y1 z1 x2 y2 z2`` around them; x and y in pixels, half-open, z as slice numbers, both included.
        score: the highest of them.
        label: that of all of them.
        best: the place of the box with that score.
    """

    members: tuple[int, ...]
    box: Float[np.ndarray, "6"]
    score: float
    label: int
    best: int

    def size_mm(self, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """Extent along columns, rows and slices, each slice as thick as the spacing.

        Args:
            spacing_mm: z, y, x.
        """
        x1, y1, z1, x2, y2, z2 = self.box.tolist()
        z, y, x = spacing_mm
        return (x2 - x1) * x, (y2 - y1) * y, (z2 - z1 + 1) * z


def link_boxes(
    boxes: Float[np.ndarray, "n 4"],
    slices: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    reach: int = 1,
    min_overlap: float = LINK_OVERLAP,
) -> list[LinkedLesion]:
    """Group boxes on slices into lesions, best first.

    Args:
        boxes: xyxy in pixels.
        slices: number of the slice of each box.
        labels: boxes of different labels are never of one lesion.
        reach: farthest distance, in slices, of two boxes that follow each other in a lesion; 1: neighbours only.
        min_overlap: least share of the smaller one that two such boxes have in common.
    """
    lesions: list[list[int]] = []
    for number in np.unique(slices).tolist():
        here = np.flatnonzero(slices == number)
        near = [index for index, members in enumerate(lesions) if number - slices[members[-1]] <= reach]
        last = np.array([lesions[index][-1] for index in near], int)
        before, now = boxes[last][:, None].astype(float), boxes[here][None].astype(float)
        overlap = box_iou(before, now)
        linked = np.maximum(box_iobb(before, now), box_iobb(now, before)) >= min_overlap
        linked &= labels[last][:, None] == labels[here][None]
        # equal overlaps: the better box first, then the box itself, so that the order given decides nothing
        rows, columns = np.nonzero(linked)
        ties = boxes[here[columns]].T, boxes[last[rows]].T
        order = np.lexsort((*ties[1], *ties[0], -scores[last[rows]], -scores[here[columns]], -overlap[rows, columns]))
        taken: set[int] = set()
        going_on: set[int] = set()
        for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
            if row not in going_on and column not in taken:
                lesions[near[row]].append(int(here[column]))
                going_on.add(row)
                taken.add(column)
        lesions += [[index] for column, index in enumerate(here.tolist()) if column not in taken]
    made = [_lesion(members, boxes, slices, scores, labels) for members in lesions]
    return sorted(made, key=lambda lesion: (-lesion.score, tuple(lesion.box.tolist())))


def without_parts(ranked: Sequence[LinkedLesion], min_overlap: float = LINK_OVERLAP) -> list[LinkedLesion]:
    """A detector's lesions, best first, less those that share ``min_overlap`` of the smaller box with a better one of
    their label."""
    kept: list[LinkedLesion] = []
    for lesion in ranked:
        better = np.array([each.box for each in kept if each.label == lesion.label]).reshape(-1, 6)
        low, high = np.maximum(better[:, :3], lesion.box[:3]), np.minimum(better[:, 3:], lesion.box[3:])
        thick = np.array([0, 0, 1])  # both slices of a range are in it
        common = np.clip(high + thick - low, 0, None).prod(axis=1)
        smaller = np.minimum((better[:, 3:] + thick - better[:, :3]).prod(axis=1), _volume(lesion))
        if not (common >= min_overlap * smaller).any():
            kept.append(lesion)
    return kept


def _volume(lesion: LinkedLesion) -> float:
    """Pixels times slices."""
    x1, y1, z1, x2, y2, z2 = lesion.box.tolist()
    return (x2 - x1) * (y2 - y1) * (z2 - z1 + 1)


def reach_in_slices(slice_spacing_mm: float, grid_spacing_mm: float | None) -> int:
    """How many slices on a box may lie that goes on with a lesion, so that one answer in between may be missing.

    Args:
        slice_spacing_mm: of the series.
        grid_spacing_mm: of the grid whose positions are answered for; None: every slice.
    """
    return int(np.ceil(2 * max(slice_spacing_mm, grid_spacing_mm or 0.0) / slice_spacing_mm - 1e-6))


def _lesion(
    members: Sequence[int], boxes: np.ndarray, slices: np.ndarray, scores: np.ndarray, labels: np.ndarray
) -> LinkedLesion:
    own, numbers = boxes[list(members)], slices[list(members)]
    box = np.r_[own[:, :2].min(0), numbers.min(), own[:, 2:].max(0), numbers.max()].astype(float)
    best = max(members, key=lambda index: scores[index])
    return LinkedLesion(tuple(members), box, float(scores[best]), int(labels[best]), best)
