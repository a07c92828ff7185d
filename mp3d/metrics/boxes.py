"""How much a found box has in common with a true one, by each rule of the field; in the plane or in space.

A box is its lower corner, then its upper one: xyxy or xyzxyz. Leading dimensions broadcast: ``box_iou(a[:, None],
b[None])`` is the matrix of all pairs, ``box_iou(a, b)`` pairs them one to one.
"""

import numpy as np
from jaxtyping import Float

Boxes = Float[np.ndarray, "*#batch corners"]
Shares = Float[np.ndarray, "*batch"]


def box_iou(boxes: Boxes, others: Boxes, plus_one: bool = False) -> Shares:
    """Intersection over union.

    Args:
        plus_one: a side is ``x2 - x1 + 1`` (3DCE, MULAN, AlignShift); otherwise it is ``x2 - x1``.
    """
    intersection = _intersection(boxes, others, plus_one)
    union = _size(boxes, plus_one) + _size(others, plus_one) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def box_iou_plus_one(boxes: Boxes, others: Boxes) -> Shares:
    """:func:`box_iou` with one more pixel on every side (3DCE, MULAN, AlignShift)."""
    return box_iou(boxes, others, plus_one=True)


def box_iobb(boxes: Boxes, others: Boxes, plus_one: bool = False) -> Shares:
    """Intersection over the found box, ``boxes``: small boxes on a part of a lesion hit it (Yan et al., DeepLesion,
    JMI 2018).
    """
    intersection = _intersection(boxes, others, plus_one)
    size = np.broadcast_to(_size(boxes, plus_one), intersection.shape)
    return np.divide(intersection, size, out=np.zeros_like(intersection), where=size > 0)


def box_iobb_plus_one(boxes: Boxes, others: Boxes) -> Shares:
    """:func:`box_iobb` with one more on every side, as inclusive numbers need (``general_detection_evaluation.py``)."""
    return box_iobb(boxes, others, plus_one=True)


def centre_closeness(boxes: Boxes, others: Boxes) -> Shares:
    """1 where the centre of the found box is that of the true one, 0 from the true radius on, which is half its longest
    side (LUNA16 knows spheres). Both in mm, where pixels are not square.
    """
    half = boxes.shape[-1] // 2
    offset = (boxes[..., :half] + boxes[..., half:] - others[..., :half] - others[..., half:]) / 2
    distance = np.linalg.norm(offset, axis=-1)
    radius = np.broadcast_to((others[..., half:] - others[..., :half]).max(axis=-1) / 2, distance.shape)
    away = np.divide(distance, radius, out=np.ones_like(distance), where=radius > 0)
    return np.maximum(1 - away, 0)


def _intersection(boxes: Boxes, others: Boxes, plus_one: bool) -> Shares:
    half = boxes.shape[-1] // 2
    lower = np.maximum(boxes[..., :half], others[..., :half])
    upper = np.minimum(boxes[..., half:], others[..., half:])
    return np.prod(np.maximum(upper - lower + float(plus_one), 0), axis=-1)


def _size(boxes: Boxes, plus_one: bool) -> Shares:
    half = boxes.shape[-1] // 2
    return np.prod(boxes[..., half:] - boxes[..., :half] + float(plus_one), axis=-1)
