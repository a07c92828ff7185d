"""One CT of LIDC-IDRI with what its readers agree on, slice by slice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from mp3d.data.dicom import Header, SeriesFiles, load_volume
from mp3d.data.geometry import POSITION_TOLERANCE_MM, check_pixel_spacing
from mp3d.data.lidc_annotations import Outline, Reading
from mp3d.data.lidc_consensus import Nodule, find_nodules
from mp3d.data.masks import boxes_from_mask
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.errors import Refusal

Planes = dict[int, Bool[np.ndarray, "h w"]]
"""Pixels of a nodule on each slice that it was outlined on."""


@dataclass(frozen=True)
class Agreement:
    """When an outlined nodule counts, and which of its pixels.

    Attributes:
        min_readers: who must have outlined it.
        level: share of those who did that must agree on a pixel.
    """

    min_readers: int
    level: float


def load_series(series: SeriesFiles, reading: Reading | Refusal | None, agreement: Agreement) -> CTSeries:
    """Read a series with its nodules as class 1. Without a reading nobody looked.

    A slice has no truth, neither nodule nor background, where a reader marked something and no nodule that counts has
    a pixel: a small nodule, one that too few readers outlined, an end of one that too few see there. A slice with a
    nodule that counts has its truth, and what else is marked there is background.

    Args:
        reading: a refusal is raised, for without its reading the series would pass for one that nobody searched.

    Raises:
        Refusal: as :func:`~mp3d.data.dicom.load_volume`, ``CONTOUR_OFF_PLANE`` or ``BAD_ANNOTATION``.
    """
    if isinstance(reading, Refusal):
        raise reading
    volume, _, warnings = load_volume(series)
    identity = (series.patient, series.study, series.series)
    if reading is None:
        return CTSeries(*identity, volume, tuple(Truth() for _ in volume.hu), warnings=warnings)
    numbers = slice_numbers(series.slices, volume)
    shape = (volume.hu.shape[1], volume.hu.shape[2])
    small, _ = _at_hand(reading.small, series.slices)
    marked = {numbers[mark.z_mm] for mark in small}
    counted: list[tuple[Planes, int]] = []
    codes = set(reading.warnings)
    for whole in find_nodules(reading.annotations, spacing_mm(series.slices)):
        nodule, tolerated = nodule_at_hand(whole, series.slices)
        planes = nodule.consensus(numbers, shape, agreement.level)
        marked |= planes.keys()
        codes |= tolerated
        if nodule.num_readers >= agreement.min_readers:
            counted.append((planes, 1))
    truths = nodule_truths(counted, len(volume.hu), shape)
    for z in marked:
        if not np.any(truths[z].mask):
            truths[z] = Truth()
            codes.add("UNSETTLED_SLICES")
    return CTSeries(*identity, volume, tuple(truths), warnings=(*warnings, *sorted(codes)))


def nodule_at_hand(nodule: Nodule, slices: Sequence[Header]) -> tuple[Nodule, set[str]]:
    """The nodule with only the outlines on slices that are there, each with that slice's own z; warning codes.

    All annotations stay, for whoever outlined the nodule elsewhere is one of its readers nevertheless.

    Raises:
        Refusal: ``CONTOUR_OFF_PLANE``.
    """
    found = [_at_hand(annotation.outlines, slices) for annotation in nodule.annotations]
    pairs = zip(nodule.annotations, found, strict=True)
    annotations = tuple(replace(annotation, outlines=tuple(outlines)) for annotation, (outlines, _) in pairs)
    codes = {"AMBIGUOUS_NODULE"} if nodule.ambiguous else set()
    if any(num_outside for _, num_outside in found):
        codes.add("CONTOUR_OUTSIDE_DROPPED")
    return Nodule(annotations), codes


def nodule_truths(nodules: Sequence[tuple[Planes, int]], depth: int, shape: tuple[int, int]) -> list[Truth]:
    """A box for each connected part of each nodule on each slice; boxes are unknown where no part is large enough.

    Args:
        nodules: with the label of their pixels and boxes, from 1; their boxes are the instances 1, 2, ...
    """
    truths: list[Truth] = []
    for z in range(depth):
        mask = np.zeros(shape, np.uint8)
        found = [boxes_from_mask(mask)]
        counts = [0]
        for planes, label in nodules:
            if z in planes:
                mask[planes[z]] = label
                found.append(boxes_from_mask(planes[z] * np.uint8(label)))
            counts.append(len(found[-1][0]) if z in planes else 0)
        boxes, labels = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        instances = np.repeat(np.arange(len(counts)), counts)
        truths.append(Truth(mask=mask) if mask.any() and not len(boxes) else Truth(boxes, labels, mask, instances))
    return truths


def slice_numbers(slices: Sequence[Header], volume: Volume) -> dict[float, int]:
    """Which slice of the volume lies at the z of each header."""
    positions = np.array([header.image_position_patient for header in slices]) - volume.affine[:3, 3]
    normal = volume.affine[:3, 2]
    numbers = np.rint(positions @ normal / (normal @ normal)).astype(int).tolist()
    return {header.image_position_patient[2]: number for header, number in zip(slices, numbers, strict=True)}


def spacing_mm(slices: Sequence[Header]) -> tuple[float, float, float]:
    """Distance of slices, rows and columns by the headers, before the geometry gate has seen them.

    Raises:
        Refusal: ``MISSING_GEOMETRY`` or ``BAD_SPACING``.
    """
    first = slices[0]
    if not first.pixel_spacing_yx_mm or not all(header.image_position_patient for header in slices):
        detail = "no Image Position (Patient) (0020,0032) or Pixel Spacing (0028,0030)"
        raise Refusal("MISSING_GEOMETRY", f"{detail}; export the original CT images")
    check_pixel_spacing(first.pixel_spacing_yx_mm, first.label)
    steps = np.diff(np.unique([header.image_position_patient[2] for header in slices]))
    steps = steps[steps > POSITION_TOLERANCE_MM]
    y, x = first.pixel_spacing_yx_mm
    return float(np.median(steps)) if len(steps) else 0.0, y, x


def _at_hand(outlines: Sequence[Outline], slices: Sequence[Header]) -> tuple[list[Outline], int]:
    """By SOP Instance UID, or by z where there is none; the number of outlines above and below the slices."""
    by_uid = {header.sop_instance_uid: header.image_position_patient[2] for header in slices}
    all_z = np.array(sorted(by_uid.values()))
    found: list[Outline] = []
    for outline in outlines:
        nearest = float(all_z[np.abs(all_z - outline.z_mm).argmin()])
        if outline.sop_instance_uid in by_uid:
            found.append(replace(outline, z_mm=by_uid[outline.sop_instance_uid]))
        elif not outline.sop_instance_uid and abs(nearest - outline.z_mm) < POSITION_TOLERANCE_MM:
            found.append(replace(outline, z_mm=nearest))
        elif all_z[0] - POSITION_TOLERANCE_MM <= outline.z_mm <= all_z[-1] + POSITION_TOLERANCE_MM:
            detail = "a reader's mark lies between the first and the last slice, but on none that is there"
            raise Refusal("CONTOUR_OFF_PLANE", f"{detail}; fetch the whole series, with the UIDs that it had")
    return found, len(outlines) - len(found)
