"""Slices to clips: the z grid of the network, interpolated from the slices that a series really has.

A clip has its own spacing (2.5 mm in the papers). Around a key slice the neighbours lie at multiples
of that spacing; a whole series is read on one grid of that spacing, anchored at its first slice. Positions beyond the
ends are clamped to the outermost slice, as the authors' loader steps back towards the key slice. Differs from the
authors' ``image_io_3DCE.py``: they compute the two weights once and reuse them for every neighbour, which is off by up
to 1.5 mm at 3 and 4 mm spacing; here every neighbour has its own, unless ``ClipConfig.interpolation`` asks for theirs.
A whole series is always read exactly.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int16

from mp3d.config import ClipConfig

BLOCK_ROWS = 64
"""Rows that are interpolated at a time: the three buffers, of 64 x 512 float32, stay in a core's cache."""


def window_positions(
    key: int, num_source: int, source_spacing_mm: float | None, clip: ClipConfig
) -> Float[np.ndarray, "d"]:
    """Where the slices of the clip around a key slice lie, in (fractional) slice numbers of the series.

    Args:
        key: number of the key slice, 0..num_source-1.
        num_source: slices in the series.
        source_spacing_mm: their spacing; unused where ``clip.slice_spacing_mm`` is None.
    """
    offsets = (np.arange(clip.num_slices) - clip.num_slices // 2) * _step(source_spacing_mm, clip)
    if clip.interpolation == "authors":
        offsets = np.sign(offsets) * _authors_distances(np.abs(offsets), _step(source_spacing_mm, clip))
    return np.clip(key + offsets, 0, num_source - 1)


def resample_z(slices: Int16[np.ndarray, "n h w"], positions: Float[np.ndarray, "d"]) -> Int16[np.ndarray, "d h w"]:
    """Linear interpolation along z at fractional slice numbers, rounded to whole HU; whole numbers are copied."""
    lower = np.floor(positions).astype(int)
    weights = positions - lower
    out = np.empty((len(positions), *slices.shape[1:]), np.int16)
    for top in range(0, slices.shape[1], BLOCK_ROWS):
        rows = slice(top, top + BLOCK_ROWS)
        _interpolate(slices[:, rows], lower.tolist(), weights.tolist(), out[:, rows])
    return out


def _interpolate(
    slices: Int16[np.ndarray, "n h w"], lower: list[int], weights: list[float], out: Int16[np.ndarray, "d h w"]
) -> None:
    """Some rows of all slices into ``out``. Everything in float32 and in place: to the same bits on every machine."""
    base, rise, mixed = (np.empty(slices.shape[1:], np.float32) for _ in range(3))
    loaded = None
    for made, low, weight in zip(out, lower, weights, strict=True):
        if weight == 0:
            made[...] = slices[low]
            continue
        if low != loaded:
            base[...] = slices[low]
            np.subtract(slices[low + 1], base, out=rise)
            loaded = low
        np.multiply(rise, np.float32(weight), out=mixed)
        mixed += base
        np.rint(mixed, out=mixed)
        made[...] = mixed


@dataclass(frozen=True)
class SeriesGrid:
    """The grid on which a whole series is inferred, and the way back to its own slices.

    Attributes:
        num_source: slices of the series.
        step: source slices per grid slice.
        positions: ``(g,)`` fractional slice numbers of the grid slices, from 0 to at most ``num_source - 1``.
    """

    num_source: int
    step: float
    positions: Float[np.ndarray, "g"]

    def window(self, index: int, num_slices: int) -> Float[np.ndarray, "d"]:
        """Positions of the clip whose key slice is the grid slice ``index``; clamped at the ends of the series."""
        offsets = np.arange(num_slices) - num_slices // 2
        return np.clip(self.positions[index] + offsets * self.step, 0, self.num_source - 1)

    @property
    def nearest_source(self) -> np.ndarray:
        """``(g,)`` the source slice that each grid slice answers for."""
        return np.minimum(np.floor(self.positions + 0.5).astype(int), self.num_source - 1)


def series_grid(num_source: int, source_spacing_mm: float, clip: ClipConfig) -> SeriesGrid:
    """Grid of the clip's spacing over a whole series, anchored at its first slice."""
    step = _step(source_spacing_mm, clip)
    # a hair of tolerance, so that the last slice is not lost to rounding where the spacings divide evenly
    count = int(np.floor((num_source - 1) / step + 1e-6)) + 1
    return SeriesGrid(num_source, step, np.minimum(np.arange(count) * step, num_source - 1))


def _authors_distances(distances: Float[np.ndarray, "d"], step: float) -> Float[np.ndarray, "d"]:
    """Slices from the key slice to where the authors' weights really put a neighbour.

    They mix the slices below and above ``distances`` with the fraction of the *first* neighbour's, ``step``.
    """
    below = np.floor(distances)
    return np.where(distances == below, distances, below + step % 1)


def _step(source_spacing_mm: float | None, clip: ClipConfig) -> float:
    """Source slices per clip slice."""
    if clip.slice_spacing_mm is None:
        return 1.0
    if source_spacing_mm is None:
        raise ValueError(
            "slices of unknown spacing cannot be put on a grid of millimetres; set clip.slice_spacing_mm to None"
        )
    return clip.slice_spacing_mm / source_spacing_mm
