"""DICOM segmentations (SEG): the segments that mark lesions, and their mask on a series' own grid (PS3.3 A.51).

Every frame is one plane of one segment, so segments may overlap. Where it lies stands in its functional groups: its
position, else the image it was drawn on.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import Tag

from mp3d.data.decode import Pool, Request
from mp3d.data.dicom.elements import PIXEL_DATA, Body, check_structure, open_body
from mp3d.data.dicom.header import Header
from mp3d.data.dicom.isolated import as_header, as_plain
from mp3d.data.dicom.volume import StoredSlice
from mp3d.data.rtstruct import LESION_ROI, PLANE_TOLERANCE
from mp3d.data.series import Volume
from mp3d.errors import Refusal

PIXEL_TOLERANCE = 0.1
"""Pixels of a frame may lie off those of the series by this share of a pixel."""
MAX_FRAME_PIXELS = 2**28
"""In all frames of the chosen segments: 1,000 frames of 512 x 512."""
SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
KEYWORDS = ("SegmentSequence", "ReferencedSeriesSequence", "SegmentationType", "MaximumFractionalValue", SHARED)


@dataclass(frozen=True)
class SegmentFrame:
    """One plane of a chosen segment.

    Attributes:
        inside: of the segment; of fractions, where it is at least one half.
        affine: maps the index ``(column, row)`` of a pixel's centre, as ``(column, row, 0, 1)``, to LPS millimetres;
            None where the frame has no position.
        drawn_on: SOP Instance UID and frame (0: a file of its own) of the image, where it names exactly one.
    """

    inside: Bool[np.ndarray, "h w"]
    affine: Float[np.ndarray, "4 4"] | None
    drawn_on: tuple[str, int] | None


@dataclass(frozen=True)
class Segmentation:
    """What one SEG object marks.

    Attributes:
        series_instance_uids: the series it refers to; empty where it names none.
        frame_of_reference_uids: of its positions.
        num_segments: how many of its segments were chosen.
        frames: of the chosen segments; a plane without a frame holds nothing.
    """

    series_instance_uids: frozenset[str]
    frame_of_reference_uids: frozenset[str]
    num_segments: int
    frames: tuple[SegmentFrame, ...]


def read_segmentation(header: Header, segment: str = LESION_ROI) -> Segmentation:
    """Read the segments whose label or property type the regular expression ``segment`` finds.

    Raises:
        Refusal: ``BAD_SEGMENTATION``, ``PIXEL_LENGTH``, ``TOO_LARGE`` or ``UNSUPPORTED_TRANSFER_SYNTAX``.
    """
    if header.cut or header.pixels is None:
        raise Refusal("BAD_SEGMENTATION", "the segmentation ends before its last pixel; copy or export it again")
    if header.pixels.length is None or header.transfer_syntax == uid.ExplicitVRBigEndian:
        detail = "the pixels of the segmentation are compressed or big endian (0002,0010)"
        raise Refusal("UNSUPPORTED_TRANSFER_SYNTAX", f"{detail}; export it uncompressed, little endian")
    body = open_body(header.source)
    with body.file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values, which may name a patient
        try:
            check_structure(body)
        except Refusal as refusal:
            raise Refusal("BAD_SEGMENTATION", refusal.detail) from refusal
        try:
            return _segmentation(header, body, re.compile(segment))
        except Refusal:
            raise
        except Exception as error:  # pydicom raises whatever its parsing of broken bytes runs into
            detail = f"the segmentation cannot be parsed ({type(error).__name__}); export it again"
            raise Refusal("BAD_SEGMENTATION", detail) from error


def read_isolated(header: Header, segment: str, pool: Pool) -> Segmentation:
    """:func:`read_segmentation` in a worker.

    Raises:
        Refusal: as there and :meth:`~mp3d.data.decode.Pool.call`.
    """
    arguments = {"header": as_plain(header), "segment": segment}
    sent, packed, _ = pool.call(Request("read_segmentation", header.source, arguments, "the segmentation"))
    size = header.rows * header.columns
    inside = (np.unpackbits(frame, count=size).astype(bool) for frame in packed.astype(np.uint8))
    return Segmentation(
        series_instance_uids=frozenset(map(str, sent["series_instance_uids"])),
        frame_of_reference_uids=frozenset(map(str, sent["frame_of_reference_uids"])),
        num_segments=int(sent["num_segments"]),
        frames=tuple(
            SegmentFrame(
                inside=one.reshape(header.rows, header.columns),
                affine=None if affine is None else np.array(affine, np.float64).reshape(4, 4),
                drawn_on=drawn_on and (str(drawn_on[0]), int(drawn_on[1])),
            )
            for one, (affine, drawn_on) in zip(inside, sent["frames"], strict=True)
        ),
    )


def segmentation_task(
    source: Path | bytes, header: dict[str, Any], segment: str
) -> tuple[dict[str, Any], UInt8[np.ndarray, "n bytes"]]:
    """What a worker does for :func:`read_isolated`: references and places of frames; the pixels as bits."""
    read = read_segmentation(as_header(header, source), segment)
    uids = {name: sorted(getattr(read, name)) for name in ("series_instance_uids", "frame_of_reference_uids")}
    places = [[None if frame.affine is None else frame.affine.tolist(), frame.drawn_on] for frame in read.frames]
    packed = [np.packbits(frame.inside) for frame in read.frames]
    return uids | {"num_segments": read.num_segments, "frames": places}, np.array(packed, np.uint8)


def mask_from_frames(
    frames: Sequence[SegmentFrame], volume: Volume, stored: Sequence[StoredSlice]
) -> tuple[UInt8[np.ndarray, "d h w"], int]:
    """Lay frames on a volume's grid, added up. Pixels are never resampled; a frame may be cropped or larger.

    Args:
        frames: of one or more segmentations.
        volume: the series.
        stored: where each of its slices comes from.

    Returns:
        1 inside any segment; the number of frames above or below the volume, which are left out.

    Raises:
        Refusal: ``MASK_MISMATCH``.
    """
    mask = np.zeros(volume.hu.shape, np.uint8)
    slice_of = {(image.sop_instance_uid, image.frame): z for z, image in enumerate(stored)}
    num_outside = 0
    for frame in frames:
        drawn_on = slice_of.get(frame.drawn_on) if frame.drawn_on else None
        x, y, z = _place(frame, volume, drawn_on)
        if not 0 <= z < len(mask):
            num_outside += 1
            continue
        plane = mask[z, max(y, 0) :, max(x, 0) :]
        inside = frame.inside[max(-y, 0) :, max(-x, 0) :][: plane.shape[0], : plane.shape[1]]
        plane[: inside.shape[0], : inside.shape[1]][inside] = 1
    return mask, num_outside


def _place(frame: SegmentFrame, volume: Volume, drawn_on: int | None) -> tuple[int, int, int]:
    """Index (column, row, slice) in the volume of a frame's first pixel.

    Args:
        drawn_on: slice of the volume that the frame names, where it is there.
    """
    if frame.affine is None:
        if frame.inside.shape != volume.hu.shape[1:] or not frame.drawn_on:
            detail = "a frame has neither a position (0020,9113) nor one image of its size that it was drawn on"
            raise Refusal("MASK_MISMATCH", f"{detail}; export the segmentation again")
        return 0, 0, -1 if drawn_on is None else drawn_on
    rows, columns = frame.inside.shape
    corners = np.array([[0, 0, 0, 1], [columns - 1, 0, 0, 1], [0, rows - 1, 0, 1]], np.float64)
    found = (np.linalg.inv(volume.affine) @ frame.affine @ corners.T).T[:, :3]
    first = np.rint(found[0])
    off = np.abs(found - first - corners[:, :3]).max(axis=0)
    if not (off <= [PIXEL_TOLERANCE, PIXEL_TOLERANCE, PLANE_TOLERANCE]).all():  # also NaN
        raise Refusal(
            "MASK_MISMATCH",
            f"a frame lies off the pixels of the series by up to {off[0]:.2f} columns, {off[1]:.2f} rows and "
            f"{off[2]:.2f} slices; resample the segmentation onto this series",
        )
    x, y, z = (int(value) for value in first)
    if drawn_on not in (None, z):
        detail = f"a frame lies on slice {z + 1} by its position, on slice {drawn_on + 1} by the image it was drawn on"
        raise Refusal("MASK_MISMATCH", f"{detail}; export the segmentation again")
    return x, y, z


def _segmentation(header: Header, body: Body, segment: re.Pattern[str]) -> Segmentation:
    dataset = _elements(body, KEYWORDS)
    references = dataset.get("ReferencedSeriesSequence") or []
    numbers = {int(item.SegmentNumber) for item in dataset.SegmentSequence if any(map(segment.search, _names(item)))}
    return Segmentation(
        series_instance_uids=frozenset(str(item.SeriesInstanceUID) for item in references),
        frame_of_reference_uids=frozenset({header.frame_of_reference_uid} - {""}),
        num_segments=len(numbers),
        frames=_frames(dataset, header, body, numbers) if numbers else (),
    )


def _elements(body: Body, keywords: Sequence[str]) -> Dataset:
    """Some elements before the pixels: the frames of a segmentation of all organs take seconds to parse."""
    start = body.file.tell()
    dataset = read_dataset(
        body.file,
        body.implicit_vr,
        body.little_endian,
        stop_when=lambda tag, _vr, _length: tag >= PIXEL_DATA,
        specific_tags=[Tag(keyword) for keyword in keywords],
    )
    body.file.seek(start)
    return dataset


def _frames(dataset: Dataset, header: Header, body: Body, numbers: set[int]) -> tuple[SegmentFrame, ...]:
    shared = (dataset.get(SHARED) or [Dataset()])[0]
    groups = list(_elements(body, [PER_FRAME])[PER_FRAME].value)
    if len(groups) != header.number_of_frames:
        detail = f"{header.number_of_frames} frames (0028,0008) and functional groups (5200,9230) for {len(groups)}"
        raise Refusal("BAD_SEGMENTATION", f"the segmentation has {detail}; export it again")
    chosen = [
        (index, group)
        for index, group in enumerate(groups)
        if int(_item(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber) in numbers
    ]
    if len(chosen) * header.rows * header.columns > MAX_FRAME_PIXELS:
        detail = f"{len(chosen)} frames of {header.rows} x {header.columns} pixels"
        raise Refusal("TOO_LARGE", f"the segmentation has {detail}, more than {MAX_FRAME_PIXELS:g} in all; split it")
    read_frame = _frame_reader(dataset, header, body)
    return tuple(SegmentFrame(read_frame(index), _affine(group, shared), _drawn_on(group)) for index, group in chosen)


def _frame_reader(dataset: Dataset, header: Header, body: Body) -> Callable[[int], Bool[np.ndarray, "h w"]]:
    """Reads the frame of a number, counted from 0, out of Pixel Data: a bit or a byte for each pixel."""
    kind, size = dataset.SegmentationType, header.rows * header.columns
    if (kind, header.bits_allocated) not in (("BINARY", 1), ("FRACTIONAL", 8)):
        detail = f"another Segmentation Type (0062,0001), or {header.bits_allocated} Bits Allocated (0028,0100)"
        raise Refusal("BAD_SEGMENTATION", f"{detail}; read are BINARY with 1 and FRACTIONAL with 8")
    offset, length = header.pixels or (0, 0)
    wanted = -(-header.number_of_frames * size * header.bits_allocated // 8)
    if size == 0 or length not in (wanted, wanted + wanted % 2):
        raise Refusal(
            "PIXEL_LENGTH",
            f"Pixel Data (7FE0,0010) of the segmentation has {length} bytes, {header.number_of_frames} frames (0028,"
            f"0008) of {header.rows} rows of {header.columns} pixels have {wanted}; copy or export it again",
        )
    half = 1 if kind == "BINARY" else int(dataset.MaximumFractionalValue) / 2

    def read(index: int) -> Bool[np.ndarray, "h w"]:
        start = index * size * header.bits_allocated  # in bits: frames follow each other within a byte
        body.file.seek(offset + start // 8)
        stored = np.frombuffer(body.file.read(-(-(start % 8 + size * header.bits_allocated) // 8)), np.uint8)
        if kind == "BINARY":
            stored = np.unpackbits(stored, bitorder="little")[start % 8 :]
        return (stored[:size] >= half).reshape(header.rows, header.columns)

    return read


def _affine(group: Dataset, shared: Dataset) -> Float[np.ndarray, "4 4"] | None:
    position = _item(group, shared, "PlanePositionSequence").get("ImagePositionPatient")
    orientation = _item(group, shared, "PlaneOrientationSequence").get("ImageOrientationPatient")
    spacing = _item(group, shared, "PixelMeasuresSequence").get("PixelSpacing")
    if not (position and orientation and spacing):
        return None
    affine = np.eye(4)
    affine[:3, :2] = np.reshape(np.array(orientation, np.float64), (2, 3)).T * np.array(spacing, np.float64)[::-1]
    affine[:3, 3] = np.array(position, np.float64)
    return affine


def _drawn_on(group: Dataset) -> tuple[str, int] | None:
    derivations = group.get("DerivationImageSequence") or []
    images = [image for item in derivations for image in item.get("SourceImageSequence") or []]
    if len(images) != 1 or not images[0].get("ReferencedSOPInstanceUID"):
        return None
    frame = images[0].get("ReferencedFrameNumber") or 0
    return (str(images[0].ReferencedSOPInstanceUID), int(frame)) if isinstance(frame, int) else None


def _item(group: Dataset, shared: Dataset, macro: str) -> Dataset:
    """A functional group of a frame: its own, else the shared one."""
    return (group.get(macro) or shared.get(macro) or [Dataset()])[0]


def _names(segment: Dataset) -> list[str]:
    types = segment.get("SegmentedPropertyTypeCodeSequence") or []
    return [str(name) for name in (segment.get("SegmentLabel"), *(item.get("CodeMeaning") for item in types)) if name]
