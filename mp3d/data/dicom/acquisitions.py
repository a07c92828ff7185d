"""One CT series to its acquisitions: phases and reconstructions of one range, stacks of several spacings."""

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from mp3d.data.dicom.header import Header
from mp3d.data.geometry import MIN_SLICES, POSITION_TOLERANCE_MM, direction_cosines, is_even
from mp3d.errors import Refusal

SAME_RANGE = 0.5
"""Stacks that share more than this of the shorter one's extent are of one range; else they follow one another."""
MAX_PHASES = 256
"""No scan comes back to a position so often; comparing with more would take too long."""

ELEMENTS: dict[str, Callable[[Header], object]] = {
    "Convolution Kernel (0018,1210)": lambda header: header.convolution_kernel,
    "Image Type (0008,0008)": lambda header: header.image_type,
    "Stack ID or Temporal Position Index (0020,9056), (0020,9128)": lambda header: header.stack,
    "Temporal Position Identifier (0020,0100)": lambda header: header.temporal_position,
    "cardiac phase (0020,9241) or Trigger Time (0018,1060)": lambda header: header.cardiac_phase,
    "KVP (0018,0060)": lambda header: header.tube_voltage,
    "Contrast/Bolus Agent (0018,0010)": lambda header: header.contrast_agent,
}
"""What tells phases and reconstructions of one range apart, in the order in which it is tried."""


def slice_normal(header: Header) -> tuple[float, ...]:
    """The slice normal, rounded; empty where the orientation is missing or broken (refused later, by name)."""
    return tuple((np.round(_normal(header.image_orientation_patient), 2) + 0.0).tolist())


@lru_cache(maxsize=64)
def _normal(orientation: tuple[float, ...]) -> tuple[float, ...]:
    if not orientation:
        return ()
    try:
        return tuple(direction_cosines(orientation, "")[:, 2].tolist())
    except Refusal:
        return ()


def split_by_acquisition(headers: list[Header]) -> list[list[Header]]:
    """Phases and reconstructions of one range, each a part; the whole where nothing tells of any.

    The elements below are tried in order. The first wins whose parts are all evenly spaced stacks, two of them of one
    range: then slices lie twice at a position, or alternate between the parts along the normal, which would look like
    one finer stack. Acquisitions that follow one another stay one. Where positions repeat and no element gives even
    stacks (a slice may be missing), the first that leaves no repeated position wins. Time is tried for even stacks
    alone, for many scanners write another one into each slice.
    """
    by_time = _split(headers, lambda header: header.acquisition_time)
    candidates = [
        _phases(headers),
        *(_split(headers, by) for by in ELEMENTS.values()),
        _split(headers, lambda header: header.said_spacing_mm),
        _split(headers, lambda header: (header.acquisition_number, header.convolution_kernel, header.image_type)),
        _split(headers, lambda header: header.frame and (_image(header), header.stack)),
    ]
    for parts in (*candidates, by_time):
        if len(parts) > 1 and all(map(_is_even_stack, parts)) and _share_a_range(parts):
            return parts
    if _repeats(headers):
        for parts in candidates:
            if not any(map(_repeats, parts)) and max(map(len, parts)) >= MIN_SLICES:
                return parts
    return [headers]


def split_by_spacing(headers: list[Header]) -> list[list[Header]]:
    """Evenly spaced parts of an uneven whole, by Image Type or Convolution Kernel; the whole where neither gives them.

    Acquisition numbers do not count: where they change, a slice may be missing.
    """
    if _is_even_stack(headers):
        return [headers]
    for parts in (
        _split(headers, lambda header: header.image_type),
        _split(headers, lambda header: header.convolution_kernel),
    ):
        if len(parts) > 1 and all(map(_is_even_stack, parts)):
            return parts
    return [headers]


def alternating_element(headers: list[Header]) -> str:
    """The element by which slices of one range differ that are no phases or reconstructions of even spacing; else "".

    Args:
        headers: with finite positions.
    """
    elements = ELEMENTS | {"Acquisition Number (0020,0012)": lambda header: header.acquisition_number}
    return next((name for name, by in elements.items() if _share_a_range(_split(headers, by))), "")


def _split(headers: list[Header], by: Callable[[Header], object]) -> list[list[Header]]:
    parts: dict[object, list[Header]] = defaultdict(list)
    for header in headers:
        parts[by(header)].append(header)
    return list(parts.values())


def _phases(headers: list[Header]) -> list[list[Header]]:
    """By Acquisition Number, where a step-and-shoot scan has one for each rotation: the n-th visit of each position.

    In the order of their numbers, each acquisition joins the first phase whose range it does not meet. Only phases of
    equal range can be trusted: with others, a rotation may have joined the wrong one. Those stay acquisitions.
    """
    acquisitions = _split(headers, lambda header: header.acquisition_number)
    phases: list[list[Header]] = []
    ranges: list[tuple[float, float]] = []
    for part in sorted(acquisitions, key=lambda part: (len(part[0].acquisition_number), part[0].acquisition_number)):
        heights = _heights(part)
        if not np.isfinite(heights).all() or len(phases) > MAX_PHASES:
            return acquisitions
        low, high = float(heights[0]), float(heights[-1])
        for index, (start, end) in enumerate(ranges):
            if low > end + POSITION_TOLERANCE_MM or high < start - POSITION_TOLERANCE_MM:
                phases[index] += part
                ranges[index] = (min(low, start), max(high, end))
                break
        else:
            phases.append([*part])
            ranges.append((low, high))
    if not all(map(_is_even_stack, phases)):
        return acquisitions
    half_step = min((end - start) / (len(phase) - 1) / 2 for phase, (start, end) in zip(phases, ranges, strict=True))
    return phases if (np.ptp(ranges, axis=0) < half_step).all() else acquisitions


def _share_a_range(parts: list[list[Header]]) -> bool:
    """Of parts with finite heights. Neighbours by lower end suffice: where any two share, so do two of those."""
    ranges = sorted((heights[0], heights[-1]) for heights in map(_heights, parts))
    return any(
        min(end, other_end) - other_start > SAME_RANGE * min(end - start, other_end - other_start)
        for (start, end), (other_start, other_end) in pairwise(ranges)
    )


def _is_even_stack(headers: list[Header]) -> bool:
    """False also where positions are missing or broken, which is refused later, by name."""
    heights = _heights(headers)
    return len(heights) >= MIN_SLICES and bool(np.isfinite(heights).all()) and is_even(heights)


def _repeats(headers: list[Header]) -> bool:
    """Whether two images lie in one plane."""
    return bool((np.diff(_heights(headers)) <= POSITION_TOLERANCE_MM).any())


def _heights(headers: list[Header]) -> Float[np.ndarray, " n"]:
    """Ascending along the normal of the first that has one, mm; at the end NaN, for missing or broken positions.

    A file that lies there twice counts once; ``load_volume`` compares the pixels.
    """
    images = {(_image(header), header.frame): header for header in headers}.values()
    nowhere = (np.nan,) * 3
    normal = next(filter(None, (_normal(header.image_orientation_patient) for header in images)), nowhere)
    positions = np.array([header.image_position_patient or nowhere for header in images])
    with np.errstate(invalid="ignore", over="ignore"):
        heights = positions @ np.array(normal)
    return np.sort(np.where(np.isfinite(heights), heights, np.nan))


def _image(header: Header) -> str:
    return header.sop_instance_uid or header.name
