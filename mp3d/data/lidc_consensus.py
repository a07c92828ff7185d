"""The readers' annotations to nodules: which are of one nodule, what its readers agree on, how they rate it.

Nodules have no identity across readers. Two annotations are of one nodule where their outlines come as near as one
slice spacing, and so is a chain of such annotations (pylidc's rule: Hancock and Magnan 2016). A group that holds two
annotations of one reader, or more than four, is ambiguous: for it alone the distance shrinks by a tenth, again and
again, until it falls into groups that are not. What is still one group at 0.1 mm counts as one nodule.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int32
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from mp3d.data.geometry import POSITION_TOLERANCE_MM
from mp3d.data.lidc_annotations import Annotation, Outline
from mp3d.data.masks import fill_contours
from mp3d.errors import Refusal

MAX_READERS = 4
SHRINK = 0.9
MIN_DISTANCE_MM = 0.1

MalignancyRule = Literal["median", "mean", "mode"]


@dataclass(frozen=True, eq=False)
class Nodule:
    """The annotations that are taken for one nodule."""

    annotations: tuple[Annotation, ...]

    @property
    def num_readers(self) -> int:
        """Readers who outlined it; where the annotations do not say whose they are, one each, at most four."""
        return len(_by_reader(self.annotations)) if _readers_known(self.annotations) else min(len(self.annotations), 4)

    @property
    def ambiguous(self) -> bool:
        return _ambiguous(self.annotations)

    @property
    def centre(self) -> tuple[float, float, float]:
        """Column, row and z in mm: the mean of the centres of the annotations' bounding boxes."""
        corners = [_extent(annotation) for annotation in self.annotations]
        x, y, z = np.mean(corners, axis=(0, 1))
        return float(x), float(y), float(z)

    def malignancy(self, rule: MalignancyRule) -> float | None:
        """Of the readers who outlined and rated it; two annotations of one reader count as one with their mean.

        None: nobody rated it.

        Args:
            rule: ``mode`` is the most frequent rating, or the mean of those that are equally frequent.
        """
        by_reader = [[a.malignancy for a in own if a.malignancy is not None] for own in _by_reader(self.annotations)]
        ratings = [float(np.mean(own)) for own in by_reader if own]
        if not ratings:
            return None
        match rule:
            case "median":
                return float(np.median(ratings))
            case "mean":
                return float(np.mean(ratings))
            case "mode":
                counts = Counter(ratings)
                return float(np.mean([rating for rating, n in counts.items() if n == max(counts.values())]))

    def consensus(
        self, slice_numbers: Mapping[float, int], shape: tuple[int, int], level: float
    ) -> dict[int, Bool[np.ndarray, "h w"]]:
        """Every slice that a reader outlined it on, with the pixels that ``level`` of its readers agree on.

        Args:
            slice_numbers: slice at each z in mm; outlines elsewhere are left out.
            shape: rows, columns.
            level: share of the readers who outlined the nodule; of two readers 0.5 is either.

        Raises:
            Refusal: ``BAD_ANNOTATION``: an outline is not on the image.
        """
        votes: dict[int, np.ndarray] = {}
        for own in _by_reader(self.annotations):
            drawn: dict[int, list[Outline]] = defaultdict(list)
            for outline in (outline for annotation in own for outline in annotation.outlines):
                if outline.z_mm in slice_numbers:
                    drawn[slice_numbers[outline.z_mm]].append(outline)
            for z, outlines in drawn.items():
                votes.setdefault(z, np.zeros(shape, np.int32))
                votes[z] += fill_outlines(outlines, shape)
        needed = max(math.ceil(level * self.num_readers - 1e-9), 1)
        return {z: count >= needed for z, count in sorted(votes.items())}


def find_nodules(annotations: Sequence[Annotation], spacing_mm: tuple[float, float, float]) -> list[Nodule]:
    """Group the annotations of one CT, by the rule above; ordered by z, row and column of their centres.

    Args:
        spacing_mm: z (between slices), y, x.
    """
    slice_spacing, y, x = spacing_mm
    points = [np.concatenate([_points_mm(o, y, x) for o in annotation.outlines]) for annotation in annotations]
    trees = [KDTree(cloud) for cloud in points]
    distances = np.zeros((len(points), len(points)))
    for i, tree in enumerate(trees):
        for j in range(i):
            distances[i, j] = distances[j, i] = tree.query(points[j])[0].min()
    # neighbouring slices may lie a little further apart than they should
    groups = _groups(range(len(points)), annotations, distances, slice_spacing + POSITION_TOLERANCE_MM)
    nodules = [Nodule(tuple(annotations[i] for i in group)) for group in groups]
    return sorted(nodules, key=lambda nodule: nodule.centre[::-1])


def fill_outlines(outlines: Sequence[Outline], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """What one reader's outlines on one slice enclose: the inclusions without the exclusions.

    An outline runs along pixels outside the nodule, so none of its own pixels is inside; that of an exclusion is cut
    out with what it encloses.

    Raises:
        Refusal: ``BAD_ANNOTATION``.
    """
    inside, cut = np.zeros(shape, bool), np.zeros(shape, bool)
    for outline in outlines:
        low, high = outline.points.min(axis=0), outline.points.max(axis=0)
        if (high >= shape[::-1]).any():
            told = f"an outline has a point at {tuple(high.tolist())} on an image of {shape[1]} x {shape[0]}"
            raise Refusal("BAD_ANNOTATION", f"{told} (columns, rows); annotations and images are not of one CT")
        points = outline.points - low
        width, height = (high - low + 1).tolist()
        enclosed = fill_contours([points], (height, width))
        columns, rows = _pixels_on(points).T
        enclosed[rows, columns] = not outline.inclusion
        part = (slice(low[1], low[1] + height), slice(low[0], low[0] + width))
        (inside if outline.inclusion else cut)[part] |= enclosed
    return inside & ~cut


def _groups(
    members: Sequence[int], annotations: Sequence[Annotation], distances: Float[np.ndarray, "n n"], limit_mm: float
) -> list[list[int]]:
    if not len(members):
        return []
    near = distances[np.ix_(members, members)] <= limit_mm
    count, labels = connected_components(near, directed=False)
    found: list[list[int]] = []
    for label in range(count):
        group = [members[i] for i in np.flatnonzero(labels == label).tolist()]
        if limit_mm * SHRINK >= MIN_DISTANCE_MM and _ambiguous([annotations[i] for i in group]):
            found += _groups(group, annotations, distances, limit_mm * SHRINK)
        else:
            found.append(group)
    return found


def _ambiguous(annotations: Sequence[Annotation]) -> bool:
    twice = _readers_known(annotations) and len(_by_reader(annotations)) < len(annotations)
    return twice or len(annotations) > MAX_READERS


def _readers_known(annotations: Sequence[Annotation]) -> bool:
    return all(annotation.reader is not None for annotation in annotations)


def _by_reader(annotations: Sequence[Annotation]) -> list[list[Annotation]]:
    """An annotation of an unknown reader stands alone."""
    if not _readers_known(annotations):
        return [[annotation] for annotation in annotations]
    readers = sorted({annotation.reader for annotation in annotations if annotation.reader is not None})
    return [[annotation for annotation in annotations if annotation.reader == reader] for reader in readers]


def _extent(annotation: Annotation) -> Float[np.ndarray, "2 3"]:
    points = np.concatenate([_points_mm(outline, 1, 1) for outline in annotation.outlines])
    return np.stack([points.min(axis=0), points.max(axis=0)])


def _points_mm(outline: Outline, y_spacing: float, x_spacing: float) -> Float[np.ndarray, "p 3"]:
    return np.column_stack([outline.points * (x_spacing, y_spacing), np.full(len(outline.points), outline.z_mm)])


def _pixels_on(points: Int32[np.ndarray, "p 2"]) -> Int32[np.ndarray, "n 2"]:
    """The pixels whose centre lies on the closed line through the points."""
    steps = np.roll(points, -1, axis=0) - points
    counts = np.gcd(*np.abs(steps).T).clip(1)
    lines = [
        start + np.outer(np.arange(n), step // n) for start, step, n in zip(points, steps, counts.tolist(), strict=True)
    ]
    return np.concatenate(lines)
