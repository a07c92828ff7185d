"""Small CT series as DICOM files in memory, made to be asymmetric so that no swap or flip goes unseen."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from io import BytesIO

import imagecodecs
import jpeg_ls
import numpy as np
from openjpeg.utils import encode_array
from pydicom import Dataset, FileMetaDataset, dcmread, dcmwrite, uid
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.valuerep import format_number_as_ds

from mp3d.data.series import Volume

SERIES_UID = "1.2.826.0.1.3680043.8.498.1"
STUDY_UID = "1.2.826.0.1.3680043.8.498.2"
LOSSLESS = (
    *(uid.RLELossless, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless),
    *(uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL),
)
"""What :func:`compressed` can write."""
FRAME_UID = "1.2.826.0.1.3680043.8.498.3"
FUNCTIONAL_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameContentSequence"),
    *("PixelValueTransformationSequence", "CTImageFrameTypeSequence"),
)


def made_volume(
    shape: tuple[int, int, int] = (6, 5, 7),
    spacing_mm: tuple[float, float, float] = (2.5, 0.8, 0.6),
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    origin: Sequence[float] | np.ndarray = (-31.25, 17.5, -204.5),
    seed: int = 0,
) -> Volume:
    """Random HU from -1024 to 2000; spacing along z, y, x."""
    rng = np.random.default_rng(seed)
    row, column = np.reshape(orientation, (2, 3)).astype(float)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row, column, np.cross(row, column)], axis=1) * spacing_mm[::-1]
    affine[:3, 3] = origin
    return Volume(hu=rng.integers(-1024, 2000, shape, dtype=np.int16), affine=affine)


def random_orientation(rng: np.random.Generator) -> list[float]:
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return [*rotation[:, 0], *rotation[:, 1]]


def ct_slices(volume: Volume) -> list[Dataset]:
    """One data set per slice, ascending; Instance Number falls as z rises; signed 16 bits, intercept -1024."""
    z_spacing, y_spacing, x_spacing = volume.spacing_mm
    slices = []
    for z, hu in enumerate(volume.hu):
        ds = Dataset()
        ds.SOPClassUID = uid.CTImageStorage
        ds.SOPInstanceUID = f"{SERIES_UID}.{z + 1}"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Modality = "CT"
        ds.PatientName, ds.PatientID = "Canary^Name", "CANARY-ID"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = STUDY_UID, SERIES_UID, FRAME_UID
        ds.InstanceNumber = len(volume.hu) - z
        ds.AcquisitionNumber = 1
        ds.SliceThickness = _ds(2 * z_spacing)
        ds.ImagePositionPatient = _ds(*(volume.affine @ [0, 0, z, 1])[:3])
        ds.ImageOrientationPatient = _ds(*volume.affine[:3, 0] / x_spacing, *volume.affine[:3, 1] / y_spacing)
        ds.PixelSpacing = _ds(y_spacing, x_spacing)
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.Rows, ds.Columns = hu.shape
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit = 15
        ds.PixelRepresentation = 1
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
        set_stored(ds, hu.astype(int) + 1024)
        slices.append(ds)
    return slices


def enhanced(slices: Sequence[Dataset], own: Sequence[str] = ("PlanePositionSequence",)) -> Dataset:
    """The slices as one Enhanced CT image, frames in the order given.

    Args:
        slices: as :func:`ct_slices` makes them.
        own: functional groups that each frame has for itself; the others are shared and the first slice's.
    """
    first = slices[0]
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = uid.EnhancedCTImageStorage, f"{SERIES_UID}.0.2"
    for keyword in (
        *("Modality", "PatientName", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
        *("ImageType", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated"),
        *("BitsStored", "HighBit", "PixelRepresentation"),
    ):
        setattr(ds, keyword, getattr(first, keyword))
    ds.InstanceNumber, ds.NumberOfFrames = 1, len(slices)
    groups = [_functional_groups(one) for one in slices]
    ds.SharedFunctionalGroupsSequence = [
        _item(**{macro: [item] for macro, item in groups[0].items() if macro not in own})
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        _item(**{macro: [item] for macro, item in group.items() if macro in own}) for group in groups
    ]
    ds.PixelData = b"".join(one.PixelData for one in slices)
    ds["PixelData"].VR = "OW"
    return ds


def _functional_groups(ds: Dataset) -> dict[str, Dataset]:
    return {
        "PlanePositionSequence": _item(ImagePositionPatient=ds.ImagePositionPatient),
        "PlaneOrientationSequence": _item(ImageOrientationPatient=ds.ImageOrientationPatient),
        "PixelMeasuresSequence": _item(PixelSpacing=ds.PixelSpacing, SliceThickness=ds.SliceThickness),
        "PixelValueTransformationSequence": _item(
            RescaleSlope=ds.RescaleSlope, RescaleIntercept=ds.RescaleIntercept, RescaleType="HU"
        ),
        "CTImageFrameTypeSequence": _item(FrameType=[*ds.ImageType, *["NONE"][: 4 - len(ds.ImageType)]]),
        "FrameContentSequence": _item(FrameAcquisitionNumber=ds.AcquisitionNumber),
    }


def set_stored(ds: Dataset, stored: np.ndarray) -> None:
    """Put stored values into Pixel Data, uncompressed little endian."""
    ds.PixelData = (np.asarray(stored).astype(np.int64) & 0xFFFF).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"


def to_bytes(ds: Dataset, syntax: uid.UID = uid.ExplicitVRLittleEndian) -> bytes:
    """A DICOM file in any transfer syntax that can be written here."""
    ds = deepcopy(ds)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID") or uid.CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID") or uid.UID("1.2.3")
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    if syntax in LOSSLESS:
        stored = np.frombuffer(ds.PixelData, "<i2" if ds.PixelRepresentation else "<u2")
        frames = stored.reshape(-1, ds.Rows, ds.Columns)
        ds.PixelData = encapsulate([compressed(frame, syntax, ds.BitsStored) for frame in frames])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
    elif syntax == uid.ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        ds["PixelData"].VR = "OW"
    ds.file_meta.TransferSyntaxUID = syntax
    file = BytesIO()
    if syntax == uid.ExplicitVRBigEndian:
        ds.preamble = bytes(128)
        dcmwrite(file, ds, implicit_vr=False, little_endian=False)
    else:
        dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def dcmread_bytes(file: bytes) -> Dataset:
    return dcmread(BytesIO(file))


def rewritten(ds: Dataset) -> bytes:
    file = BytesIO()
    ds.save_as(file)
    return file.getvalue()


def compressed(frame: np.ndarray, syntax: uid.UID, bits: int) -> bytes:
    """A frame of int16 or uint16 in one of the :data:`LOSSLESS` transfer syntaxes, 9 to 16 of its bits."""
    unsigned = frame.view(np.uint16) & np.uint16((1 << bits) - 1)
    if syntax == uid.RLELossless:
        options = {"rows": frame.shape[0], "columns": frame.shape[1], "samples_per_pixel": 1, "number_of_frames": 1}
        options |= {"bits_allocated": 16, "bits_stored": 16, "pixel_representation": 0}
        return RLELosslessEncoder.encode(unsigned, photometric_interpretation="MONOCHROME2", **options)
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        coded = imagecodecs.jpeg8_encode(unsigned, lossless=True, bitspersample=bits, predictor=1)
    elif syntax == uid.JPEGLSLossless:
        coded = jpeg_ls.encode_buffer(unsigned.tobytes(), *frame.shape, 1, bits)
    elif syntax == uid.JPEG2000Lossless:
        coded = encode_array(frame, bits_stored=bits)
    else:
        coded = imagecodecs.htj2k_encode(frame, reversible=True)
    return bytes(coded)


def to_files(
    slices: Iterable[Dataset], syntax: uid.UID = uid.ExplicitVRLittleEndian, seed: int = 0
) -> dict[str, bytes]:
    """Files by name; the names' order says nothing."""
    files = [to_bytes(ds, syntax) for ds in slices]
    numbers = np.random.default_rng(seed).permutation(len(files))
    return {f"canary/{number:03d}.dcm": file for number, file in zip(numbers, files, strict=True)}


def structure_set(contours: Sequence[Sequence[np.ndarray]], names: Sequence[str]) -> Dataset:
    """An RT Structure Set for the made series: closed contours (points in LPS mm) of each named region."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = uid.RTStructureSetStorage, f"{SERIES_UID}.0.1", "RTSTRUCT"
    ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "CANARY-ID", STUDY_UID, f"{SERIES_UID}.0"
    ds.StructureSetLabel = "made"
    ds.ReferencedFrameOfReferenceSequence = [
        _item(
            FrameOfReferenceUID=FRAME_UID,
            RTReferencedStudySequence=[_item(RTReferencedSeriesSequence=[_item(SeriesInstanceUID=SERIES_UID)])],
        )
    ]
    ds.StructureSetROISequence = [
        _item(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=FRAME_UID)
        for number, name in enumerate(names, 1)
    ]
    ds.ROIContourSequence = [
        _item(
            ReferencedROINumber=number,
            ContourSequence=[
                _item(
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=_ds(*np.ravel(points)),
                )
                for points in region
            ],
        )
        for number, region in enumerate(contours, 1)
    ]
    return ds


def segmentation(volume: Volume, segments: dict[str, np.ndarray], fractional: bool = False) -> Dataset:
    """A DICOM SEG of the made series: a frame for each slice on which a segment, (d, h, w), is not empty."""
    frames = [
        (number, z) for number, inside in enumerate(segments.values(), 1) for z in np.flatnonzero(inside.any((1, 2)))
    ]
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = uid.SegmentationStorage, f"{SERIES_UID}.0.3", "SEG"
    ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "CANARY-ID", STUDY_UID, f"{SERIES_UID}.3"
    ds.FrameOfReferenceUID = FRAME_UID
    ds.ReferencedSeriesSequence = [_item(SeriesInstanceUID=SERIES_UID)]
    ds.SegmentSequence = [
        _item(
            SegmentNumber=number,
            SegmentLabel=name,
            SegmentedPropertyTypeCodeSequence=[
                _item(CodeValue="108369006", CodingSchemeDesignator="SCT", CodeMeaning="Tissue")
            ],
        )
        for number, name in enumerate(segments, 1)
    ]
    z_spacing, y_spacing, x_spacing = volume.spacing_mm
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.NumberOfFrames, (ds.Rows, ds.Columns) = len(frames), volume.hu.shape[1:]
    ds.SharedFunctionalGroupsSequence = [
        _item(
            PlaneOrientationSequence=[
                _item(ImageOrientationPatient=_ds(*volume.affine[:3, 0] / x_spacing, *volume.affine[:3, 1] / y_spacing))
            ],
            PixelMeasuresSequence=[_item(PixelSpacing=_ds(y_spacing, x_spacing), SliceThickness=_ds(z_spacing))],
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        _item(
            PlanePositionSequence=[_item(ImagePositionPatient=_ds(*(volume.affine @ [0, 0, z, 1])[:3]))],
            SegmentIdentificationSequence=[_item(ReferencedSegmentNumber=number)],
        )
        for number, z in frames
    ]
    stored = np.array([[*segments.values()][number - 1][z] for number, z in frames])
    if fractional:
        ds.SegmentationType, ds.SegmentationFractionalType, ds.MaximumFractionalValue = "FRACTIONAL", "PROBABILITY", 200
        ds.BitsAllocated = ds.BitsStored = 8
        ds.PixelData = np.rint(stored * 200).astype(np.uint8).tobytes()
    else:
        ds.SegmentationType = "BINARY"
        ds.BitsAllocated = ds.BitsStored = 1
        ds.PixelData = np.packbits(stored.astype(bool), bitorder="little").tobytes()
    ds.HighBit = ds.BitsStored - 1
    ds.PixelData += bytes(len(ds.PixelData) % 2)
    ds["PixelData"].VR = "OB"
    return ds


def _item(**elements: object) -> Dataset:
    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def _ds(*values: float) -> list[str] | str:
    texts = [format_number_as_ds(float(value)) for value in values]
    return texts if len(texts) > 1 else texts[0]
