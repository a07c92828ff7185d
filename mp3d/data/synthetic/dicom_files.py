"""Writes CT series and RT Structure Sets as DICOM files, byte for byte the same each time."""

from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

import numpy as np
from jaxtyping import Bool, Float
from pydicom import Dataset, FileMetaDataset, dcmwrite
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, RTStructureSetStorage

from mp3d.data.series import Volume

DATE, TIME = "20200101", "120000"
RESCALE_INTERCEPT = -1024
DETACHED_STUDY_MANAGEMENT = "1.2.840.10008.3.1.2.3.1"
"""The class that RT Structure Sets still name for the study they refer to (PS3.3 C.8.8.5)."""


def make_uid(*names: object) -> UID:
    """A valid UID (a UUID under the root 2.25) that depends on the names alone."""
    return UID(f"2.25.{uuid5(NAMESPACE_OID, '/'.join(map(str, names))).int}")


def write_ct_series(folder: Path, volume: Volume, patient: str, uid_seed: str, modality: str = "CT") -> list[Dataset]:
    """Write one file per slice, instance 1 being the topmost; Explicit VR Little Endian, int16.

    Returns:
        The slices' data sets in ascending z, without pixels: what a structure set refers to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    z_spacing, y_spacing, x_spacing = volume.spacing_mm
    headers = []
    for z, hu in enumerate(volume.hu):
        number = len(volume.hu) - z
        header = _identity(patient, uid_seed)
        header.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        header.SOPInstanceUID = make_uid(uid_seed, modality, z)
        header.Modality = modality
        header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.AcquisitionDate, header.AcquisitionTime = DATE, TIME
        header.ContentDate, header.ContentTime = DATE, TIME
        header.SeriesDescription = "made phantom, no patient"
        header.KVP = "120"
        header.AcquisitionNumber = 1
        header.SliceThickness = f"{z_spacing:g}"
        header.PatientPosition = "HFS"
        header.SeriesInstanceUID = make_uid(uid_seed, modality)
        header.SeriesNumber = 2
        header.InstanceNumber = number
        header.ImagePositionPatient = _decimals(volume.affine[:3, 3] + z * volume.affine[:3, 2])
        header.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        header.SamplesPerPixel = 1
        header.PhotometricInterpretation = "MONOCHROME2"
        header.Rows, header.Columns = hu.shape
        header.PixelSpacing = [f"{y_spacing:g}", f"{x_spacing:g}"]
        header.BitsAllocated = header.BitsStored = 16
        header.HighBit = 15
        header.PixelRepresentation = 1
        header.WindowCenter, header.WindowWidth = "40", "400"
        header.RescaleIntercept, header.RescaleSlope, header.RescaleType = str(RESCALE_INTERCEPT), "1", "HU"
        headers.append(header)
        slice_ = Dataset(header)
        slice_.PixelData = (hu - RESCALE_INTERCEPT).astype("<i2").tobytes()
        _write(folder / f"{number:06d}.dcm", slice_)
    return headers


def write_rtstruct(
    path: Path, masks: Bool[np.ndarray, "n d h w"], volume: Volume, slices: list[Dataset], uid_seed: str
) -> None:
    """Write a structure set with one ROI per mask (``LESION 1``, ...), outlined along the edges of its pixels."""
    first = slices[0]
    rtstruct = _identity(first.PatientID, uid_seed)
    rtstruct.SOPClassUID = RTStructureSetStorage
    rtstruct.SOPInstanceUID = make_uid(uid_seed, "RTSTRUCT", "instance")
    rtstruct.SeriesInstanceUID = make_uid(uid_seed, "RTSTRUCT")
    rtstruct.Modality = "RTSTRUCT"
    rtstruct.SeriesNumber, rtstruct.InstanceNumber = 3, 1
    rtstruct.OperatorsName = ""
    rtstruct.StructureSetLabel = "LESIONS"
    rtstruct.StructureSetDate, rtstruct.StructureSetTime = DATE, TIME
    rtstruct.ApprovalStatus = "UNAPPROVED"

    images = [_item(ReferencedSOPClassUID=s.SOPClassUID, ReferencedSOPInstanceUID=s.SOPInstanceUID) for s in slices]
    series = _item(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=images)
    study = _item(
        ReferencedSOPClassUID=DETACHED_STUDY_MANAGEMENT,
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    rtstruct.ReferencedFrameOfReferenceSequence = [
        _item(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    ]
    rtstruct.StructureSetROISequence, rtstruct.ROIContourSequence, rtstruct.RTROIObservationsSequence = [], [], []
    for number, mask in enumerate(masks, 1):
        rtstruct.StructureSetROISequence.append(
            _item(
                ROINumber=number,
                ReferencedFrameOfReferenceUID=first.FrameOfReferenceUID,
                ROIName=f"LESION {number}",
                ROIGenerationAlgorithm="AUTOMATIC",
            )
        )
        contours = [
            _contour(polygon, z, volume, slices[z])
            for z in np.flatnonzero(mask.any((1, 2))).tolist()
            for polygon in mask_contours(mask[z])
        ]
        rtstruct.ROIContourSequence.append(
            _item(ROIDisplayColor=[255, 64, 64], ReferencedROINumber=number, ContourSequence=contours)
        )
        rtstruct.RTROIObservationsSequence.append(
            _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
        )
    _write(path, rtstruct)


def mask_contours(mask: Bool[np.ndarray, "h w"]) -> list[Float[np.ndarray, "p 2"]]:
    """Closed polygons of (column, row) along the pixel edges of a mask, at half-integer coordinates.

    Their even-odd fill, tested at pixel centres, is the mask: every edge between inside and outside is in exactly one
    of them, and which one does not matter to that rule. The inside lies to the right of each edge's direction.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for column, row in _positions(np.diff(padded, axis=0)[:, 1:-1] == 1):  # top edges of pixels
        leaving.setdefault((column, row), []).append((column + 1, row))
    for column, row in _positions(np.diff(padded, axis=0)[:, 1:-1] == -1):  # bottom edges
        leaving.setdefault((column + 1, row), []).append((column, row))
    for column, row in _positions(np.diff(padded, axis=1)[1:-1] == -1):  # right edges
        leaving.setdefault((column, row), []).append((column, row + 1))
    for column, row in _positions(np.diff(padded, axis=1)[1:-1] == 1):  # left edges
        leaving.setdefault((column, row + 1), []).append((column, row))

    polygons = []
    while leaving:
        start = next(iter(leaving))
        corners, here, before = [], start, None
        while True:
            there = leaving[here].pop()
            if not leaving[here]:
                del leaving[here]
            direction = (there[0] - here[0], there[1] - here[1])
            if direction != before:
                corners.append(here)
            here, before = there, direction
            if here == start:
                break
        polygons.append(np.array(corners) - 0.5)
    return polygons


def _positions(edges: np.ndarray) -> list[tuple[int, int]]:
    return [(column, row) for row, column in np.argwhere(edges).tolist()]


def _contour(polygon: np.ndarray, z: int, volume: Volume, slice_: Dataset) -> Dataset:
    indices = np.column_stack([polygon, np.full(len(polygon), z), np.ones(len(polygon))])
    points_mm = (indices @ volume.affine.T)[:, :3]
    return _item(
        ContourImageSequence=[
            _item(ReferencedSOPClassUID=slice_.SOPClassUID, ReferencedSOPInstanceUID=slice_.SOPInstanceUID)
        ],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(polygon),
        ContourData=_decimals(points_mm.ravel()),
    )


def _identity(patient: str, uid_seed: str) -> Dataset:
    """What all files of a patient share."""
    return _item(
        SpecificCharacterSet="ISO_IR 192",
        StudyDate=DATE,
        SeriesDate=DATE,
        StudyTime=TIME,
        SeriesTime=TIME,
        AccessionNumber="",
        Manufacturer="mp3d",
        ReferringPhysicianName="",
        StudyDescription="made phantom",
        ManufacturerModelName="synthetic",
        PatientName=patient.replace("-", "^"),
        PatientID=patient,
        PatientBirthDate="",
        PatientSex="O",
        StudyInstanceUID=make_uid(uid_seed, "study"),
        StudyID="1",
        FrameOfReferenceUID=make_uid(uid_seed, "frame of reference"),
        PositionReferenceIndicator="",
    )


def _item(**attributes: object) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


def _decimals(values: np.ndarray) -> list[str]:
    """Decimal strings of a tenth of a micrometre, within the 16 characters of DICOM's DS."""
    return [f"{value:.4f}" for value in values]


def _write(path: Path, dataset: Dataset) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # Named here, because pydicom's own would change with its version.
    meta.ImplementationClassUID = make_uid("mp3d")
    meta.ImplementationVersionName = "MP3D"
    dataset.file_meta = meta
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, dataset, enforce_file_format=True)
