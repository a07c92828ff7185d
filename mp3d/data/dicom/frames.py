"""Enhanced and legacy-converted CT: a multi-frame image to one header per frame (DICOM PS3.3 A.38, C.7.6.16).

What a file of its own says in its header, a frame says in functional groups: in its own, else in the shared ones. From
there on a frame is a slice like any other.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydicom import uid
from pydicom.tag import Tag

from mp3d.data.dicom.elements import (
    ITEM,
    MAX_VALUE_BYTES,
    PIXEL_DATA,
    Elements,
    File,
    Pixels,
    Values,
    open_body,
    open_source,
)
from mp3d.data.dicom.header import MULTIFRAME_CLASSES, Header, made_by, read_header, said_spacing_mm
from mp3d.data.dicom.pixels import NATIVE, check_pixel_format
from mp3d.data.dicom.walk import UNDEFINED_LENGTH, Walker
from mp3d.errors import Refusal

MAX_FRAMES = 4096
MAX_FILE_BYTES = 900 * 2**20
"""Of the decoded frames of one file: 1,800 of 512 x 512. What a hundred kilobytes claim can be far more."""
MAX_GROWTH, FREE_BYTES = 200, 64 * 2**20
"""Decoded frames have no more than these times the bytes of their file, or these bytes; no CT is that empty."""
SHARED, PER_FRAME = 0x52009229, 0x52009230
"""Shared and Per-frame Functional Groups Sequence."""
WANTED = {
    "CTImageFrameTypeSequence": ("FrameType", "VolumetricProperties", "VolumeBasedCalculationTechnique"),
    "FrameContentSequence": ("StackID", "TemporalPositionIndex", "FrameAcquisitionNumber"),
    "CTReconstructionSequence": ("ConvolutionKernel",),
    "CTAcquisitionDetailsSequence": ("GantryDetectorTilt",),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
}
CONVERTED = frozenset(
    map(Tag, ("UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence"))
)
"""Where a legacy-converted image keeps elements of the original files that have no functional group."""
MACROS: dict[int, frozenset[int]] = {
    Tag(sequence): frozenset(map(Tag, keywords)) for sequence, keywords in WANTED.items()
}
MACROS |= dict.fromkeys(CONVERTED, frozenset().union(*MACROS.values()))
"""Sequences of the functional groups, and what is read of each."""


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
    if decoded > max(MAX_GROWTH * header.size, FREE_BYTES):
        raise Refusal(
            "TOO_LARGE",
            f"{header.label} claims {decoded >> 20} MiB of pixels (0028,0008), over {MAX_GROWTH} times its own size; "
            "no CT compresses so well; export it again",
        )
    shared, groups = _functional_groups(header)
    if len(groups) != count:
        raise Refusal(
            "BAD_HEADER",
            f"{header.label} has {count} frames (0028,0008) and functional groups (5200,9230) for {len(groups)}; "
            "export it again",
        )
    places = _frame_pixels(header)
    return [
        _frame(header, number, pixels, _values(group, shared, header.little_endian))
        for number, (group, pixels) in enumerate(zip(groups, places, strict=True), 1)
    ]


Group = dict[tuple[int, int], bytes]
"""What a functional group says: value by tag of the sequence and of the element."""


def _functional_groups(header: Header) -> tuple[Group, list[Group]]:
    """Shared, and of each frame."""
    body = open_body(header.source)
    walker = Walker(body.file, body.implicit_vr, body.little_endian)
    shared: list[Group] = []
    own: list[Group] = []
    with body.file:
        try:
            while (element := walker.next()) and element.tag < PIXEL_DATA:
                if element.tag in (SHARED, PER_FRAME):
                    groups = [_group(walker, end) for end in walker.items(element)]
                    (own if element.tag == PER_FRAME else shared).extend(groups)
                else:
                    walker.skip(element)
        except EOFError:
            raise Refusal("BAD_HEADER", f"{header.label} ends inside a sequence; copy or export it again") from None
        except OSError as error:
            raise Refusal("UNREADABLE", f"{header.label} cannot be read ({type(error).__name__})") from error
    return (shared[0] if shared else {}), own


def _group(walker: Walker, end: int | None) -> Group:
    group: Group = {}
    for sequence in walker.elements(end):
        wanted = MACROS.get(sequence.tag)
        if wanted is None:
            walker.skip(sequence)
            continue
        for item_end in walker.items(sequence):
            for element in walker.elements(item_end):
                if element.tag in wanted and 0 < element.length < UNDEFINED_LENGTH:
                    value = walker.read(element.length, MAX_VALUE_BYTES + 1)
                    group.setdefault((sequence.tag, element.tag), value)
                else:
                    walker.skip(element)
    return group


def _values(own: Group, shared: Group, little_endian: bool) -> Values:
    """What the groups say of one frame, each element from the place that goes before the others: its own sequence, then
    those of converted images, in the frame's own group, then in the shared one."""
    elements: Elements = {}
    for group in (own, shared):
        for place in sorted(group, key=lambda place: place[0] in CONVERTED):
            elements.setdefault(place[1], group[place])
    return Values(elements, little_endian)


def _frame(header: Header, number: int, pixels: Pixels | None, values: Values) -> Header:
    frame_type = values.text("FrameType").upper()
    stack = (values.text("StackID"), str(values.unsigned("TemporalPositionIndex", 4) or ""))
    return replace(
        header,
        frame=number,
        number_of_frames=1,
        pixels=pixels,
        image_type=tuple(part.strip() for part in frame_type.split("\\")) if frame_type else header.image_type,
        convolution_kernel=values.text("ConvolutionKernel") or header.convolution_kernel,
        acquisition_number=str(values.unsigned("FrameAcquisitionNumber") or "") or header.acquisition_number,
        gantry_tilt_deg=values.number("GantryDetectorTilt"),
        image_position_patient=values.numbers("ImagePositionPatient", 3),
        image_orientation_patient=values.numbers("ImageOrientationPatient", 6),
        pixel_spacing_yx_mm=values.numbers("PixelSpacing", 2),
        rescale_slope=values.single("RescaleSlope"),
        rescale_intercept=values.single("RescaleIntercept"),
        rescale_type=values.text("RescaleType").upper(),
        stack=stack if any(stack) else (),
        said_spacing_mm=said_spacing_mm(values),
        made_by=made_by(values) or header.made_by,
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
