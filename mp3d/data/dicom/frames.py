"""Enhanced and legacy-converted CT: a multi-frame image to one header per frame (DICOM PS3.3 A.38, C.7.6.16).

What a file of its own says in its header, a frame says in functional groups: in its own, else in the shared ones. From
there on a frame is a slice like any other.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int16
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from mp3d.data.dicom.elements import ITEM, PIXEL_DATA, SEQUENCE_DELIMITER, File, Pixels, open_body
from mp3d.data.dicom.header import MULTIFRAME_CLASSES, Header, read_header
from mp3d.data.dicom.pixels import NATIVE, check_pixel_format, read_hu
from mp3d.errors import Refusal

MAX_FRAMES = 4096
SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
CONVERTED = ("UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence")
"""Where a legacy-converted image keeps elements of the original files that have no functional group."""


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


def slice_reader() -> Callable[[Header], Int16[np.ndarray, "h w"]]:
    """:func:`~mp3d.data.dicom.pixels.read_hu` for files and frames alike; finds the frames of a file once."""
    places: dict[Path | bytes, list[tuple[int, int]]] = {}

    def read(header: Header) -> Int16[np.ndarray, "h w"]:
        if not header.frame or header.transfer_syntax in NATIVE:
            return read_hu(header)
        if header.source not in places:
            places[header.source] = _compressed_frames(header)
        return read_hu(_alone(header, places[header.source]))

    return read


def _functional_groups(header: Header) -> tuple[Dataset, list[Dataset]]:
    body = open_body(header.source)
    with body.file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values, which may name a patient
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


def _frame_pixels(header: Header) -> list[Pixels | None]:
    """Where the pixels of each frame lie; of compressed frames, where those of all lie."""
    count, pixels = header.number_of_frames, header.pixels
    if pixels is None or pixels.length is None or header.transfer_syntax not in NATIVE:
        return [pixels] * count
    length = header.rows * header.columns * 2
    if pixels.length != count * length:
        raise Refusal(
            "PIXEL_LENGTH",
            f"{header.label}: Pixel Data (7FE0,0010) has {pixels.length} bytes, {count} frames (0028,0008) of "
            f"{header.rows} rows of {header.columns} pixels have {count * length}; copy or export it again",
        )
    return [Pixels(pixels.offset + index * length, length) for index in range(count)]


def _alone(header: Header, places: list[tuple[int, int]]) -> Header:
    """A compressed frame as a file of its own, in memory."""
    start, stop = places[header.frame - 1]
    body = open_body(header.source)
    with body.file:
        body.file.seek(start)
        fragments = body.file.read(stop - start)
    syntax = header.transfer_syntax.encode()
    syntax += b"\0" * (len(syntax) % 2)
    meta = b"\x02\x00\x10\x00UI" + len(syntax).to_bytes(2, "little") + syntax
    pixel_data = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
    before = bytes(128) + b"DICM" + meta + pixel_data
    no_offsets = ITEM + bytes(4)
    file = before + no_offsets + fragments + SEQUENCE_DELIMITER + bytes(4)
    return replace(header, source=file, pixels=Pixels(len(before), None))


def _compressed_frames(header: Header) -> list[tuple[int, int]]:
    """Where the fragments of each frame begin and end (DICOM PS3.5 A.4): one each, or as the offset table says."""
    whole = read_header(header.source)
    if whole.pixels is None:
        raise ValueError("the file has no pixels; check_pixel_format comes first")
    body = open_body(header.source)
    with body.file:
        body.file.seek(whole.pixels.offset)
        table, starts, end = _fragments(body.file)
    offsets = np.frombuffer(table[: len(table) // 4 * 4], "<u4").tolist()
    bounds = [starts[0] + offset for offset in offsets] if starts and offsets else starts
    if len(bounds) != whole.number_of_frames or not set(bounds) <= set(starts) or sorted(set(bounds)) != bounds:
        detail = f"Pixel Data (7FE0,0010) does not hold the {whole.number_of_frames} frames (0028,0008) of the header"
        raise Refusal("DECODE_FAILED", f"{whole.label}: {detail}; copy or export it again")
    return list(pairwise([*bounds, end]))


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
            table = file.read(length)
        else:
            file.seek(length, 1)
        starts.append(at)
