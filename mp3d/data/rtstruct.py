"""RT Structure Sets: the contours of the regions that outline lesions, and their mask on a series' own grid."""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from mp3d.data.decode import Pool, Request
from mp3d.data.dicom.elements import check_structure, open_body
from mp3d.data.dicom.header import Header
from mp3d.data.dicom.isolated import as_header, as_plain
from mp3d.data.masks import fill_contours
from mp3d.data.series import Volume
from mp3d.errors import Refusal

LESION_ROI = r"(?i)gtv|lesion|tumou?r|neoplas|nodule|mass|metasta"
"""Names of regions that outline a lesion, rather than an organ or a treatment volume."""
PLANE_TOLERANCE = 0.25
"""A contour may lie off its slice by this share of the slice spacing."""

Contour = Float[np.ndarray, "_ 3"]


@dataclass(frozen=True)
class StructureSet:
    """What one structure set outlines.

    Attributes:
        series_instance_uids: the series it refers to; empty where it names none.
        frame_of_reference_uids: the frames of reference of its contours.
        regions: the closed planar contours of each matching region, LPS millimetres.
    """

    series_instance_uids: frozenset[str]
    frame_of_reference_uids: frozenset[str]
    regions: tuple[tuple[Contour, ...], ...]


def read_structure_set(header: Header, roi: str = LESION_ROI) -> StructureSet:
    """Read the regions whose name the regular expression ``roi`` finds.

    Raises:
        Refusal: ``BAD_STRUCTURE_SET``.
    """
    if header.cut:
        raise Refusal("BAD_STRUCTURE_SET", "the RT Structure Set ends inside an element; copy or export it again")
    body = open_body(header.source)
    with body.file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values, which may name a patient
        try:
            check_structure(body)
            return _structure_set(read_dataset(body.file, body.implicit_vr, body.little_endian), re.compile(roi))
        except Refusal as refusal:
            raise Refusal("BAD_STRUCTURE_SET", refusal.detail) from refusal
        except Exception as error:  # pydicom raises whatever its parsing of broken bytes runs into
            detail = f"the RT Structure Set cannot be parsed ({type(error).__name__}); export it again"
            raise Refusal("BAD_STRUCTURE_SET", detail) from error


def read_isolated(header: Header, roi: str, pool: Pool) -> StructureSet:
    """:func:`read_structure_set` in a worker.

    Raises:
        Refusal: as there and :meth:`~mp3d.data.decode.Pool.call`.
    """
    arguments = {"header": as_plain(header), "roi": roi}
    sent, points, _ = pool.call(Request("read_structure_set", header.source, arguments, "the RT Structure Set"))
    ends = np.cumsum([count for region in sent["regions"] for count in region])
    contours = iter(np.split(points.astype(np.float64).reshape(-1, 3), ends[:-1]) if len(ends) else [])
    return StructureSet(
        series_instance_uids=frozenset(map(str, sent["series_instance_uids"])),
        frame_of_reference_uids=frozenset(map(str, sent["frame_of_reference_uids"])),
        regions=tuple(tuple(next(contours) for _ in region) for region in sent["regions"]),
    )


def structure_set_task(
    source: Path | bytes, header: dict[str, Any], roi: str
) -> tuple[dict[str, Any], Float[np.ndarray, "n 3"]]:
    """What a worker does for :func:`read_isolated`: references and the lengths of contours; the points of all."""
    read = read_structure_set(as_header(header, source), roi)
    contours = [contour for region in read.regions for contour in region]
    lengths = [[len(contour) for contour in region] for region in read.regions]
    uids = {name: sorted(getattr(read, name)) for name in ("series_instance_uids", "frame_of_reference_uids")}
    return uids | {"regions": lengths}, np.concatenate([np.empty((0, 3)), *contours])


def mask_from_contours(regions: Sequence[Sequence[Contour]], volume: Volume) -> tuple[UInt8[np.ndarray, "d h w"], int]:
    """Fill contours on a volume's grid: even-odd within a region, added up over regions.

    Returns:
        1 inside any region; the number of contours above or below the volume, which are left out.

    Raises:
        Refusal: ``CONTOUR_OFF_PLANE``.
    """
    depth, height, width = volume.hu.shape
    to_index = np.linalg.inv(volume.affine)
    mask = np.zeros((depth, height, width), np.uint8)
    num_outside = 0
    for region in regions:
        on_slice: dict[int, list[Float[np.ndarray, "_ 2"]]] = {}
        for contour in region:
            points = contour @ to_index[:3, :3].T + to_index[:3, 3]
            z = round(float(points[:, 2].mean()))
            off = float(np.abs(points[:, 2] - z).max())
            if not 0 <= z < depth:
                num_outside += 1
            elif off > PLANE_TOLERANCE:
                raise Refusal(
                    "CONTOUR_OFF_PLANE",
                    f"a contour (3006,0050) lies up to {off:.2f} slice spacings off slice {z + 1} of {depth}, allowed "
                    f"are {PLANE_TOLERANCE}; resample the structure set onto this series",
                )
            else:
                on_slice.setdefault(z, []).append(points[:, :2])
        for z, contours in on_slice.items():
            mask[z][fill_contours(contours, (height, width))] = 1
    return mask, num_outside


def _structure_set(dataset: Dataset, roi: re.Pattern[str]) -> StructureSet:
    numbers = {item.ROINumber for item in dataset.StructureSetROISequence if roi.search(item.get("ROIName") or "")}
    regions = [
        tuple(_closed_contours(item))
        for item in dataset.get("ROIContourSequence") or []
        if item.ReferencedROINumber in numbers
    ]
    frames = dataset.get("ReferencedFrameOfReferenceSequence") or []
    references = [
        series.SeriesInstanceUID
        for frame in frames
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    ]
    frame_uids = [item.get("FrameOfReferenceUID") for item in (dataset, *frames)]
    return StructureSet(
        series_instance_uids=frozenset(str(uid) for uid in references if uid),
        frame_of_reference_uids=frozenset(str(uid) for uid in frame_uids if uid),
        regions=tuple(region for region in regions if region),
    )


def _closed_contours(item: Dataset) -> Iterator[Contour]:
    for contour in item.get("ContourSequence") or []:
        if str(contour.ContourGeometricType).startswith("CLOSED"):
            points = np.array(contour.ContourData, np.float64).reshape(-1, 3)
            if not np.isfinite(points).all():
                raise ValueError("a contour point is not finite")
            yield points
