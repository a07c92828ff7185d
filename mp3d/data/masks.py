"""Contours to masks, masks to boxes.

The centre of a pixel lies at its index (x, y); as a half-open box it is ``[x, y, x + 1, y + 1]``.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from scipy import ndimage

from mp3d.data.series import Truth

MIN_COMPONENT_PIXELS = 4
"""Smaller components are specks at the rim of a lesion, not something to find on that slice."""


def boxes_from_mask(
    mask: UInt8[np.ndarray, "h w"], min_pixels: int = MIN_COMPONENT_PIXELS
) -> tuple[Float[np.ndarray, "b 4"], Int64[np.ndarray, " b"]]:
    """One box (float32, xyxy, pixels, half-open) with its label per 8-connected component of each label.

    Args:
        mask: labels of one slice, 0 where nothing is.
        min_pixels: components with fewer pixels give no box.
    """
    found = [(box, label) for box, label, _ in _components(mask, min_pixels)]
    boxes, labels = [box for box, _ in found], [label for _, label in found]
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


def truths_from_mask(
    mask: UInt8[np.ndarray, "d h w"], boxed: Collection[int] | None = None, min_pixels: int = MIN_COMPONENT_PIXELS
) -> tuple[Truth, ...]:
    """The truth of each slice of a volume that was searched: its mask, and boxes as :func:`boxes_from_mask` has them.

    The boxes of one 26-connected component of a label have the same instance; instances count from 1 by rising label,
    then by the component's first voxel. A component with fewer than ``min_pixels`` on every slice has no box.

    Args:
        boxed: labels that get boxes; None: all.
        min_pixels: pieces with fewer pixels on a slice give no box there.
    """
    components: dict[int, np.ndarray] = {}
    corners: dict[int, tuple[int, ...]] = {}
    before: dict[int, int] = {}
    total = 0
    for label, place in enumerate(ndimage.find_objects(mask), 1):
        if place is not None and (boxed is None or label in boxed):
            corners[label], before[label] = tuple(axis.start for axis in place), total
            components[label], count = ndimage.label(mask[place] == label, structure=np.ones((3, 3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
            total += count
    truths = []
    for z, plane in enumerate(mask):
        found = list(_components(np.where(np.isin(plane, list(components)), plane, 0), min_pixels))
        numbers = [
            before[label] + components[label][tuple(np.subtract((z, *pixel), corners[label]))]
            for _, label, pixel in found
        ]
        boxes = np.array([box for box, _, _ in found], np.float32).reshape(-1, 4)
        labels = np.array([label for _, label, _ in found], np.int64)
        truths.append(Truth(boxes, labels, plane, np.array(numbers, np.int64)))
    return tuple(truths)


def _components(
    mask: UInt8[np.ndarray, "h w"], min_pixels: int
) -> Iterator[tuple[tuple[int, int, int, int], int, tuple[int, int]]]:
    """Box, label and one pixel (row, column) of the 8-connected components that are large enough."""
    for label in np.unique(mask[mask > 0]).tolist():
        components, _ = ndimage.label(mask == label, structure=np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
        sizes = np.bincount(components.ravel())
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), 1):
            if sizes[number] >= min_pixels:
                first = columns.start + int(np.argmax(components[rows.start, columns] == number))
                yield (columns.start, rows.start, columns.stop, rows.stop), label, (rows.start, first)


def fill_contours(contours: Sequence[Float[np.ndarray, "_ 2"]], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Pixels whose centre lies inside the closed contours, by the even-odd rule over all of them.

    So a contour inside another is a hole, and contours beside one another add up. A centre exactly on an edge is inside
    where that is a left or upper edge: neighbouring contours neither overlap nor leave a gap.

    Args:
        contours: (x, y) points in pixel-centre index coordinates; the last point is joined to the first.
        shape: rows, columns.
    """
    height, width = shape
    crossings = np.zeros((height, width + 1), bool)  # parity changes from this column on
    for contour in contours:
        points = np.asarray(contour, np.float64)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y0 > y1:
                x0, y0, x1, y1 = x1, y1, x0, y0
            first, last = max(int(np.ceil(y0)), 0), min(int(np.ceil(y1)), height)  # rows with y0 <= y < y1
            if first < last:
                rows = np.arange(first, last)
                x = x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
                crossings[rows, np.clip(np.ceil(x), 0, width).astype(np.intp)] ^= True
    return np.logical_xor.accumulate(crossings[:, :width], axis=1)
