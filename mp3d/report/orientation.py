"""Letters at the edges of a slice: which side of the patient lies there."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SIDES = (("L", "R"), ("P", "A"), ("H", "F"))
"""Of each LPS axis, towards its positive and its negative end, in the letters of DICOM's Patient Orientation."""
SMALLEST_SHARE = 0.25
"""Of a direction's unit vector: an axis that it leans to by less than about 15 degrees gets no letter."""


class EdgeLetters(NamedTuple):
    """Towards each edge of a picture, the patient's side; of an oblique direction several, the main one first."""

    left: str
    right: str
    top: str
    bottom: str


def edge_letters(affine: Float[np.ndarray, "4 4"]) -> EdgeLetters:
    """Of slices shown as they are stored: columns to the right, rows downwards.

    Args:
        affine: of a :class:`~mp3d.data.series.Volume`, ``(column, row, slice, 1)`` to patient millimetres (LPS).
    """
    right, down = affine[:3, 0], affine[:3, 1]
    return EdgeLetters(_letters(-right), _letters(right), _letters(-down), _letters(down))


def _letters(direction: Float[np.ndarray, "3"]) -> str:
    shares = direction / np.linalg.norm(direction)
    axes = [int(axis) for axis in np.argsort(-np.abs(shares), kind="stable") if abs(shares[axis]) >= SMALLEST_SHARE]
    return "".join(SIDES[axis][int(shares[axis] < 0)] for axis in axes)
