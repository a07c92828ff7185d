"""What grouping, geometry and Hounsfield units need of a DICOM file's header; of the patient the id alone is kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydicom import uid

from mp3d.data.dicom.elements import MODALITY_LUT, Pixels, Values, open_body, read_elements
from mp3d.errors import Refusal

CT_CLASSES = frozenset({uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage})
MULTIFRAME_CLASSES = CT_CLASSES - {uid.CTImageStorage}

MAX_INSTANCE_NUMBER = 999_999
"""A longer one is none, and may tell whom it is of."""

Number = TypeVar("Number", int, float)
KEYWORDS = (
    "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID", "GantryDetectorTilt", "ConvolutionKernel",
    "StudyInstanceUID", "SeriesInstanceUID", "AcquisitionNumber", "InstanceNumber", "ImagePositionPatient",
    "ImageOrientationPatient", "FrameOfReferenceUID", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames",
    "Rows", "Columns", "PixelSpacing", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope", "RescaleType",
    "SliceThickness", "SpacingBetweenSlices", "AcquisitionTime", "AcquisitionDateTime", "TemporalPositionIdentifier",
    "KVP", "ContrastBolusAgent", "NominalPercentageOfCardiacPhase", "TriggerTime", "LossyImageCompression",
    "VolumetricProperties", "VolumeBasedCalculationTechnique",
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What one file says of itself; an absent or empty element is ``None``, 0, ``""`` or ``()``.

    Attributes:
        name: where it lies, relative to what was listed; never part of a message.
        source: the file, or its bytes.
        pixels: where Pixel Data lies.
        cut: the file ends too early, before or inside Pixel Data.
    """

    name: str
    source: Path | bytes
    size: int
    """Bytes of the file, deflated where it is."""
    transfer_syntax: str
    little_endian: bool
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str
    patient_id: str
    modality: str
    image_type: tuple[str, ...]
    convolution_kernel: str
    acquisition_number: str
    instance_number: int | None
    gantry_tilt_deg: float | None
    image_position_patient: tuple[float, ...]
    """LPS, mm: centre of the first pixel."""
    image_orientation_patient: tuple[float, ...]
    """Cosines of a row (x, y, z), then of a column."""
    pixel_spacing_yx_mm: tuple[float, ...]
    """Between rows (y), then between columns (x)."""
    rows: int
    columns: int
    number_of_frames: int
    samples_per_pixel: int
    photometric_interpretation: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    pixel_representation: int | None
    rescale_slope: float | None
    rescale_intercept: float | None
    rescale_type: str
    pixels: Pixels | None
    cut: bool
    pixel_padding_bits: tuple[int, ...] = ()
    """Pixel Padding Value, and Range Limit where there is one: 16 bits each, signed as the pixels are."""
    frame: int = 0
    """Of a multi-frame image, from 1; 0 is a file of its own."""
    stack: tuple[str, ...] = ()
    """Stack ID and Temporal Position Index of a frame, where it has them."""
    said_spacing_mm: float | None = None
    """Spacing Between Slices, else Slice Thickness; a hint, for both are often wrong."""
    acquisition_time: str = ""
    """Acquisition Time, or of the date too."""
    temporal_position: str = ""
    """Temporal Position Identifier: the phase, where a classic image says it."""
    cardiac_phase: str = ""
    """Nominal Percentage of Cardiac Phase, else Trigger Time."""
    tube_voltage: str = ""
    """KVP."""
    contrast_agent: str = ""
    """Contrast/Bolus Agent; empty without."""
    lossy: bool = False
    """Lossy Image Compression, at any time before."""
    made_by: tuple[str, ...] = ()
    """Volumetric Properties and Volume Based Calculation Technique, which an Enhanced CT must say of each frame."""
    has_modality_lut: bool = False
    read_s: float = field(default=0.0, compare=False)
    """Seconds that reading it took, which count against the time that the file may take; 0 where it has many frames."""

    @property
    def is_ct(self) -> bool:
        """By modality and class; where one is empty (over-anonymised, or cut off), the other decides."""
        return self.modality in ("CT", "") and (self.sop_class_uid in CT_CLASSES or not self.sop_class_uid)

    @property
    def label(self) -> str:
        """What messages call it: neither UID nor file name."""
        if self.frame:
            return f"frame {self.frame}"
        number = self.instance_number
        if number is None or abs(number) > MAX_INSTANCE_NUMBER:
            return "an instance without number"
        return f"instance {number}"


def read_header(source: Path | bytes, name: str = "") -> Header:
    """Read the header of a DICOM file of any kind.

    Raises:
        Refusal: ``UNREADABLE``, ``NOT_DICOM``, ``BAD_HEADER`` or ``TOO_LARGE``.
    """
    body = open_body(source)
    with body.file:
        elements, pixels, cut = read_elements(body, KEYWORDS)
    values = Values(elements, body.little_endian)
    meta = Values(body.meta)
    return Header(
        name=name,
        source=source,
        size=body.size,
        transfer_syntax=body.transfer_syntax,
        little_endian=body.little_endian,
        sop_class_uid=values.text("SOPClassUID") or meta.text("MediaStorageSOPClassUID"),
        sop_instance_uid=values.text("SOPInstanceUID") or meta.text("MediaStorageSOPInstanceUID"),
        study_instance_uid=values.text("StudyInstanceUID"),
        series_instance_uid=values.text("SeriesInstanceUID"),
        frame_of_reference_uid=values.text("FrameOfReferenceUID"),
        patient_id=values.text("PatientID"),
        modality=values.text("Modality").upper(),
        image_type=tuple(part.strip().upper() for part in values.text("ImageType").split("\\")),
        convolution_kernel=values.text("ConvolutionKernel"),
        acquisition_number=values.text("AcquisitionNumber"),
        instance_number=_if_it_can_be_parsed(values.integer, "InstanceNumber"),
        gantry_tilt_deg=_if_it_can_be_parsed(values.number, "GantryDetectorTilt"),
        image_position_patient=values.numbers("ImagePositionPatient", 3),
        image_orientation_patient=values.numbers("ImageOrientationPatient", 6),
        pixel_spacing_yx_mm=values.numbers("PixelSpacing", 2),
        rows=values.unsigned("Rows") or 0,
        columns=values.unsigned("Columns") or 0,
        number_of_frames=values.integer("NumberOfFrames") or 1,
        samples_per_pixel=values.unsigned("SamplesPerPixel") or 0,
        photometric_interpretation=values.text("PhotometricInterpretation"),
        bits_allocated=values.unsigned("BitsAllocated") or 0,
        bits_stored=values.unsigned("BitsStored") or 0,
        high_bit=values.unsigned("HighBit") or 0,
        pixel_representation=values.unsigned("PixelRepresentation"),
        rescale_slope=values.single("RescaleSlope"),
        rescale_intercept=values.single("RescaleIntercept"),
        rescale_type=values.text("RescaleType").upper(),
        pixels=pixels,
        cut=cut,
        pixel_padding_bits=_padding_bits(values),
        said_spacing_mm=said_spacing_mm(values),
        acquisition_time=values.text("AcquisitionDateTime") or values.text("AcquisitionTime"),
        temporal_position=values.text("TemporalPositionIdentifier"),
        cardiac_phase=values.text("NominalPercentageOfCardiacPhase") or values.text("TriggerTime"),
        tube_voltage=values.text("KVP"),
        contrast_agent=values.text("ContrastBolusAgent"),
        lossy=values.text("LossyImageCompression") == "01",
        made_by=made_by(values),
        has_modality_lut=MODALITY_LUT in elements,
    )


def made_by(values: Values) -> tuple[str, ...]:
    """Volumetric Properties and Volume Based Calculation Technique, where they are there."""
    texts = (values.text("VolumetricProperties"), values.text("VolumeBasedCalculationTechnique"))
    return tuple(text.upper() for text in texts if text)


def said_spacing_mm(values: Values) -> float | None:
    """Spacing Between Slices, else Slice Thickness."""
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        if value := _if_it_can_be_parsed(values.number, keyword):
            return abs(value)
    return None


def _if_it_can_be_parsed(read: Callable[[str], Number | None], keyword: str) -> Number | None:
    """Of what neither Hounsfield units nor geometry depend on: no reason to refuse a file."""
    try:
        return read(keyword)
    except Refusal:
        return None


def _padding_bits(values: Values) -> tuple[int, ...]:
    """Only where the elements are as long as they should be: padding is no reason to refuse a file."""
    bits = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = _if_it_can_be_parsed(values.unsigned, keyword)
        if value is None:
            break
        bits.append(value)
    return tuple(bits)
