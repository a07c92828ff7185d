"""Contours to masks, masks to boxes.

The centre of a pixel lies at its index (x, y); as a half-open box it is ``[x, y, x + 1, y + 1]``.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from scipy import ndimage

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
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for label in np.unique(mask[mask > 0]).tolist():
        components, _ = ndimage.label(mask == label, structure=np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
        sizes = np.bincount(components.ravel())
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), 1):
            if sizes[number] >= min_pixels:
                boxes.append((columns.start, rows.start, columns.stop, rows.stop))
                labels.append(label)
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


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
