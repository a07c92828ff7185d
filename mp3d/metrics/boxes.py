"""Intersection over union of boxes, in the two pixel conventions of the field."""

import numpy as np
from jaxtyping import Float


def box_iou(
    boxes: Float[np.ndarray, "*#batch 4"], others: Float[np.ndarray, "*#batch 4"], plus_one: bool = False
) -> Float[np.ndarray, "*batch"]:
    """Intersection over union of xyxy boxes; leading dimensions broadcast.

    ``box_iou(a[:, None], b[None])`` is the matrix of all pairs, ``box_iou(a, b)`` pairs them one to one.

    Args:
        plus_one: a width is ``x2 - x1 + 1`` (3DCE, MULAN, AlignShift); otherwise it is ``x2 - x1``.
    """
    extra = float(plus_one)
    top_left = np.maximum(boxes[..., :2], others[..., :2])
    bottom_right = np.minimum(boxes[..., 2:], others[..., 2:])
    intersection = np.prod(np.maximum(bottom_right - top_left + extra, 0), axis=-1)
    areas = [np.prod(each[..., 2:] - each[..., :2] + extra, axis=-1) for each in (boxes, others)]
    union = areas[0] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
