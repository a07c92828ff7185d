"""Annotated boxes to the truth of an image: what leaves the image is cut, what has no extent in it is dropped."""

from collections.abc import Sequence

import numpy as np

from mp3d.data.series import Truth


def truth_of_boxes(
    boxes: Sequence[Sequence[float]], labels: Sequence[int], rows: int, columns: int
) -> tuple[Truth, tuple[str, ...]]:
    """The truth of an image whose objects were all marked, and warning codes.

    An image whose boxes were all dropped is not one without objects: nothing is known of it.

    Args:
        boxes: xyxy, pixels, half-open, as the source says them; also not finite, empty or outside the image.
        labels: from 1; one for each box.
        rows: of the image.
        columns: of the image.
    """
    edges = np.array([columns, rows, columns, rows], np.float32)
    given = np.array(boxes, np.float32).reshape(-1, 4)
    inside = np.clip(given, 0, edges)
    kept = (inside[:, 0] < inside[:, 2]) & (inside[:, 1] < inside[:, 3])  # false for NaN
    warnings = ("BOX_CLIPPED",) if (inside != given)[kept].any() else ()
    if not kept.all():
        warnings += ("BOX_DROPPED",)
        if not kept.any():
            return Truth(), warnings
    return Truth(inside[kept], np.asarray(labels, np.int64)[kept]), warnings
