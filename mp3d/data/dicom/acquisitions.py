"""One CT series to its acquisitions: phases and reconstructions of one range, stacks of several spacings."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from mp3d.data.dicom.header import Header
from mp3d.data.geometry import MIN_SLICES, direction_cosines, is_even
from mp3d.errors import Refusal


def slice_normal(header: Header) -> tuple[float, ...]:
    """The slice normal, rounded; empty where the orientation is missing or broken (refused later, by name)."""
    return _normal(header.image_orientation_patient)


@lru_cache(maxsize=64)
def _normal(orientation: tuple[float, ...]) -> tuple[float, ...]:
    if not orientation:
        return ()
    try:
        directions = direction_cosines(orientation, "")
    except Refusal:
        return ()
    return tuple((np.round(directions[:, 2], 2) + 0.0).tolist())


def split_by_acquisition(headers: list[Header]) -> list[list[Header]]:
    """Parts without repeated positions, by the first element that gives them; the whole where none does."""
    if _positions_are_unique(headers):
        return [headers]
    for parts in (
        _split(headers, lambda header: header.acquisition_number),
        _split(headers, lambda header: header.convolution_kernel),
        _split(headers, lambda header: header.image_type),
        _split(headers, lambda header: header.stack),
        _split(headers, lambda header: (header.acquisition_number, header.convolution_kernel, header.image_type)),
        _split(headers, lambda header: header.frame and (header.name, header.stack)),
    ):
        if len(parts) > 1 and all(map(_positions_are_unique, parts)):
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


def _split(headers: list[Header], by: Callable[[Header], object]) -> list[list[Header]]:
    parts: dict[object, list[Header]] = defaultdict(list)
    for header in headers:
        parts[by(header)].append(header)
    return list(parts.values())


def _is_even_stack(headers: list[Header]) -> bool:
    """False also where positions are missing or broken, which is refused later, by name."""
    normal = slice_normal(headers[0])
    positions = [header.image_position_patient for header in headers]
    if len(headers) < MIN_SLICES or not normal or not all(positions) or not np.isfinite(positions).all():
        return False
    return is_even(np.sort(positions @ np.array(normal)))


def _positions_are_unique(headers: Iterable[Header]) -> bool:
    """A file that lies there twice (one SOP Instance UID) is no repetition; ``load_volume`` compares the pixels."""
    instances = {(header.sop_instance_uid or header.name, header.frame): header for header in headers}.values()
    counts = Counter(tuple(round(value, 2) for value in header.image_position_patient) for header in instances)
    return all(count == 1 for count in counts.values())
