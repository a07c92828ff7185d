"""How well anchors meet boxes, and anchors that are fitted to them. Numpy only.

Two overlaps are told. The *centred* one gives every anchor the centre of the box, as tables in the literature do; it
depends on sizes and ratios alone. The *placed* one takes the anchors where the network has them, on the grid of their
level's stride, for boxes anywhere: a box lies up to half a stride off the nearest anchor, so an anchor of 20 pixels is
worth little on a grid of 64. Anchors are fitted to the placed overlap, and thereby to the five levels; a fit to the
centred one is free to put the sizes of most lesions on levels that are too coarse for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from mp3d.config import DetectionHead
from mp3d.recipes.lesions import HALF_OCTAVE_SIZES_PX

STRIDES = (4, 8, 16, 32, 64)
"""Pixels between the cells of P2..P6."""
NUM_PLACES = 32
"""Positions of a box against the grid over which the placed overlap is taken."""
MAX_FITTED_BOXES = 1000
"""Boxes that take part in a fit; of more, those evenly spread over the areas."""
STEPS = (0.2, 0.1, 0.05, 0.02, 0.01)
"""Changes that are tried, as shares of a size or ratio; the next one when none helps."""
SHIFTS = tuple(2 ** (eighth / 8) for eighth in range(-24, 25))
"""Factors on all sizes together that are tried first."""
FARTHEST = 2**0.5
"""How far a size then moves, as a factor: so the sizes still cover the range that they covered, for other boxes."""
MIN_GAIN = 3e-4
"""In mean overlap, for a change to be made."""
PLACES = np.arange(1, NUM_PLACES + 1)[:, None] * np.array([0.7548776662466927, 0.5698402909980532]) % 1 * STRIDES[-1]
"""x and y, in pixels from a cell of the coarsest level, of the box centres over which the placed overlap is taken: the
R2 sequence (Roberts 2018), any number of whose points cover the square evenly.
"""


@dataclass(frozen=True)
class AnchorSet:
    """Anchors of a region proposal network: every ratio at every size.

    Attributes:
        sizes_px: square roots of the areas, for each map.
        ratios: height over width.
        strides: pixels between the cells of each map.
    """

    sizes_px: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]
    strides: tuple[int, ...] = STRIDES

    @property
    def per_cell(self) -> tuple[int, ...]:
        """Anchors in a cell of each map."""
        return tuple(len(sizes) * len(self.ratios) for sizes in self.sizes_px)


THREE_RATIOS = (0.5, 1.0, 2.0)
PUBLISHED: Mapping[str, AnchorSet] = {
    "MP3D": AnchorSet(((16,), (32,), (64,), (128,), (256,)), THREE_RATIOS),  # mp3d_groupconv.py
    "MMDetection default": AnchorSet(((32,), (64,), (128,), (256,), (512,)), THREE_RATIOS),
    "MULAN": AnchorSet(((16, 24, 32, 48, 96),), THREE_RATIOS, (4,)),  # CADLab, MULAN's config.yml
    "A3D": AnchorSet(((16, 24, 32, 48, 96, 192),), THREE_RATIOS, (4,)),  # AlignShift, densenet_a3d.py
    "two sizes an octave": AnchorSet(HALF_OCTAVE_SIZES_PX, THREE_RATIOS),
}
"""What fitted anchors are compared with, at pictures of 512 pixels. MULAN and A3D have one map only."""


@dataclass(frozen=True)
class Coverage:
    """Over all boxes (and places), of the best overlap: its mean, and the shares that reach 0.5 and 0.7."""

    mean_iou: float
    at_50: float
    at_70: float


def anchors_of(head: DetectionHead) -> AnchorSet:
    return AnchorSet(head.anchor_sizes_px, head.anchor_ratios)


def coverage(iou: Float[np.ndarray, "..."]) -> Coverage:
    """Of at least one overlap."""
    return Coverage(float(iou.mean()), float((iou >= 0.5).mean()), float((iou >= 0.7).mean()))


def centred_iou(widths_heights: Shaped[np.ndarray, "b 2"], anchors: AnchorSet) -> Float[np.ndarray, "b"]:
    """Overlap of each box with the best anchor of the same centre."""
    boxes, nowhere = np.asarray(widths_heights, float)[:, None], np.zeros((1, 2))
    sizes = sorted({size for level in anchors.sizes_px for size in level})
    ious = [_iou(boxes, size, np.asarray(anchors.ratios), nowhere) for size in sizes]
    return np.max(ious, axis=0)[:, 0]


def placed_iou(widths_heights: Shaped[np.ndarray, "b 2"], anchors: AnchorSet) -> Float[np.ndarray, "b p"]:
    """Overlap of each box, at each of :data:`NUM_PLACES` positions against the grid, with the best anchor there is."""
    boxes = np.asarray(widths_heights, float)[:, None]
    best = np.zeros((len(boxes), NUM_PLACES))
    for sizes, stride in zip(anchors.sizes_px, anchors.strides, strict=True):
        offsets = _offsets(stride)
        for size in sizes:
            np.maximum(best, _iou(boxes, size, np.asarray(anchors.ratios), offsets), out=best)
    return best


def fit_anchors(widths_heights: Shaped[np.ndarray, "b 2"], start: AnchorSet) -> AnchorSet:
    """As many sizes and ratios as ``start`` has, moved to where the mean placed overlap is highest.

    First all sizes are shifted by one factor; then one size or ratio at a time is changed as long as that helps, in
    ever smaller steps. The same boxes and the same start give the same anchors. Few boxes, and boxes of few patients,
    say little about others: judge the fitted anchors on boxes that had no part in the fit.

    Args:
        widths_heights: of the boxes, in pixels of the picture that the network reads.

    Raises:
        ValueError: no box, or one without extent.
    """
    if len(widths_heights) == 0 or not (widths_heights > 0).all():
        raise ValueError(f"{len(widths_heights)} boxes; there must be one, and all must have an extent")
    boxes = evenly_spread(widths_heights, MAX_FITTED_BOXES)[:, None]
    offsets = [_offsets(stride) for stride, sizes in zip(start.strides, start.sizes_px, strict=True) for _ in sizes]
    sizes, ratios = np.concatenate(start.sizes_px).astype(float), np.array(start.ratios, float)

    def overlaps(sizes: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        return np.stack([_iou(boxes, size, ratios, at) for size, at in zip(sizes, offsets, strict=True)])

    sizes = max((sizes * shift for shift in SHIFTS), key=lambda shifted: overlaps(shifted, ratios).max(axis=0).mean())
    least, greatest = sizes / FARTHEST, sizes * FARTHEST
    per_size = overlaps(sizes, ratios)
    score = per_size.max(axis=0).mean()
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for index in range(len(sizes)):
                others = np.delete(per_size, index, axis=0).max(axis=0, initial=0)
                for size in np.clip(_around(sizes[index], step), least[index], greatest[index]):
                    changed = _iou(boxes, size, ratios, offsets[index])
                    gained = np.maximum(others, changed).mean()
                    if gained > score + MIN_GAIN:
                        sizes[index], per_size[index] = size, changed
                        score, moved = gained, True
            for index in range(len(ratios)):
                for ratio in _around(ratios[index], step):
                    changed_ratios = np.where(np.arange(len(ratios)) == index, ratio, ratios)
                    changed = overlaps(sizes, changed_ratios)
                    gained = changed.max(axis=0).mean()
                    if gained > score + MIN_GAIN:
                        ratios, per_size = changed_ratios, changed
                        score, moved = gained, True
    ends = np.cumsum([len(level) for level in start.sizes_px])[:-1]
    return AnchorSet(
        sizes_px=tuple(tuple(sorted(round(float(size), 1) for size in level)) for level in np.split(sizes, ends)),
        ratios=tuple(sorted(round(float(ratio), 2) for ratio in ratios)),
        strides=start.strides,
    )


def evenly_spread(widths_heights: Shaped[np.ndarray, "b 2"], at_most: int) -> Float[np.ndarray, "c 2"]:
    """At most so many boxes, ordered by area and evenly taken; which ones does not depend on the order given."""
    width, height = np.asarray(widths_heights, float).T
    order = np.lexsort((width, width * height))
    chosen = np.unique(np.linspace(0, len(order) - 1, min(at_most, len(order))).round().astype(int))
    return np.stack([width, height], axis=1)[order[chosen]]


def _around(value: float, step: float) -> tuple[float, float]:
    return value * (1 + step), value / (1 + step)


def _offsets(stride: int) -> Float[np.ndarray, "p 2"]:
    """Distances, in x and y, of box centres from the nearest cell; the same places for every level."""
    return np.abs(PLACES - np.round(PLACES / stride) * stride)


def _iou(
    boxes: Float[np.ndarray, "b #p 2"],
    size: float,
    ratios: Float[np.ndarray, "r"],
    offsets: Float[np.ndarray, "#p 2"],
) -> Float[np.ndarray, "b p"]:
    """Overlap of boxes, given by width and height, with anchors of one size whose centres are so far off: the best
    over the ratios.
    """
    best = np.zeros((len(boxes), max(boxes.shape[1], len(offsets))))
    for ratio in ratios:
        intersection = np.ones_like(best)
        for axis, extent in enumerate((size / np.sqrt(ratio), size * np.sqrt(ratio))):
            given = boxes[..., axis]
            overlap = np.minimum(np.minimum(given, extent), (given + extent) / 2 - offsets[:, axis])
            intersection *= np.maximum(overlap, 0)
        union = boxes.prod(axis=-1) + size * size - intersection
        np.maximum(best, intersection / union, out=best)
    return best
