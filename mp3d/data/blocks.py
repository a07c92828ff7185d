"""Blocks of a stored CT series on a grid of their own: cut out, interpolated, turned about.

Image and mask are read on the same places: HU linear between voxel centres, classes of the nearest one. Beyond the
series is air, of which nobody said what it is.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int16, UInt8

from mp3d.config import UNKNOWN, AugmentConfig, ClipConfig
from mp3d.data.clips import resample_z
from mp3d.data.series import AIR_HU
from mp3d.data.shard import Row, SeriesEntry, ShardSet, decode_image, decode_truth
from mp3d.errors import DataError

AS_STORED = 1e-6
"""A step this near to 1 takes voxels as they are: the block is moved by less than half of one, and nothing is mixed."""

SpacingMM = tuple[float, float, float]


@dataclass(frozen=True)
class Placement:
    """What augmentation does to where a block lies.

    Attributes:
        shift: of its centre along z, y and x, in voxels of the block.
        zoom: magnification in the plane.
    """

    shift: tuple[int, int, int] = (0, 0, 0)
    zoom: float = 1.0


@dataclass(frozen=True, eq=False)
class Block:
    """
    Attributes:
        masks: classes, or ``UNKNOWN``.
        middle: the stored row nearest to its middle slice.
    """

    hu: Int16[np.ndarray, "d h w"]
    masks: UInt8[np.ndarray, "d h w"]
    middle: Row


def draw_placement(config: AugmentConfig, rng: np.random.Generator) -> Placement:
    z, plane = config.shift_px
    shift = [int(rng.integers(-most, most + 1)) for most in (z, plane, plane)]
    return Placement((shift[0], shift[1], shift[2]), float(rng.uniform(*config.zoom)))


def read_block(
    shards: ShardSet,
    entry: SeriesEntry,
    centre: tuple[float, float | None, float | None],
    clip: ClipConfig,
    placement: Placement = Placement(),  # noqa: B008  # frozen
) -> Block:
    """Read the slices of a block, and no others, and put them on its grid.

    Args:
        centre: slice, row and column number; None: the middle of the row or column. The block is moved so that no more
            of it than must be lies beyond the series.

    Raises:
        DataError: colour pictures, or a file that is not as it was written.
    """
    if entry.spacing_mm is None:
        raise DataError(f"{shards.folder} holds pictures; blocks are cut out of CT series, so leave clip.block unset")
    steps = axis_steps(clip, entry.spacing_mm, placement.zoom)
    z = axis_positions(centre[0] + placement.shift[0] * steps[0], clip.num_slices, steps[0], entry.num_rows)
    inside_z = np.clip(z, 0, entry.num_rows - 1)
    first, last = int(np.floor(inside_z.min())), int(np.ceil(inside_z.max()))
    rows = shards.read_rows(entry, first, last + 1)
    y, x = (
        axis_positions(
            ((available - 1) / 2 if at is None else at) + shift * step, clip.image_size, step, available
        )
        for at, shift, step, available in zip(
            centre[1:], placement.shift[1:], steps[1:], (rows[0]["rows"], rows[0]["columns"]), strict=True
        )
    )  # fmt: skip
    slices = resample_plane(np.stack([decode_image(row) for row in rows]), y, x)
    hu = resample_z(slices, inside_z - first)
    masks = np.full(hu.shape, UNKNOWN, np.uint8)
    beyond = _beyond(z, entry.num_rows)[:, None, None] | (
        _beyond(y, rows[0]["rows"])[:, None] | _beyond(x, rows[0]["columns"])[None, :]
    )
    for plane, row in zip(masks, (rows[index - first] for index in _nearest(z, entry.num_rows)), strict=True):
        mask = decode_truth(row).mask
        if mask is not None:
            plane[...] = mask[np.ix_(_nearest(y, row["rows"]), _nearest(x, row["columns"]))]
    hu[beyond], masks[beyond] = AIR_HU, UNKNOWN
    return Block(hu, masks, rows[_nearest(z, entry.num_rows)[clip.num_slices // 2] - first])


def axis_steps(clip: ClipConfig, spacing_mm: SpacingMM | None, zoom: float = 1.0) -> tuple[float, float, float]:
    """Stored voxels from one voxel of a block to the next, along z, y and x.

    Raises:
        DataError: the series is one of pictures, without spacing.
    """
    if spacing_mm is None:
        raise DataError("blocks are cut out of CT series, and these are pictures; leave clip.block unset")
    asked = (clip.slice_spacing_mm, clip.pixel_spacing_mm, clip.pixel_spacing_mm)
    z, y, x = (1.0 if want is None else want / have for want, have in zip(asked, spacing_mm, strict=True))
    return z, y / zoom, x / zoom


def axis_positions(centre: float, count: int, step: float, available: int) -> Float[np.ndarray, "n"]:
    """``count`` places ``step`` apart around a place, moved so that no more than must be lie beyond
    ``0..available - 1``.
    """
    spare = available - 1 - (count - 1) * step
    start = centre - (count - 1) / 2 * step
    start = min(max(start, 0.0), spare) if spare >= 0 else spare / 2
    if abs(step - 1) < AS_STORED:
        start, step = float(np.floor(start + 0.5)), 1.0
    return start + np.arange(count) * step


def resample_plane(
    slices: Int16[np.ndarray, "n h w"], y: Float[np.ndarray, "r"], x: Float[np.ndarray, "c"]
) -> Int16[np.ndarray, "n r c"]:
    """Bilinear interpolation at fractional row and column numbers, rounded to whole HU; beyond the rim the rim."""
    (top, bottom, down), (left, right, across) = (
        _neighbours(at, available) for at, available in zip((y, x), slices.shape[1:], strict=True)
    )
    if not down.any() and not across.any():
        return slices[:, top[:, None], left[None, :]]
    out = np.empty((len(slices), len(y), len(x)), np.int16)
    for plane, made in zip(slices, out, strict=True):
        upper, lower = (plane[at].astype(np.float32) for at in (top, bottom))
        upper += down[:, None] * (lower - upper)
        mixed = upper[:, left]
        mixed += across[None, :] * (upper[:, right] - mixed)
        np.rint(mixed, out=mixed)
        made[...] = mixed
    return out


def turned(
    hu: Int16[np.ndarray, "d h w"], masks: UInt8[np.ndarray, "d h w"], config: AugmentConfig, rng: np.random.Generator
) -> tuple[Int16[np.ndarray, "d h w"], UInt8[np.ndarray, "d h w"]]:
    """Random quarter turns and mirrorings, the same for both."""
    pair = np.stack([hu, masks.astype(np.int16)])
    if config.quarter_turns:
        for axes, turns in zip(((1, 2), (1, 3), (2, 3)), rng.integers(4, size=3), strict=True):
            pair = np.rot90(pair, int(turns), axes)
    if rng.random() < config.horizontal_flip:
        pair = pair[:, :, :, ::-1]
    if rng.random() < config.z_flip:
        pair = pair[:, ::-1]
    return np.ascontiguousarray(pair[0]), np.ascontiguousarray(pair[1]).astype(np.uint8)


def _neighbours(positions: Float[np.ndarray, "n"], available: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers below and above, and the share of the one above."""
    inside = np.clip(positions, 0, available - 1)
    below = np.floor(inside).astype(np.intp)
    return below, np.minimum(below + 1, available - 1), (inside - below).astype(np.float32)


def _nearest(positions: Float[np.ndarray, "n"], available: int) -> np.ndarray:
    return np.clip(np.floor(positions + 0.5), 0, available - 1).astype(np.intp)


def _beyond(positions: Float[np.ndarray, "n"], available: int) -> np.ndarray:
    """Farther out than the edges of the outermost voxels."""
    return (positions < -0.5) | (positions > available - 0.5)
