"""The files of one CT series to a volume in Hounsfield units with the right geometry, or a named refusal."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int16

from mp3d.config import GeometryPolicy
from mp3d.data.decode import Pool, shared_pool
from mp3d.data.dicom import isolated
from mp3d.data.dicom.acquisitions import alternating_element
from mp3d.data.dicom.decoders import LOSSY
from mp3d.data.dicom.header import Header
from mp3d.data.dicom.listing import SeriesFiles
from mp3d.data.dicom.pixels import INT16, check_pixel_format, check_rescale, wide_padding
from mp3d.data.geometry import (
    MAX_POSITION_MM,
    POSITION_TOLERANCE_MM,
    check_pixel_spacing,
    direction_cosines,
    same_positions,
    stack_grid,
)
from mp3d.data.regrid import num_rows, regrid
from mp3d.data.series import AIR_HU, Volume
from mp3d.errors import Refusal

MAX_VOLUME_BYTES = 4 * 2**30
"""Of the int16 volume, where the caller sets no other limit: 2,000 slices of 1024 x 1024."""
ALIKE = 5e-5
"""Pixel spacings of one stack agree to this share, direction cosines to this much: four decimals beside six are alike,
and the far corner of a slice is then a few hundredths of a millimetre off."""
GAP_FACTOR = 1.5
"""Slices further apart than so many times what the header says of their spacing or thickness have gaps between them."""
TILT_TOLERANCE_DEG = 0.1
MAX_TISSUE_HU = 3071
"""The highest value of the Hounsfield scale on 12 bits. Pixel Padding Value (0028,0120) is believed only above it:
lower padding is dark anyway, and files exist whose tag is wrong, so that it could name a value of tissue."""


class StoredSlice(NamedTuple):
    """The stored image that a slice of a volume was read from; of an interpolated slice the nearest one.

    Attributes:
        frame: of a multi-frame image, from 1; 0 is a file of its own.
        row_offset: row ``y`` of the volume is row ``y - row_offset`` of the stored image; 0 without gantry tilt.
    """

    sop_instance_uid: str
    frame: int = 0
    row_offset: float = 0.0


def load_volume(
    series: SeriesFiles,
    policy: GeometryPolicy | None = None,
    pool: Pool | None = None,
    max_bytes: int = MAX_VOLUME_BYTES,
) -> tuple[Volume, tuple[StoredSlice, ...], tuple[str, ...]]:
    """Order, check and decode a series, slice by slice into one array, and correct what ``policy`` wants corrected.

    Args:
        series: as :func:`~mp3d.data.dicom.listing.group_series` lists it.
        policy: what is corrected instead of refused.
        pool: decodes compressed slices; None: the process' own.
        max_bytes: of the volume; a compressed file is far smaller.

    Returns:
        The volume, its slices ascending along the normal (row cosines x column cosines); where each slice comes from;
        warning codes.

    Raises:
        Refusal: the series is no regular stack in Hounsfield units; the detail names slice, tag and what to do.
    """
    _check_alike(series.slices)
    for header in series.slices:
        check_pixel_format(header)
        check_rescale(header)
    first = series.slices[0]
    _check_size(len(series.slices), first.rows, first.columns, max_bytes)
    orientation = np.mean([header.image_orientation_patient for header in series.slices], axis=0)
    directions = direction_cosines(orientation.tolist(), first.label)
    pool = pool or shared_pool()
    slices, num_duplicates = _ordered(series.slices, directions, pool)
    grid = stack_grid(
        np.array([header.image_position_patient for header in slices]),
        directions,
        first.pixel_spacing_yx_mm,
        [f"slice {number} of {len(slices)} ({header.label})" for number, header in enumerate(slices, 1)],
        policy,
    )
    if grid.positions is not None:
        _check_one_acquisition(slices)
    positions = np.arange(len(slices)) if grid.positions is None else grid.positions
    corrected = len(positions) if grid.tilt_deg or grid.positions is not None else 0
    _check_size(len(slices), num_rows(grid, first.rows), first.columns, max_bytes, corrected)
    hu = np.empty((len(slices), first.rows, first.columns), np.int16)
    num_padded = num_clipped = 0
    for header, plane in zip(slices, isolated.read_slices(slices, pool, hu), strict=True):
        num_padded += _fill_padding(plane, header)
        num_clipped += _may_be_clipped(plane, header)
    hu, affine, offsets = regrid(hu, grid)
    nearest = np.rint(positions).astype(int)
    stored = tuple(StoredSlice(slices[z].sop_instance_uid, slices[z].frame, float(offsets[z])) for z in nearest)
    warnings = [*series.warnings]
    warnings += ["DUPLICATE_DROPPED"] if num_duplicates else []
    warnings += ["PADDING_TO_AIR"] if num_padded else []
    warnings += ["HU_CLIPPED"] if num_clipped else []
    warnings += ["LOSSY_COMPRESSED"] if any(it.lossy or it.transfer_syntax in LOSSY for it in slices) else []
    warnings += ["TILT_CORRECTED"] if grid.tilt_deg else []
    warnings += ["UNEVEN_RESAMPLED"] if grid.positions is not None else []
    said = first.said_spacing_mm
    warnings += ["SLICE_GAPS"] if said and np.linalg.norm(affine[:3, 2]) > GAP_FACTOR * said else []
    warnings += ["NOT_AXIAL"] if np.argmax(np.abs(directions[:, 2])) != 2 else []
    axial = abs(directions[2, 2]) > np.cos(np.radians(TILT_TOLERANCE_DEG))
    if axial and abs(first.gantry_tilt_deg or 0.0) > TILT_TOLERANCE_DEG and not grid.tilt_deg:
        warnings.append("TILT_TAG_IGNORED")
    return Volume(hu=hu, affine=affine), stored, tuple(warnings)


def _check_size(depth: int, rows: int, columns: int, max_bytes: int, corrected: int = 0) -> None:
    """Of the slices that are read, and of the corrected ones that are made of them and lie beside them for a time."""
    if (depth + corrected) * rows * columns * 2 > max_bytes:
        made = f" and {corrected} made of them" if corrected else ""
        size = f"{depth} slices{made} of {rows} x {columns} pixels (0028,0010), (0028,0011)"
        raise Refusal("TOO_LARGE", f"{size} exceed {max_bytes >> 20} MiB; split the series")


def _may_be_clipped(hu: Int16[np.ndarray, "h w"], header: Header) -> bool:
    """Whether a slice reaches the end of 16-bit integers and its stored values can go beyond."""
    slope, intercept = header.rescale_slope or 1, header.rescale_intercept or 0
    low = -(2 ** (header.bits_stored - 1)) if header.pixel_representation == 1 else 0
    ends = sorted(slope * value + intercept for value in (low, low + 2**header.bits_stored - 1))
    return bool((ends[0] < INT16.min and hu.min() == INT16.min) or (ends[1] > INT16.max and hu.max() == INT16.max))


def _fill_padding(hu: Int16[np.ndarray, "h w"], header: Header) -> int:
    """Make air of padding that would pass for the brightest metal, in place; returns the number of pixels."""
    if not header.pixel_padding_bits:
        return 0
    if wide_padding(header) is not None:  # air already, as it was read
        return int((hu == AIR_HU).sum())
    bits = np.array(header.pixel_padding_bits, np.uint16)
    stored = (bits.view(np.int16) if header.pixel_representation == 1 else bits).astype(np.float64)
    values = np.clip(np.rint(stored * (header.rescale_slope or 1) + (header.rescale_intercept or 0)), -32768, 32767)
    if values.min() <= MAX_TISSUE_HU:
        return 0
    padded = (hu >= values.min()) & (hu <= values.max())
    hu[padded] = AIR_HU
    return int(padded.sum())


def _check_alike(slices: Sequence[Header]) -> None:
    """Complete geometry; one patient, study and frame of reference; one size, pixel spacing and orientation."""
    first = slices[0]
    for header in slices:
        _check_geometry(header, first)
        for what, mine, others in (
            ("Patient ID (0010,0020)", header.patient_id, first.patient_id),
            ("Study Instance UID (0020,000D)", header.study_instance_uid, first.study_instance_uid),
            ("Frame of Reference UID (0020,0052)", header.frame_of_reference_uid, first.frame_of_reference_uid),
        ):
            if mine != others:
                detail = f"{header.label} has another {what} than {first.label}"
                raise Refusal("MIXED_SERIES", f"{detail}; give each series a Series Instance UID of its own")
        if (header.rows, header.columns) != (first.rows, first.columns):
            raise Refusal(
                "MIXED_SIZE",
                f"{header.label} has {header.rows} x {header.columns} pixels (0028,0010 and 0028,0011), "
                f"{first.label} {first.rows} x {first.columns}; export each stack as a series of its own",
            )
        spacings = (header.pixel_spacing_yx_mm, first.pixel_spacing_yx_mm)
        if not _are_alike(*spacings, relative=True):
            mine, others = (f"{y:g} x {x:g} mm" for y, x in spacings)
            raise Refusal(
                "MIXED_SPACING",
                f"{header.label} has Pixel Spacing (0028,0030) {mine}, {first.label} {others}; "
                "export each stack as a series of its own",
            )
        if not _are_alike(header.image_orientation_patient, first.image_orientation_patient):
            raise Refusal(
                "MIXED_ORIENTATION",
                f"{header.label} has another Image Orientation (Patient) (0020,0037) than {first.label}; "
                "export each stack as a series of its own",
            )


def _are_alike(values: Sequence[float], others: Sequence[float], relative: bool = False) -> bool:
    return all(
        abs(value - other) <= ALIKE * (other if relative else 1) for value, other in zip(values, others, strict=True)
    )


def _check_geometry(header: Header, first: Header) -> None:
    for keyword, value in (
        ("Image Position (Patient) (0020,0032)", header.image_position_patient),
        ("Image Orientation (Patient) (0020,0037)", header.image_orientation_patient),
        ("Pixel Spacing (0028,0030)", header.pixel_spacing_yx_mm),
    ):
        if not value:
            raise Refusal("MISSING_GEOMETRY", f"{header.label} has no {keyword}; export the original CT images")
    if not all(abs(value) <= MAX_POSITION_MM for value in header.image_position_patient):  # also NaN
        detail = f"Image Position (Patient) (0020,0032) is not finite or beyond {MAX_POSITION_MM:g} mm"
        raise Refusal("BAD_GEOMETRY", f"{header.label}: {detail}; export the original CT images")
    if header is first or header.image_orientation_patient != first.image_orientation_patient:
        direction_cosines(header.image_orientation_patient, header.label)
    check_pixel_spacing(header.pixel_spacing_yx_mm, header.label)


def _check_one_acquisition(slices: list[Header]) -> None:
    """Slices are not interpolated between two phases or reconstructions."""
    if element := alternating_element(slices):
        raise Refusal(
            "UNEVEN_SPACING",
            f"slices that differ in {element} lie between one another, and none of them make an even stack; nothing is "
            "interpolated between acquisitions; export each as a series of its own",
        )


def _ordered(slices: Sequence[Header], directions: Float[np.ndarray, "3 3"], pool: Pool) -> tuple[list[Header], int]:
    """Ascending along the normal, each position once; the number of slices dropped because they were there twice."""
    distances = np.array([header.image_position_patient for header in slices]) @ directions[:, 2]
    order = np.argsort(distances, kind="stable")
    ordered = [slices[index] for index in order]
    twice: set[int] = set()
    for first, *others in same_positions(distances[order]):
        kept = ordered[first]
        room = np.empty((1 + len(others), kept.rows, kept.columns), np.int16)
        hu, *other_hu = isolated.read_slices([ordered[index] for index in (first, *others)], pool, room)
        for index, same in zip(others, other_hu, strict=True):
            other = ordered[index]
            aside = np.abs(np.subtract(kept.image_position_patient, other.image_position_patient)).max()
            if aside > POSITION_TOLERANCE_MM or not np.array_equal(hu, same):
                raise Refusal(
                    "DUPLICATE_SLICE",
                    f"{kept.label} and {other.label} lie in one plane (0020,0032) and are not the same image; export "
                    "each acquisition as a series of its own",
                )
            twice.add(index)
    return [header for index, header in enumerate(ordered) if index not in twice], len(twice)
