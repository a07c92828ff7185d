"""Slices to clips: the z grid of the network, interpolated from the slices that a series really has.

A clip has its own spacing (2.5 mm in the papers). Around a key slice the neighbours lie at multiples
of that spacing; a whole series is read on one grid of that spacing, anchored at its first slice. Positions beyond the
ends are clamped to the outermost slice, as the authors' loader steps back towards the key slice. Differs from the
authors' ``image_io_3DCE.py``: they compute the two weights once and reuse them for every neighbour, which is off by up
to 1.5 mm at 3 and 4 mm spacing; here every neighbour has its own, unless ``ClipConfig.interpolation`` asks for theirs.
A whole series is always read exactly.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int16

from mp3d.config import ClipConfig

BLOCK_ROWS = 64
"""Rows that are interpolated at a time: the three buffers, of 64 x 512 float32, stay in a core's cache."""
SAME_SLICE = 0.01
"""A clip's slice this near to a stored one, in slice numbers, is that slice."""
MOSTLY_SLICE = 0.25
"""A clip's slice this near to a stored one is three quarters of it, so that its truth serves for training: at a spacing
that 2.5 mm is no multiple of, such as 3.27 mm, hardly any slice of a slab is a stored one beside the key slice.
"""


def window_positions(
    key: int, num_source: int, source_spacing_mm: float | None, clip: ClipConfig, place: int | None = None
) -> Float[np.ndarray, "d"]:
    """Where the slices of the clip around a key slice lie, in (fractional) slice numbers of the series.

    Beyond an end of the series all neighbours are its outermost slice. That holds at a missing slice of DeepLesion too,
    where the run, which is the series here, is cut; the authors step towards the key slice for the missing neighbour
    only, and take those behind the gap as they are.

    Args:
        key: number of the key slice, 0..num_source-1.
        num_source: slices in the series.
        source_spacing_mm: their spacing; unused where ``clip.slice_spacing_mm`` is None.
        place: of the key slice in the clip, from 0; None: the middle.
    """
    offsets = np.arange(clip.depth) - (clip.depth // 2 if place is None else place)
    offsets = offsets * _step(source_spacing_mm, clip)
    if clip.interpolation == "authors":
        offsets = np.sign(offsets) * _authors_distances(np.abs(offsets), _step(source_spacing_mm, clip))
    return np.clip(key + offsets, 0, num_source - 1)


def stored_slices(positions: Float[np.ndarray, "d"], near: int = 0, tolerance: float = SAME_SLICE) -> dict[int, int]:
    """Which slices of a clip are stored ones and not interpolated: index in the clip to slice number.

    Args:
        positions: of the clip's slices, clamped at the ends of the series.
        near: index; of the copies of an outermost slice only the one nearest to it counts.
        tolerance: in slice numbers; of several slices within it the nearest counts.
    """
    nearest: dict[int, int] = {}
    distances = np.abs(positions - np.rint(positions))
    for index in sorted(range(len(positions)), key=lambda index: (-round(distances[index], 6), -abs(index - near))):
        if distances[index] <= tolerance:
            nearest[round(float(positions[index]))] = index
    return {index: number for number, index in nearest.items()}


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
        positions: ``(g,)`` fractional slice numbers of the grid slices, within 0 and ``num_source - 1``.
    """

    num_source: int
    step: float
    positions: Float[np.ndarray, "g"]

    def stretch(self, start: int, stop: int) -> Float[np.ndarray, "d"]:
        """Positions of the grid slices ``start..stop-1``; beyond the ends of the series the outermost slice's."""
        return np.clip(self.positions[0] + np.arange(start, stop) * self.step, 0, self.num_source - 1)

    def index_of(self, source: int) -> int:
        """The grid slice nearest to a source slice."""
        return int(np.abs(self.positions - source).argmin())

    @property
    def nearest_source(self) -> np.ndarray:
        """``(g,)`` the source slice that each grid slice answers for."""
        return np.minimum(np.floor(self.positions + 0.5).astype(int), self.num_source - 1)


def series_grid(num_source: int, source_spacing_mm: float, clip: ClipConfig, through: float = 0) -> SeriesGrid:
    """Grid of the clip's spacing over a whole series.

    Args:
        through: a (fractional) slice number that is on the grid; the first one, unless it must be another.
    """
    step = _step(source_spacing_mm, clip)
    # a hair of tolerance, so that the first and last slice are not lost to rounding where the spacings divide evenly
    before, behind = (int(np.floor(slices / step + 1e-6)) for slices in (through, num_source - 1 - through))
    positions = through + np.arange(-before, behind + 1) * step
    return SeriesGrid(num_source, step, np.clip(positions, 0, num_source - 1))


def phased_grids(num_source: int, source_spacing_mm: float, clip: ClipConfig, phases: int) -> list[SeriesGrid]:
    """Grids over a whole series, each shifted by an equal part of the clip's spacing from the one before.

    With as many phases as source slices lie in a grid step, every source slice is the nearest to some grid slice: where
    all grids end before the last one, the grid that would come next to it has it too.
    """
    step, last = _step(source_spacing_mm, clip), num_source - 1
    grids = [series_grid(num_source, source_spacing_mm, clip, phase / phases * step) for phase in range(phases)]
    grids = [grid for grid in grids if len(grid.positions)]
    if phases > 1 and all(grid.nearest_source[-1] < last for grid in grids):
        number = min(range(len(grids)), key=lambda number: grids[number].positions[-1])
        grids[number] = replace(grids[number], positions=np.append(grids[number].positions, last))
    return grids


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
