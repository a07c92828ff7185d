"""Any folder of DICOM: every CT series under it, with the lesions that structure sets and segmentations mark on it."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from mp3d.config import GeometryPolicy
from mp3d.data import rtstruct, segmentation
from mp3d.data.decode import shared_pool
from mp3d.data.dicom import Header, SeriesFiles, group_series, load_volume
from mp3d.data.masks import truths_from_mask
from mp3d.data.rtstruct import LESION_ROI, StructureSet, mask_from_contours
from mp3d.data.segmentation import Segmentation, mask_from_frames
from mp3d.data.series import CTSeries, Truth
from mp3d.data.source import Item, Source
from mp3d.errors import ConfigError, Refusal

READER = "dicom/4"
ANNOTATIONS = ("RTSTRUCT", "SEG")
"""Modalities of the objects that mark lesions."""


def read_dicom(
    root: Path,
    roi: str = LESION_ROI,
    tilt: Literal["refuse", "shear"] = "refuse",
    uneven: Literal["refuse", "resample"] = "refuse",
    dataset: str = "dicom",
) -> Source:
    """CT series in DICOM, annotated by RT Structure Sets (RTSTRUCT) and segmentations (SEG).

    Either belongs to the series it names, else to the series of its frame of reference. A series with one was searched:
    its slices without a region hold nothing. A series without one was not.

    Args:
        root: folder, searched through all subfolders; links are followed.
        roi: regular expression; regions whose name, and segments whose label or type it finds are lesions.
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
    annotations: dict[str, list[Header]] = {series.key: [] for series in listing.series}
    num_unattached = 0
    for header in listing.objects:
        if header.modality not in ANNOTATIONS:
            continue
        try:
            marked = _marked(header, roi, listing.series)
        except Refusal as refusal:
            refused.append((header.name, refusal))
            continue
        for series in marked:
            annotations[series.key].append(header)
        num_unattached += not marked
    items = [
        Item(
            key=series.key,
            patient=series.patient,
            split=None,
            load=partial(load_series, series, tuple(annotations[series.key]), roi, policy),
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
        notes=(f"{num_unattached} structure sets or segmentations belong to no series here",) if num_unattached else (),
    )


def load_series(series: SeriesFiles, annotations: Sequence[Header], roi: str, policy: GeometryPolicy) -> CTSeries:
    """Read one series with the regions of its structure sets and segmentations, added up.

    Contours are in millimetres, so they lie right on a stack that was sheared back; the pixels of a segmentation do
    not. On interpolated slices nobody drew.

    Raises:
        Refusal: as :func:`~mp3d.data.dicom.load_volume`, :func:`~mp3d.data.rtstruct.read_structure_set`,
            :func:`~mp3d.data.rtstruct.mask_from_contours`, :func:`~mp3d.data.segmentation.read_segmentation` or
            :func:`~mp3d.data.segmentation.mask_from_frames`.
    """
    volume, stored, warnings = load_volume(series, policy)
    found = [_read(header, roi) for header in annotations]
    outlined = [annotation for annotation in found if isinstance(annotation, StructureSet)]
    segmented = [annotation for annotation in found if isinstance(annotation, Segmentation)]
    regions = [region for structure_set in outlined for region in structure_set.regions]
    num_segments = sum(segmentation.num_segments for segmentation in segmented)
    truths = tuple(Truth() for _ in volume.hu)
    if regions and "UNEVEN_RESAMPLED" in warnings:
        detail = "contours (3006,0050) lie on uneven slices, which were interpolated to even ones"
        raise Refusal("CONTOUR_OFF_PLANE", f"{detail}; resample both before, or leave the series out")
    if num_segments and {"UNEVEN_RESAMPLED", "TILT_CORRECTED"}.intersection(warnings):
        detail = "a segmentation lies on slices that were interpolated to even ones or sheared back"
        raise Refusal("MASK_MISMATCH", f"{detail}; resample both before, or leave the series out")
    if regions or num_segments:
        mask, num_outside = mask_from_contours(regions, volume)
        frames = [frame for segmentation in segmented for frame in segmentation.frames]
        segments, num_frames_outside = mask_from_frames(frames, volume, stored)
        truths = truths_from_mask(mask | segments)
        if num_outside + num_frames_outside:
            warnings += ("CONTOUR_OUTSIDE_DROPPED",)
    elif annotations:
        warnings += ("ROI_NOT_FOUND",)
    return CTSeries(series.patient, series.study, series.series, volume, truths, warnings=warnings)


def _marked(header: Header, roi: str, listed: Sequence[SeriesFiles]) -> list[SeriesFiles]:
    """The series that a structure set or segmentation belongs to."""
    annotation = _read(header, roi)
    if annotation.series_instance_uids:
        return [series for series in listed if series.series_instance_uid in annotation.series_instance_uids]
    return [series for series in listed if series.frame_of_reference_uid in annotation.frame_of_reference_uids]


def _read(header: Header, roi: str) -> StructureSet | Segmentation:
    """What a structure set or segmentation marks, read in a worker."""
    read = rtstruct.read_isolated if header.modality == "RTSTRUCT" else segmentation.read_isolated
    return read(header, roi, shared_pool())
