"""The geometry gate: slice positions and orientations to the grid of a regular stack, or a named refusal.

Series readers without it accept gaps, duplicates and tilt silently. All coordinates are LPS millimetres.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mp3d.config import GeometryPolicy
from mp3d.errors import Refusal

POSITION_TOLERANCE_MM = 0.05
"""A slice may lie this far from its place on the regular grid: scanners write positions with two or three decimals."""
POSITION_TOLERANCE = 0.01
"""... or this share of the slice spacing, whichever is more."""
DIRECTION_TOLERANCE = 1e-3
"""Direction cosines may differ by this much: some scanners write them with three decimals."""
UNIT_TOLERANCE = 0.01
"""Cosines further from orthonormal than this are no rounding."""
MAX_POSITION_MM = 1e5
MIN_SPACING_MM, MAX_PIXEL_SPACING_MM = 0.01, 10.0
MAX_SLICE_SPACING_MM = 50.0
WHOLE_ROW_TOLERANCE = 1e-4
"""A row offset that is whole but for the decimals of the positions loses no row to interpolation."""
MAX_TILT_DEG = 35.0
"""No gantry tilts further."""
MAX_RESAMPLED_GAP_MM = 10.0
MAX_RESAMPLED_GAP = 2.5
"""Uneven slices are not interpolated across a gap above so many times their median step, nor above 10 mm: where one
slice is missing, its place can be guessed from its neighbours; where two are, a small lesion may be gone."""
MIN_SLICES = 3
"""With fewer there is no second gap to compare a gap with, so a missing slice cannot be seen."""


def check_pixel_spacing(spacing_yx_mm: Sequence[float], label: str) -> None:
    """Refuse an in-plane spacing that is not finite, below 0.01 mm or above 10 mm.

    Raises:
        Refusal: ``BAD_SPACING``.
    """
    if not all(MIN_SPACING_MM <= value <= MAX_PIXEL_SPACING_MM for value in spacing_yx_mm):  # also NaN
        shown = " x ".join(f"{value:g}" for value in spacing_yx_mm)
        rule = f"{MIN_SPACING_MM:g} to {MAX_PIXEL_SPACING_MM:g} mm"
        tag = "Pixel Spacing (0028,0030)"
        raise Refusal("BAD_SPACING", f"{label}: {tag} is {shown} mm; it must be {rule}; export it again")


def check_slice_spacing(spacing_mm: float) -> None:
    """Refuse a distance between slices that is not finite, below 0.01 mm or above 50 mm.

    Raises:
        Refusal: ``BAD_SPACING``.
    """
    if not MIN_SPACING_MM <= spacing_mm <= MAX_SLICE_SPACING_MM:  # also NaN
        rule = f"{MIN_SPACING_MM:g} to {MAX_SLICE_SPACING_MM:g} mm"
        places = "by their positions, in DICOM (0020,0032)"
        raise Refusal(
            "BAD_SPACING", f"slices are {spacing_mm:g} mm apart {places}; it must be {rule}; export them again"
        )


def direction_cosines(orientation: Sequence[float], label: str) -> Float[np.ndarray, "3 3"]:
    """Columns: direction of rising column index, of rising row index, and their cross product, the slice normal.

    Args:
        orientation: Image Orientation (Patient): cosines of a row (x, y, z), then of a column.

    Raises:
        Refusal: ``BAD_GEOMETRY``.
    """
    along_row, along_column = np.asarray(orientation, np.float64).reshape(2, 3)
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm([along_row, along_column], axis=1)
        off = max(np.abs(lengths - 1).max(), abs(along_row @ along_column))
    if not off <= UNIT_TOLERANCE:  # also true of NaN
        detail = "Image Orientation (Patient) (0020,0037) is no pair of orthogonal unit vectors"
        raise Refusal("BAD_GEOMETRY", f"{label}: {detail}; export the original CT images")
    along_row = along_row / lengths[0]
    along_column = along_column - (along_column @ along_row) * along_row
    along_column /= np.linalg.norm(along_column)
    return np.stack([along_row, along_column, np.cross(along_row, along_column)], axis=1)


def same_positions(distances: Float[np.ndarray, " n"]) -> list[list[int]]:
    """Groups of two and more slices at one place, as indices into the ascending distances along the normal."""
    breaks = np.flatnonzero(np.diff(distances) > POSITION_TOLERANCE_MM) + 1
    return [group.tolist() for group in np.split(np.arange(len(distances)), breaks) if len(group) > 1]


class Grid(NamedTuple):
    """Where a regular orthogonal stack lies, and how the slices at hand come to lie on it.

    Attributes:
        affine: (column, row, slice, 1) to LPS mm; row 0 is the first row of the first slice.
        row_offsets: ``(n,)`` rows by which each slice at hand must be moved down its columns; all 0 without tilt.
        positions: ``(d,)`` places of the stack's slices in (fractional) numbers of the slices at hand; None: the same.
        tilt_deg: of the gantry; 0 where nothing is to be corrected.
    """

    affine: Float[np.ndarray, "4 4"]
    row_offsets: Float[np.ndarray, " n"]
    positions: Float[np.ndarray, " d"] | None
    tilt_deg: float


def stack_grid(
    positions: Float[np.ndarray, "n 3"],
    directions: Float[np.ndarray, "3 3"],
    spacing_yx_mm: Sequence[float],
    labels: Sequence[str],
    policy: GeometryPolicy | None = None,
) -> Grid:
    """Grid of slices that are in ascending order along the normal.

    Origin and slice step are the least squares fit to all positions. Of a sheared stack only the part of the step along
    the normal stays; an uneven one gets its median step, from its first slice on.

    Args:
        positions: centre of each slice's first pixel.
        directions: as :func:`direction_cosines` gives them.
        labels: how messages call each slice.
        policy: what may be corrected; None: nothing.

    Raises:
        Refusal: ``TOO_FEW_SLICES``, ``BAD_SPACING``, ``GANTRY_TILT``, ``SHIFTED_SLICE``, ``MISSING_SLICE`` or
            ``UNEVEN_SPACING``.
    """
    policy = policy or GeometryPolicy()
    if len(positions) < MIN_SLICES:
        detail = f"{len(positions)} of the {MIN_SLICES} slices that it takes to see that none is missing"
        raise Refusal("TOO_FEW_SLICES", f"{detail} ({labels[0]} is there); fetch the whole series")
    distances = (positions - positions[0]) @ directions[:, 2]
    spacing = float(np.median(np.diff(distances)))
    check_slice_spacing(spacing)
    tilted = _is_tilted(positions, directions, distances, labels)
    if tilted and policy.tilt == "refuse":
        angle = np.degrees(np.arctan(np.linalg.norm(_slope(positions, directions, distances))))
        raise Refusal(
            "GANTRY_TILT",
            f"the slice positions (0020,0032) run {angle:.1f} degrees off the slice normal (0020,0037): the stack is "
            "sheared; have it sheared back (tilt = shear), or leave the series out",
        )
    resampled = policy.uneven == "resample" and not is_even(distances)
    if resampled:
        _check_gaps(distances, labels)
    else:
        _check_even(distances, labels)
    places = distances / spacing if resampled else np.arange(len(positions), dtype=np.float64)
    origin, step = _fitted_line(places, positions)
    row_offsets = np.zeros(len(positions))
    if tilted:
        row_offsets = places * (step @ directions[:, 1]) / spacing_yx_mm[0]
        whole = np.rint(row_offsets)
        row_offsets = np.where(np.abs(row_offsets - whole) <= WHOLE_ROW_TOLERANCE, whole, row_offsets)
    tilt = float(np.arctan2(step @ directions[:, 1], step @ directions[:, 2])) if tilted else 0.0
    if tilted or resampled:
        step = (step @ directions[:, 2]) * directions[:, 2]
    affine = np.eye(4)
    affine[:3, 0] = directions[:, 0] * spacing_yx_mm[1]
    affine[:3, 1] = directions[:, 1] * spacing_yx_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = origin
    affine = np.round(affine, 9) + 0.0  # below a picometre it is noise of the fit; no negative zeros
    return Grid(affine, row_offsets, _even_positions(places) if resampled else None, float(np.degrees(tilt)))


def is_even(distances: Float[np.ndarray, " n"]) -> bool:
    """Whether slices at these ascending distances along the normal lie on a regular grid."""
    if (np.diff(distances) <= POSITION_TOLERANCE_MM).any():
        return False
    try:
        _check_even(distances, [""] * len(distances))
    except Refusal:
        return False
    return True


def _even_positions(places: Float[np.ndarray, " n"]) -> Float[np.ndarray, " d"]:
    """Places 0, 1, 2, ... up to the last slice, in fractional slice numbers."""
    hair = 1e-6  # so that the last slice is not lost to rounding
    return np.interp(np.arange(np.floor(places[-1] + hair) + 1), places, np.arange(len(places)))


def _fitted_line(
    at: Float[np.ndarray, " n"], values: Float[np.ndarray, "n k"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Least squares line through values: its value at 0 and its step."""
    centred = at - at.mean()
    step = centred @ values / (centred @ centred)
    return values.mean(axis=0) - at.mean() * step, step


def _tolerance_mm(spacing_mm: float) -> float:
    return max(POSITION_TOLERANCE_MM, POSITION_TOLERANCE * spacing_mm)


def _slope(
    positions: Float[np.ndarray, "n 3"], directions: Float[np.ndarray, "3 3"], distances: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " 2"]:
    """Millimetres sideways (along a row, along a column) for each along the normal, through the first slice."""
    return distances @ ((positions - positions[0]) @ directions[:, :2]) / (distances @ distances)


def _is_tilted(
    positions: Float[np.ndarray, "n 3"],
    directions: Float[np.ndarray, "3 3"],
    distances: Float[np.ndarray, " n"],
    labels: Sequence[str],
) -> bool:
    """Slices must lie above one another along the normal, not beside, unless a gantry tilt shears them evenly."""
    sideways = (positions - positions[0]) @ directions[:, :2]
    allowed = _tolerance_mm(float(np.median(np.diff(distances)))) + DIRECTION_TOLERANCE * distances
    off = np.linalg.norm(sideways, axis=1)
    if (off <= allowed).all():
        return False
    slope = _slope(positions, directions, distances)
    rest = np.linalg.norm(sideways - np.outer(distances, slope), axis=1)
    if (rest <= allowed).all():
        angle = np.degrees(np.arctan(np.linalg.norm(slope)))
        along_rows = np.abs(distances * slope[0])
        if angle > MAX_TILT_DEG or (along_rows > allowed).any():
            raise Refusal(
                "GANTRY_TILT",
                f"the slice positions (0020,0032) run {angle:.1f} degrees off the slice normal (0020,0037), which is "
                f"no gantry tilt: that runs along the columns, up to {MAX_TILT_DEG:g} degrees; leave the series out",
            )
        return True
    worst = int(np.argmax(off - allowed))
    raise Refusal(
        "SHIFTED_SLICE",
        f"{labels[worst]} lies {off[worst]:.2f} mm sideways of the first slice (0020,0032), allowed are "
        f"{allowed[worst]:.2f} mm; export each reconstruction as a series of its own",
    )


def _check_gaps(distances: Float[np.ndarray, " n"], labels: Sequence[str]) -> None:
    """No gap may be too wide to be interpolated across."""
    steps = np.diff(distances)
    widest = int(np.argmax(steps))
    allowed = min(MAX_RESAMPLED_GAP_MM, MAX_RESAMPLED_GAP * float(np.median(steps)))
    if steps[widest] > allowed + POSITION_TOLERANCE_MM:
        raise Refusal(
            "UNEVEN_SPACING",
            f"from {labels[widest]} to {labels[widest + 1]} the step is {steps[widest]:.3f} mm (0020,0032); slices are "
            f"interpolated across {allowed:.3f} mm at most; fetch the series again",
        )


def _check_even(distances: Float[np.ndarray, " n"], labels: Sequence[str]) -> None:
    """Every step near the median step, and every slice near its place on the fitted grid: steps must not drift."""
    steps = np.diff(distances)
    spacing = float(np.median(steps))
    allowed = _tolerance_mm(spacing)
    uneven: Int[np.ndarray, " m"] = np.flatnonzero(np.abs(steps - spacing) > allowed)
    if len(uneven):
        first = int(uneven[0])
        multiples = np.rint(steps[uneven] / spacing)
        text = (
            f"from {labels[first]} to {labels[first + 1]} the step is {steps[first]:.3f} mm, the median step "
            f"{spacing:.3f} mm (allowed: {allowed:.3f} mm more or less; {len(uneven)} of {len(steps)} steps are off)"
        )
        if (multiples >= 2).all() and (np.abs(steps[uneven] - multiples * spacing) <= multiples * allowed).all():
            missing = int((multiples - 1).sum())
            raise Refusal("MISSING_SLICE", f"{text}; {missing} missing in all; fetch the series again")
        advice = "export each stack as a series of its own, or have it resampled (uneven = resample)"
        raise Refusal("UNEVEN_SPACING", f"{text}; {advice}")
    index = np.arange(len(distances), dtype=np.float64)
    start, step = _fitted_line(index, distances[:, None])
    off = np.abs(distances - (start + index * step))
    if off.max() > allowed:
        worst = int(np.argmax(off))
        raise Refusal(
            "UNEVEN_SPACING",
            f"{labels[worst]} lies {off[worst]:.3f} mm from its place on a regular grid, allowed are {allowed:.3f} mm: "
            "the spacing drifts; export each stack as a series of its own",
        )
