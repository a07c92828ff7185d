"""Any folder of DICOM: every CT series under it, with the lesions that RT Structure Sets outline on it."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from mp3d.config import GeometryPolicy
from mp3d.data.decode import shared_pool
from mp3d.data.dicom import Header, SeriesFiles, group_series, load_volume
from mp3d.data.masks import boxes_from_mask
from mp3d.data.rtstruct import LESION_ROI, StructureSet, mask_from_contours, read_isolated
from mp3d.data.series import CTSeries, Truth
from mp3d.data.source import Item, Source
from mp3d.errors import ConfigError, Refusal

READER = "dicom/2"


def read_dicom(
    root: Path,
    roi: str = LESION_ROI,
    tilt: Literal["refuse", "shear"] = "refuse",
    uneven: Literal["refuse", "resample"] = "refuse",
    dataset: str = "dicom",
) -> Source:
    """CT series in DICOM, annotated by RT Structure Sets.

    A structure set belongs to the series it names, else to the series of its frame of reference. A series with one was
    searched: its slices without a contour hold nothing. A series without one was not.

    Args:
        root: folder, searched through all subfolders; links are followed.
        roi: regular expression; regions whose name it finds are lesions.
        tilt: a stack that a tilted gantry sheared: refuse it, or shift its rows back.
        uneven: uneven slice spacing: refuse it, or interpolate an even one where no gap is too wide for it.
        dataset: name of the data set.

    Raises:
        ConfigError: ``roi`` is no regular expression.
    """
    try:
        re.compile(roi)
    except re.error as error:
        raise ConfigError(f"roi {roi!r} is no regular expression: {error}") from error
    policy = GeometryPolicy(tilt=tilt, uneven=uneven)
    listing = group_series(root.absolute(), policy)
    refused = listing.refused
    structure_sets: dict[str, list[Header]] = {series.key: [] for series in listing.series}
    num_unattached = 0
    for header in listing.objects:
        if header.modality != "RTSTRUCT":
            continue
        try:
            outlined = _outlined(read_isolated(header, roi, shared_pool()), listing.series)
        except Refusal as refusal:
            refused.append((header.name, refusal))
            continue
        for series in outlined:
            structure_sets[series.key].append(header)
        num_unattached += not outlined
    items = [
        Item(
            key=series.key,
            patient=series.patient,
            split=None,
            load=partial(load_series, series, tuple(structure_sets[series.key]), roi, policy),
        )
        for series in listing.series
    ]
    return Source(
        dataset=dataset,
        reader=READER,
        class_names=("lesion",),
        items=tuple(sorted(items, key=lambda item: item.key)),
        refused=tuple(sorted(refused, key=lambda entry: entry[0])),
        options={"roi": roi, "tilt": tilt, "uneven": uneven},
        notes=(f"{num_unattached} RT Structure Sets belong to no series here",) if num_unattached else (),
    )


def load_series(series: SeriesFiles, structure_sets: Sequence[Header], roi: str, policy: GeometryPolicy) -> CTSeries:
    """Read one series with the contours of its structure sets.

    Contours are in millimetres, so they lie right on a stack that was sheared back. On interpolated slices nobody drew.

    Raises:
        Refusal: as :func:`~mp3d.data.dicom.load_volume`, ``BAD_STRUCTURE_SET`` or ``CONTOUR_OFF_PLANE``.
    """
    volume, _, warnings = load_volume(series, policy)
    regions = [region for header in structure_sets for region in read_isolated(header, roi, shared_pool()).regions]
    truths = tuple(Truth() for _ in volume.hu)
    if regions and "UNEVEN_RESAMPLED" in warnings:
        detail = "contours (3006,0050) lie on uneven slices, which were interpolated to even ones"
        raise Refusal("CONTOUR_OFF_PLANE", f"{detail}; resample both before, or leave the series out")
    if regions:
        mask, num_outside = mask_from_contours(regions, volume)
        truths = tuple(Truth(*boxes_from_mask(plane), mask=plane) for plane in mask)
        if num_outside:
            warnings += ("CONTOUR_OUTSIDE_DROPPED",)
    elif structure_sets:
        warnings += ("ROI_NOT_FOUND",)
    return CTSeries(series.patient, series.study, series.series, volume, truths, warnings=warnings)


def _outlined(structure_set: StructureSet, listed: Sequence[SeriesFiles]) -> list[SeriesFiles]:
    """The series that a structure set belongs to."""
    if structure_set.series_instance_uids:
        return [series for series in listed if series.series_instance_uid in structure_set.series_instance_uids]
    return [series for series in listed if series.frame_of_reference_uid in structure_set.frame_of_reference_uids]
