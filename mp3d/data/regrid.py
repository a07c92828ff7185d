"""Slices onto the regular orthogonal grid that :func:`mp3d.data.geometry.stack_grid` found for them.

Linear interpolation between pixels that were measured; where there are none, air. Padding outside the scanner's field
of view, which may stand for -3024 HU, is raised to air first, so that nothing is mixed with it.
"""

import numpy as np
from jaxtyping import Float, Int16

from mp3d.data.clips import resample_z
from mp3d.data.geometry import Grid
from mp3d.data.series import AIR_HU


def num_rows(grid: Grid, num_source_rows: int) -> int:
    """Rows of the sheared slices: all that any slice covers."""
    rows, _ = _whole_rows(grid.row_offsets)
    return num_source_rows + rows


def regrid(
    hu: Int16[np.ndarray, "n h w"], grid: Grid
) -> tuple[Int16[np.ndarray, "d H w"], Float[np.ndarray, "4 4"], Float[np.ndarray, " n"]]:
    """Put slices on their grid; what needs no correction is returned as it is.

    Returns:
        The stack; its affine; the rows by which each of the ``n`` slices was moved down its columns.
    """
    affine, offsets = grid.affine, grid.row_offsets
    if grid.tilt_deg:
        extra, first = _whole_rows(offsets)
        offsets = offsets - first
        hu = shear(hu, offsets, hu.shape[1] + extra)
        affine = affine.copy()
        affine[:3, 3] += first * affine[:3, 1]
    if grid.positions is not None:
        hu = resample_z(np.maximum(hu, np.int16(AIR_HU)), grid.positions)
    return hu, affine, offsets


def shear(
    hu: Int16[np.ndarray, "n h w"], row_offsets: Float[np.ndarray, " n"], num_rows: int
) -> Int16[np.ndarray, "n H w"]:
    """Move each slice down its columns by so many rows, at least 0; rows outside every slice's own become air."""
    height = hu.shape[1]
    out = np.full((len(hu), num_rows, hu.shape[2]), AIR_HU, np.int16)
    for source, moved, offset in zip(hu, out, row_offsets, strict=True):
        whole = int(np.floor(offset))
        share = np.float32(offset - whole)
        rows = np.maximum(source, np.int16(AIR_HU))
        if share == 0:
            moved[whole : whole + height] = rows
        else:  # a row of the grid lies between a row of the slice and the one before it
            upper, lower = rows[:-1].astype(np.float32), rows[1:].astype(np.float32)
            moved[whole + 1 : whole + height] = np.rint(lower + share * (upper - lower))
    return out


def _whole_rows(row_offsets: Float[np.ndarray, " n"]) -> tuple[int, int]:
    """How many rows the offsets add, and the lowest offset, in whole rows."""
    first = int(np.floor(row_offsets.min()))
    return int(np.ceil(row_offsets.max())) - first, first
