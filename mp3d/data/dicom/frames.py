"""Enhanced and legacy-converted CT: a multi-frame image to one header per frame (DICOM PS3.3 A.38, C.7.6.16).

What a file of its own says in its header, a frame says in functional groups: in its own, else in the shared ones. From
there on a frame is a slice like any other.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from mp3d.data.dicom.elements import ITEM, PIXEL_DATA, File, Pixels, check_structure, open_body, open_source
from mp3d.data.dicom.header import MULTIFRAME_CLASSES, Header, read_header
from mp3d.data.dicom.pixels import NATIVE, check_pixel_format
from mp3d.errors import Refusal

MAX_FRAMES = 4096
MAX_FILE_BYTES = 900 * 2**20
"""Of the decoded frames of one file: 1,800 of 512 x 512. What a hundred kilobytes claim can be far more."""
SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
CONVERTED = ("UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence")
"""Where a legacy-converted image keeps elements of the original files that have no functional group."""


def image_headers(source: Path | bytes, name: str) -> list[Header]:
    """The header of a DICOM file of any kind, or those of the frames of a multi-frame CT.

    Raises:
        Refusal: as :func:`~mp3d.data.dicom.header.read_header` and :func:`frame_headers`.
    """
    header = read_header(source, name)
    several = header.sop_class_uid in MULTIFRAME_CLASSES or header.number_of_frames != 1
    return frame_headers(header) if header.is_ct and several else [header]


def frame_headers(header: Header) -> list[Header]:
    """The frames of a multi-frame image, in the order they are stored.

    Raises:
        Refusal: ``MULTIFRAME_UNSUPPORTED``, ``TOO_LARGE``, ``PIXEL_LENGTH``, ``BAD_HEADER``, ``NO_PIXELS`` or
            ``TRUNCATED``.
    """
    count = header.number_of_frames
    if header.pixels is None or header.cut:
        check_pixel_format(header)
    if header.sop_class_uid not in MULTIFRAME_CLASSES or header.transfer_syntax == uid.DeflatedExplicitVRLittleEndian:
        kind = "a deflated file" if header.sop_class_uid in MULTIFRAME_CLASSES else "no Enhanced CT Image"
        detail = f"{header.label} has {count} frames (0028,0008) in {kind}; export the series as one file per slice"
        raise Refusal("MULTIFRAME_UNSUPPORTED", detail)
    if not 1 <= count <= MAX_FRAMES:
        raise Refusal("TOO_LARGE", f"{header.label} has {count} frames (0028,0008), at most {MAX_FRAMES} are read")
    if (decoded := count * header.rows * header.columns * 2) > MAX_FILE_BYTES:
        detail = f"{count} frames of {header.rows} x {header.columns} pixels are {decoded >> 20} MiB"
        raise Refusal("TOO_LARGE", f"{header.label}: {detail}, at most {MAX_FILE_BYTES >> 20} are read; split the file")
    shared, groups = _functional_groups(header)
    if len(groups) != count:
        raise Refusal(
            "BAD_HEADER",
            f"{header.label} has {count} frames (0028,0008) and functional groups (5200,9230) for {len(groups)}; "
            "export it again",
        )
    places = _frame_pixels(header)
    try:
        return [
            _frame(header, number, pixels, _Groups(group, shared))
            for number, (group, pixels) in enumerate(zip(groups, places, strict=True), 1)
        ]
    except Exception as error:  # pydicom raises whatever its parsing of broken values runs into
        detail = f"the functional groups (5200,9230) cannot be parsed ({type(error).__name__}); export it again"
        raise Refusal("BAD_HEADER", f"{header.label}: {detail}") from error


def _functional_groups(header: Header) -> tuple[Dataset, list[Dataset]]:
    body = open_body(header.source)
    with body.file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values, which may name a patient
        check_structure(body)
        try:
            dataset = read_dataset(
                body.file,
                body.implicit_vr,
                body.little_endian,
                stop_when=lambda tag, _vr, _length: tag >= PIXEL_DATA,
                specific_tags=[Tag(SHARED), Tag(PER_FRAME)],
            )
            shared = dataset.get(SHARED) or [Dataset()]
            return shared[0], list(dataset.get(PER_FRAME) or [])
        except Exception as error:  # pydicom raises whatever its parsing of broken bytes runs into
            detail = f"the functional groups (5200,9229) cannot be parsed ({type(error).__name__}); export it again"
            raise Refusal("BAD_HEADER", f"{header.label}: {detail}") from error


class _Groups:
    """What the functional groups say of one frame: its own, else the shared ones."""

    def __init__(self, own: Dataset, shared: Dataset) -> None:
        self._groups = (own, shared)

    def text(self, macro: str, keyword: str) -> str:
        """As it would stand in the header, several values joined by a backslash; empty where it is absent."""
        for group in self._groups:
            for sequence in (macro, *CONVERTED):
                for item in group.get(sequence) or []:
                    value = item.get(keyword)
                    if value is not None and value != "":
                        several = isinstance(value, MultiValue)
                        return "\\".join(map(str, value)) if several else str(value)
        return ""

    def numbers(self, macro: str, keyword: str, count: int) -> tuple[float, ...]:
        text = self.text(macro, keyword)
        values = tuple(float(part) for part in text.split("\\")) if text else ()
        if values and len(values) != count:
            raise ValueError(f"{len(values)} values of {keyword}")
        return values

    def number(self, macro: str, keyword: str) -> float | None:
        text = self.text(macro, keyword)
        return float(text) if text else None


def _frame(header: Header, number: int, pixels: Pixels | None, groups: _Groups) -> Header:
    frame_type = groups.text("CTImageFrameTypeSequence", "FrameType").upper()
    content = "FrameContentSequence"
    stack = (groups.text(content, "StackID"), groups.text(content, "TemporalPositionIndex"))
    rescale = "PixelValueTransformationSequence"
    return replace(
        header,
        frame=number,
        number_of_frames=1,
        pixels=pixels,
        image_type=tuple(frame_type.split("\\")) if frame_type else header.image_type,
        convolution_kernel=groups.text("CTReconstructionSequence", "ConvolutionKernel") or header.convolution_kernel,
        acquisition_number=groups.text(content, "FrameAcquisitionNumber") or header.acquisition_number,
        gantry_tilt_deg=groups.number("CTAcquisitionDetailsSequence", "GantryDetectorTilt"),
        image_position_patient=groups.numbers("PlanePositionSequence", "ImagePositionPatient", 3),
        image_orientation_patient=groups.numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        pixel_spacing_yx_mm=groups.numbers("PixelMeasuresSequence", "PixelSpacing", 2),
        rescale_slope=groups.number(rescale, "RescaleSlope"),
        rescale_intercept=groups.number(rescale, "RescaleIntercept"),
        rescale_type=groups.text(rescale, "RescaleType").upper(),
        stack=stack if any(stack) else (),
    )


def _frame_pixels(header: Header) -> Sequence[Pixels | None]:
    """Where the pixels of each frame lie."""
    count, pixels = header.number_of_frames, header.pixels
    if pixels is not None and pixels.length is None and header.transfer_syntax not in NATIVE:
        return _compressed_frames(header, pixels.offset)
    if pixels is None or pixels.length is None or header.transfer_syntax not in NATIVE:
        return [pixels] * count  # for check_pixel_format to refuse
    length = header.rows * header.columns * 2
    if pixels.length != count * length:
        raise Refusal(
            "PIXEL_LENGTH",
            f"{header.label}: Pixel Data (7FE0,0010) has {pixels.length} bytes, {count} frames (0028,0008) of "
            f"{header.rows} rows of {header.columns} pixels have {count * length}; copy or export it again",
        )
    return [Pixels(pixels.offset + index * length, length) for index in range(count)]


def _compressed_frames(header: Header, offset: int) -> list[Pixels]:
    """Where the fragments of each frame lie (DICOM PS3.5 A.4): one each, or as the offset table says."""
    with open_source(header.source) as file:
        file.seek(offset)
        table, starts, end = _fragments(file)
    offsets = np.frombuffer(table[: len(table) // 4 * 4], "<u4").tolist()
    bounds = [starts[0] + start for start in offsets] if starts and offsets else starts
    if len(bounds) != header.number_of_frames or not set(bounds) <= set(starts) or sorted(set(bounds)) != bounds:
        detail = f"Pixel Data (7FE0,0010) does not hold the {header.number_of_frames} frames (0028,0008) of the header"
        raise Refusal("DECODE_FAILED", f"{header.label}: {detail}; copy or export it again")
    return [Pixels(start, stop - start) for start, stop in pairwise([*bounds, end])]


def _fragments(file: File) -> tuple[bytes, list[int], int]:
    """The offset table, where each fragment's item begins, and where the last ends."""
    table = b""
    starts: list[int] = []
    while True:
        at = file.tell()
        tag, length = file.read(4), int.from_bytes(file.read(4), "little")
        if tag != ITEM:
            return table, starts[1:], at
        if not starts:
            table = file.read(min(length, 4 * MAX_FRAMES))
        file.seek(at + 8 + length)
        starts.append(at)
