"""The files of a folder or archive to CT series, by their headers alone."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from pydicom import uid

from mp3d.config import GeometryPolicy
from mp3d.data.decode import Pool, shared_pool
from mp3d.data.dicom import isolated
from mp3d.data.dicom.acquisitions import slice_normal, split_by_acquisition, split_by_spacing
from mp3d.data.dicom.header import Header
from mp3d.data.dicom.pixels import check_pixel_format
from mp3d.data.files import walk
from mp3d.data.geometry import MIN_SLICES
from mp3d.errors import Refusal

LOCALIZER_ANGLE_DEG = 45.0
"""An image that stands further off the main stack than this is a localizer, whatever its Image Type."""
LOCALIZERS = re.compile(r"\b(LOCALI[SZ]ER|SCOUT|SCANOGRAM|TOPOGRAM|CT_SOM\d+ TOP\b)")
"""Values of Image Type of localizers, whatever else stands beside these words."""
MAX_LOCALIZERS = 6
"""More images than this in another orientation are no localizers but a second stack."""
MAX_SHEETS = 3
"""More images than this without position and orientation are no dose sheets but slices that lost them."""
PROJECTIONS = re.compile(
    r"(?<![A-Z])((T|TIME|MIN|MAX|M)?MIP|(MIN|MAX)[ _]?IP|PROJECTION|MAXIMUM|MINIMUM|VRT|VOLREN|SSD|SURFACE"
    r"|(VOLUME)?RENDER(ED|ING)|SUBTRACT(ION|ED)?|DIVISION|MULTIPLICATION|STD_DEVIATION|CPR|CURVED"
    r"|SCREEN[ _]?(SAVE|SHOT)|CAPTURE|DOSE_INFO|PROT(OCOL)?|PERFUSION|CBF|CBV|MTT|TTP|TMAX|PBV"
    r"|EFF_Z|Z_EFF|RHO_Z|RHO|ELECTRON_DENSITY|DE_MATERIAL|MATERIAL|IODINE|MD|EFF_ATOMIC_NUM"
    r"|MAT_(FRACTIONAL|VALUE_BASED|SPECIFIC)|SEGMENTATION|TEXT_?REPORT|OVERLAY|BLENDING)(?![A-Z])"
)
"""Words in values of Image Type (PS3.3 C.7.6.1.1.2, C.8.15.2.1.1) or Frame Type of images that are no slice of the
patient in Hounsfield units. Plain DERIVED or SECONDARY is none: many scanners and archives write it on their slices."""
SLICE_TECHNIQUES = frozenset({"VOLUME", "SAMPLED", "MIXED", "NONE", "MPR", "MEAN_IP", "FILTERED"})
"""Volumetric Properties and Volume Based Calculation Technique of frames that are slices in Hounsfield units; a
projection or a curved reformat says another."""

LISTING_WORKERS = min(4, os.cpu_count() or 1)
"""For the headers of a folder; more would wait for the one process that groups them."""

BEFORE_GROUPING = frozenset(
    {"UNREADABLE", "TRUNCATED", "BAD_HEADER", "DECODE_CRASHED", "DECODE_LIMIT", "DECODE_FAILED"}
)
"""Why a file may be refused before it is known of which series it is."""

OBJECT_MODALITIES = frozenset(
    {"RTSTRUCT", "SEG", "SR", "PR", "KO", "RTDOSE", "RTPLAN", "RTRECORD", "REG", "FID", "RWV", "DOC", "PLAN"}
)
"""Companions of images, not images: passed on, not refused."""
COMPANION_SUFFIXES = frozenset(
    {
        *(".xml", ".txt", ".csv", ".tsv", ".md", ".json", ".yaml", ".yml", ".html", ".pdf", ".log", ".ini", ".xlsx"),
        *(".jpg", ".jpeg", ".png", ".gif", ".nii", ".gz", ".xz", ".zip", ".nrrd", ".mha", ".sqlite", ".py", ".sh"),
    }
)
COMPANION_NAMES = frozenset({"DICOMDIR", "LICENSE", "README", "ATTRIBUTION", "LOCKFILE", "VERSION"})
"""Files that lie beside DICOM; passed over where they are no DICOM themselves, as hidden files are."""


@dataclass(frozen=True)
class SeriesFiles:
    """The files of one CT series (or of one acquisition in it), not yet ordered or checked.

    Attributes:
        key: name of its first file (and frame); unique in the listing.
        patient: the unit of splitting: Patient ID, or what stands for it.
        study: Study Instance UID, or what stands for it.
        series: Series Instance UID, or what stands for it; unique in the listing.
        warnings: codes of :data:`~mp3d.data.reasons.WARNINGS`.
    """

    key: str
    patient: str
    study: str
    series: str
    slices: tuple[Header, ...]
    warnings: tuple[str, ...] = ()

    @property
    def series_instance_uid(self) -> str:
        return self.slices[0].series_instance_uid

    @property
    def frame_of_reference_uid(self) -> str:
        return self.slices[0].frame_of_reference_uid


class Listing(NamedTuple):
    """CT series; what was refused, by name; DICOM objects that are no images, such as RT Structure Sets."""

    series: list[SeriesFiles]
    refused: list[tuple[str, Refusal]]
    objects: list[Header]


def group_series(
    files: Path | Mapping[str, bytes], policy: GeometryPolicy | None = None, pool: Pool | None = None
) -> Listing:
    """Read the headers of all files under a folder, or of named bytes, and group them into CT series.

    A series is one Series Instance UID without its localizers and projections. Phases or reconstructions of one range
    are split by the first of several elements (``split_by_acquisition``) that tells them apart, whether their positions
    repeat or alternate. Where the slices are uneven and ``policy`` does not have them resampled, it is split by Image
    Type or Convolution Kernel if that makes them even: stacks of several spacings. A broken file is refused alone;
    whether the rest is a regular stack is for ``load_volume`` to say. The files are parsed by ``pool``, or the
    process' own; those of a folder on several cores.
    """
    policy = policy or GeometryPolicy()
    pool = pool or shared_pool(LISTING_WORKERS if isinstance(files, Path) else 1)
    listing = Listing([], [], [])
    groups: dict[tuple, list[Header]] = defaultdict(list)
    for name, images in isolated.image_headers(_sources(files), pool):
        if isinstance(images, Refusal):
            if images.reason != "NOT_DICOM" or not _is_companion(name):
                listing.refused.append((name, images))
            continue
        header = images[0]
        if header.modality in OBJECT_MODALITIES or header.sop_class_uid == uid.MediaStorageDirectoryStorage:
            listing.objects.append(header)
        else:
            groups[_series_key(header)] += images
    for headers in groups.values():
        series, refused = _group(headers, policy)
        listing.series.extend(series)
        listing.refused.extend(refused)
    broken = {PurePosixPath(name).parent for name, refusal in listing.refused if refusal.reason in BEFORE_GROUPING}
    listing.series[:] = [_beside(series, broken) for series in listing.series]
    return listing


def _beside(series: SeriesFiles, broken: Container[PurePosixPath]) -> SeriesFiles:
    """With a warning where a file in its folder was refused that may have been of this series: at an end of the stack
    it leaves no gap."""
    if "BROKEN_FILE_DROPPED" in series.warnings or PurePosixPath(series.slices[0].name).parent not in broken:
        return series
    return replace(series, warnings=(*series.warnings, "BROKEN_FILE_DROPPED"))


def _sources(files: Path | Mapping[str, bytes]) -> Iterator[tuple[str, Path | bytes]]:
    if isinstance(files, Path):
        for path in walk(files):
            yield path.relative_to(files).as_posix(), path
    else:
        yield from sorted(files.items())


def _is_companion(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in COMPANION_SUFFIXES or path.name in COMPANION_NAMES or path.name.startswith(".")


def _series_key(header: Header) -> tuple:
    """Over-anonymised files have no Series Instance UID, or all the same and nothing else that tells them apart; that
    must not make one series of them all."""
    folder = PurePosixPath(header.name).parent
    if header.series_instance_uid:
        tells = header.patient_id or header.study_instance_uid or header.frame_of_reference_uid
        return (header.series_instance_uid, None if tells else folder)
    orientation = tuple(round(value, 1) + 0.0 for value in header.image_orientation_patient)
    return (folder, header.frame_of_reference_uid, header.rows, header.columns, orientation)


def _group(headers: list[Header], policy: GeometryPolicy) -> tuple[list[SeriesFiles], list[tuple[str, Refusal]]]:
    """The CT series among the images of one Series Instance UID, and what of them is refused."""
    refused: list[tuple[str, Refusal]] = []
    warnings = [] if headers[0].series_instance_uid else ["EMPTY_SERIES_UID"]

    headers, others = _partition(headers, lambda header: header.is_ct)
    if others:
        detail = (
            f"{len(others)} files, the first {others[0].label}, of another Modality (0008,0060) or class (0008,0016), "
            "or without Hounsfield units; leave them out"
        )
        refused.append((others[0].name, Refusal("NOT_CT", detail)))
    headers, broken = _whole_files(headers)
    refused += broken
    headers, projections = _partition(headers, _is_slice)
    headers, sheets = _without_sheets(headers)
    projections += sheets
    if projections:
        warnings.append("PROJECTION_DROPPED")
    stack, localizers = _without_localizers(headers)
    if localizers:
        warnings.append("LOCALIZER_DROPPED")
    if localizers and not stack:
        detail = f"{len(localizers)} localizers (0008,0008) and no slices; choose the axial series"
        refused.append((localizers[0].name, Refusal("LOCALIZER_ONLY", detail)))
    elif projections and not stack:
        detail = f"{len(projections)} projections or captures (0008,0008) and no slices; choose the axial series"
        refused.append((projections[0].name, Refusal("PROJECTION_ONLY", detail)))
    if not stack:
        return [], refused
    if broken:
        warnings.append("BROKEN_FILE_DROPPED")
    if not stack[0].patient_id:
        warnings.append("UNKNOWN_PATIENT")
    parts = split_by_acquisition(stack)
    if len(parts) > 1:
        warnings.append("SPLIT_BY_ACQUISITION")
    elif policy.uneven == "refuse" and len(parts := split_by_spacing(stack)) > 1:
        warnings.append("SPLIT_BY_SPACING")
    return [_series_files(part, number, warnings) for number, part in enumerate(parts)], refused


def _series_files(slices: Sequence[Header], part: int, warnings: Iterable[str]) -> SeriesFiles:
    first = slices[0]
    folder = str(PurePosixPath(first.name).parent)
    key = f"{first.name}#{first.frame}" if first.frame else first.name
    series = first.series_instance_uid or key
    return SeriesFiles(
        key=key,
        patient=first.patient_id or first.study_instance_uid or first.frame_of_reference_uid or folder,
        study=first.study_instance_uid or first.frame_of_reference_uid or folder,
        series=f"{series}#{part}" if part else series,
        slices=tuple(slices),
        warnings=(*warnings, *(["MIXED_RECONSTRUCTION"] if len(set(map(_made_alike, slices))) > 1 else [])),
    )


def _made_alike(header: Header) -> tuple[str, ...]:
    """What slices of one scan have in common."""
    return (header.convolution_kernel, header.image_type[0], header.contrast_agent, header.tube_voltage)


def _partition(headers: Iterable[Header], test: Callable[[Header], bool]) -> tuple[list[Header], list[Header]]:
    passed: list[Header] = []
    failed: list[Header] = []
    for header in headers:
        (passed if test(header) else failed).append(header)
    return passed, failed


def _is_slice(header: Header) -> bool:
    """By what the image says of how it was made."""
    return not any(map(PROJECTIONS.search, header.image_type)) and SLICE_TECHNIQUES.issuperset(header.made_by)


def _without_sheets(headers: list[Header]) -> tuple[list[Header], list[Header]]:
    """Without the few images that lie nowhere in the patient, among others that do: dose sheets and captures, whose
    Image Type does not always say so."""
    slices, sheets = _partition(
        headers, lambda header: bool(header.image_position_patient or header.image_orientation_patient)
    )
    return (slices, sheets) if len(sheets) <= MAX_SHEETS < len(slices) else (headers, [])


def _whole_files(headers: list[Header]) -> tuple[list[Header], list[tuple[str, Refusal]]]:
    """Without the files whose pixels cannot be read. What is wrong with a whole series alike is one entry."""
    whole: list[Header] = []
    broken: list[tuple[str, Refusal]] = []
    for header in headers:
        try:
            check_pixel_format(header)
        except Refusal as refusal:
            broken.append((header.name, refusal))
        else:
            whole.append(header)
    alike = len({refusal.reason for _, refusal in broken}) == 1
    if alike and len(broken) > 1 and not whole and headers[0].series_instance_uid:
        name, refusal = broken[0]
        broken = [(name, Refusal(refusal.reason, f"{refusal.detail} (all {len(broken)} files of this series)"))]
    return whole, broken


def _without_localizers(headers: list[Header]) -> tuple[list[Header], list[Header]]:
    """The main stack; the localizers, by Image Type, or as the few images that stand across the main stack."""
    stack, localizers = _partition(headers, lambda header: not any(map(LOCALIZERS.search, header.image_type)))
    normals = {(header.name, header.frame): slice_normal(header) for header in stack}
    counts = Counter(normal for normal in normals.values() if normal)
    if len(counts) > 1:
        (main, _), *_ = counts.most_common(1)
        limit = np.cos(np.radians(LOCALIZER_ANGLE_DEG))
        along, across = _partition(
            stack, lambda header: abs(np.dot(normals[header.name, header.frame] or main, main)) >= limit
        )
        axial = [header for header in across if abs(normals[header.name, header.frame][2]) > limit]
        doubtful = len(along) <= MAX_LOCALIZERS and len(axial) >= MIN_SLICES  # those along may be the scouts
        if len(across) <= MAX_LOCALIZERS and len(across) < len(along) and not doubtful:
            return along, localizers + across
    return stack, localizers
