"""The cubes around the nodules of one CT of LIDC-IDRI, an item each: to segment the nodules, or to classify them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from mp3d.data.dicom import Header, SeriesFiles, load_volume
from mp3d.data.lidc_annotations import Reading
from mp3d.data.lidc_consensus import MalignancyRule, Nodule, find_nodules
from mp3d.data.lidc_series import Agreement, nodule_at_hand, nodule_truths, slice_numbers, spacing_mm
from mp3d.data.series import CTSeries, Volume
from mp3d.data.source import Item
from mp3d.errors import Refusal

INDETERMINATE = 3
"""Malignancy below it is benign, above it malignant."""
CLASSES = ("benign", "malignant")


@dataclass(frozen=True)
class ClassRule:
    """How the ratings of a nodule's readers become one, and what a nodule in the middle is."""

    malignancy: MalignancyRule
    indeterminate: Literal["drop", "benign", "malignant"]

    def label(self, nodule: Nodule) -> int | None:
        """0 benign, 1 malignant; None: the nodule is not used."""
        rating = nodule.malignancy(self.malignancy)
        if rating is None:
            return None
        if rating == INDETERMINATE:
            return None if self.indeterminate == "drop" else CLASSES.index(self.indeterminate)
        return int(rating > INDETERMINATE)


@dataclass(frozen=True)
class Crop:
    """The pixels ``x1 <= x < x2``, ``y1 <= y < y2`` of some slices of a series.

    Attributes:
        number: of its nodule in the series, from 1.
        first_index: number of its first slice in the series.
    """

    number: int
    x1: int
    y1: int
    x2: int
    y2: int
    first_index: int


def nodule_cubes(
    series: SeriesFiles,
    reading: Reading | Refusal,
    agreement: Agreement,
    classes: ClassRule | None,
    crop_mm: float,
    notes: Counter[str],
) -> Iterator[Item]:
    """One item for each nodule that counts. With classes it shows its own nodule only, else all that count.

    Args:
        notes: what was left out is counted here.

    Raises:
        Refusal: ``BAD_ANNOTATION``, ``MISSING_GEOMETRY``, ``BAD_SPACING`` or ``CONTOUR_OFF_PLANE``.
    """
    if isinstance(reading, Refusal):
        raise reading
    counted: list[tuple[Nodule, int]] = []
    cubes: list[tuple[SeriesFiles, Crop, int | None, set[str]]] = []
    for number, whole in enumerate(find_nodules(reading.annotations, spacing_mm(series.slices)), 1):
        nodule, codes = nodule_at_hand(whole, series.slices)
        cube, crop = crop_around(series, whole.centre, crop_mm, number)
        label = classes and classes.label(whole)
        if whole.num_readers < agreement.min_readers:
            notes["nodules that too few readers outlined, not used"] += 1
        elif not cube.slices or not any(annotation.outlines for annotation in nodule.annotations):
            notes["nodules beyond the slices at hand, not used"] += 1
        elif classes and label is None:
            rated = any(annotation.malignancy is not None for annotation in whole.annotations)
            what = "of indeterminate malignancy" if rated else "whose malignancy nobody rated"
            notes[f"nodules {what}, not used"] += 1
        else:
            counted.append((nodule, 1 if label is None else label + 1))
            cubes.append((cube, crop, label, codes | set(reading.warnings)))
    for own, (cube, crop, label, codes) in zip(counted, cubes, strict=True):
        shown = (own,) if classes else tuple(counted)
        load = partial(load_cube, cube, crop, shown, label, agreement, tuple(sorted(codes)))
        yield Item(f"{series.key}#nodule{crop.number}", series.patient, None, load)


def load_cube(
    series: SeriesFiles,
    crop: Crop,
    nodules: tuple[tuple[Nodule, int], ...],
    image_label: int | None,
    agreement: Agreement,
    codes: tuple[str, ...] = (),
) -> CTSeries:
    """Read a cube; every slice of it has a mask, and boxes where a part of a nodule is large enough for one.

    Args:
        series: the slices of the cube alone.
        nodules: as :func:`nodule_at_hand` gives them, with the labels (from 1) of their boxes and pixels.
        image_label: class of the cube, from 0.
        codes: warnings of its nodule and its reading.

    Raises:
        Refusal: as :func:`~mp3d.data.dicom.load_volume`, or ``BAD_ANNOTATION``.
    """
    whole, _, warnings = load_volume(series)
    numbers = slice_numbers(series.slices, whole)
    part = (slice(crop.y1, crop.y2), slice(crop.x1, crop.x2))
    shown = []
    for nodule, label in nodules:
        planes = nodule.consensus(numbers, (whole.hu.shape[1], whole.hu.shape[2]), agreement.level)
        shown.append(({z: plane[part] for z, plane in planes.items()}, label))
    affine = whole.affine.copy()
    affine[:3, 3] += affine[:3, :2] @ (crop.x1, crop.y1)
    volume = Volume(np.ascontiguousarray(whole.hu[:, *part]), affine)
    depth, rows, columns = volume.hu.shape
    return CTSeries(
        patient=series.patient,
        study=series.study,
        series=f"{series.series}#nodule{crop.number}",
        volume=volume,
        truths=tuple(nodule_truths(shown, depth, (rows, columns))),
        first_index=crop.first_index,
        warnings=(*warnings, *codes),
        image_label=image_label,
    )


def crop_around(
    series: SeriesFiles, centre: tuple[float, float, float], size_mm: float, number: int
) -> tuple[SeriesFiles, Crop]:
    """The slices of a cube as a series of their own (none where it lies beyond them), and its place on them.

    Args:
        centre: column, row, z in mm.
        number: of the nodule.
    """
    first = series.slices[0]
    z_mm = np.array([header.image_position_patient[2] for header in series.slices])
    inside = np.abs(z_mm - centre[2]) <= size_mm / 2
    before = ~inside & (z_mm < centre[2] if _ascends(first) else z_mm > centre[2])
    y_spacing, x_spacing = first.pixel_spacing_yx_mm
    (x1, x2), (y1, y2) = (
        (max(start, 0), min(start + size, limit))
        for place, spacing, limit in ((centre[0], x_spacing, first.columns), (centre[1], y_spacing, first.rows))
        for size in [max(round(size_mm / spacing), 1)]
        for start in [round(place + 0.5 - size / 2)]
    )
    slices = tuple(header for header, is_inside in zip(series.slices, inside, strict=True) if is_inside)
    return replace(series, slices=slices), Crop(number, x1, y1, x2, y2, len(np.unique(z_mm[before])))


def _ascends(header: Header) -> bool:
    """Whether slices in ascending order along their normal ascend in z, too."""
    row, column = np.reshape(header.image_orientation_patient or (1, 0, 0, 0, 1, 0), (2, 3))
    return bool(np.cross(row, column)[2] >= 0)
