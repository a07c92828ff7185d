"""A tiny data set in the true format of every reader, for the contract that ``tests/test_readers.py`` holds them to.

A new reader gets a function here that writes its files into an empty folder, and a line in :data:`MAKERS`. The folder
holds what is typical of the format, above all: something that was searched and holds nothing, and, where the format
can say so, something that nobody searched.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydicom import Dataset

from mp3d.data.series import Volume
from tests.dicom_files import SERIES_UID, ct_slices, made_volume, segmentation, structure_set, to_bytes
from tests.test_deeplesion import lesion, write_slices, write_table
from tests.test_lidc import world as write_lidc
from tests.test_lits import write as write_pair
from tests.test_pictures import jpeg, write
from tests.test_rtstruct import outline
from tests.test_volumes import image_of


@dataclass(frozen=True)
class World:
    """What was written, and what a reader must make of it.

    Attributes:
        arguments: of the reader.
        boxes: number of rows (slices or pictures) by their number of boxes; under None those that nobody searched.
        num_masks: rows with a mask.
        refused: reason codes of what cannot be used.
    """

    arguments: dict[str, Any]
    boxes: dict[int | None, int]
    num_masks: int = 0
    refused: tuple[str, ...] = ()


def dicom(root: Path) -> World:
    """Four patients: outlined, segmented, neither, and broken."""
    volume = made_volume(shape=(6, 12, 14))
    contours = [outline(volume, 2, 0.5, 1.5, 4.5, 5.5), outline(volume, 2, 8.5, 6.5, 12.5, 9.5)]
    inside = np.zeros((6, 12, 14), bool)
    inside[3, 2:7, 4:11] = True
    for number in range(4):
        write_patient(root, number, volume)
    write(root / "patient 0" / "rs.dcm", to_bytes(_of_patient(structure_set([contours], ["GTV"]), 0)))
    write(root / "patient 1" / "seg.dcm", to_bytes(_of_patient(segmentation(volume, {"Lesion": inside}), 1)))
    (root / "patient 3" / "4.dcm").unlink()
    return World({"root": root}, boxes={2: 1, 1: 1, 0: 10, None: 6}, num_masks=12, refused=("MISSING_SLICE",))


def dicom_boxes(root: Path) -> World:
    volume = made_volume(shape=(6, 12, 14))
    for number in range(4):
        write_patient(root, number, volume)
    z_mm = (volume.affine @ [0, 0, 5, 1])[2]
    rows = [
        "SeriesInstanceUID,SOPInstanceUID,z_mm,x1,y1,x2,y2,label",
        f"{SERIES_UID}.90,{SERIES_UID}.90.3,,1,2,5.5,6,nodule",
        f"{SERIES_UID}.90,{SERIES_UID}.90.3,,10,8,15,11,cyst",
        f"{SERIES_UID}.90,,{z_mm},0,0,3,3,nodule",
        f"{SERIES_UID}.91,,,,,,,",
        f"{SERIES_UID}.93,{SERIES_UID}.93.1,,1,2,nan,6,nodule",
    ]
    write(root / "boxes.csv", "\r\n".join(rows).encode())
    return World({"root": root}, boxes={2: 1, 1: 1, 0: 10, None: 6}, refused=("BAD_BOX",))


def volumes(root: Path) -> World:
    """A patient each in NIfTI, NRRD and MetaImage; a fourth without a mask."""
    mask = np.zeros((5, 6, 9), np.uint8)
    mask[1, 1:4, 2:7] = 1
    for number, ending in enumerate((".nii.gz", ".nrrd", ".mhd", ".mha")):
        folder = root / f"patient {number}"
        folder.mkdir()
        sitk.WriteImage(image_of(made_volume(shape=(5, 6, 9), seed=number).hu), folder / f"CT_image{ending}")
        sitk.WriteImage(image_of(mask), folder / f"CT_mask{ending}")
    (root / "patient 3" / "CT_mask.mha").unlink()
    arguments = {"root": root, "image": "CT_image.*", "mask": "CT_mask.*"}
    return World(arguments, boxes={1: 3, 0: 12}, num_masks=15, refused=("MISSING_MASK",))


def deeplesion(root: Path) -> World:
    write_slices(root, "000011_01_01", range(98, 103))
    write_slices(root, "000012_03_01", range(1, 4))
    key_slices = [lesion("000011_01_01", 100), lesion("000011_01_01", 100, Bounding_boxes="1, 1, 9, 9")]
    write_table(root, [*key_slices, lesion("000012_03_01", 2, Train_Val_Test="3")])
    return World({"root": root}, boxes={2: 1, 1: 1, None: 6})


def deeplesion3d(root: Path) -> World:
    """Three sub-volumes, one of them with an empty list where the table marks a lesion."""
    write_slices(root, "000011_01_01", range(98, 103))
    write_slices(root, "000012_03_01", range(1, 4))
    write_slices(root, "000013_01_01", range(1, 5))
    of_table = [("000011_01_01", 100), ("000012_03_01", 2), ("000013_01_01", 2)]
    write_table(root, [lesion(series, number, Train_Val_Test="3") for series, number in of_table])
    boxes = {
        "val": {"000011_01_01_098-102": [[1, 2, 99, 9, 8, 101], [11, 12, 101, 14, 20, 102]]},
        "test": {"000012_03_01_001-003": [], "000013_01_01_001-004": [[1, 1, 2, 5, 6, 2]]},
    }
    (root / "manual_3d_boxes.json").write_text(json.dumps(boxes))
    return World({"root": root}, boxes={0: 4, 1: 4, 2: 1, None: 3})


def lits(root: Path) -> World:
    """Two cases, the affine of one an identity; a third without its segmentation."""
    write_pair(root / "Training Batch 1", 0)
    write_pair(root / "Training Batch 2", 28, "RAS", image_affine=np.eye(4), ending=".nii.gz")
    write_pair(root / "Training Batch 2", 30)
    (root / "Training Batch 2" / "segmentation-30.nii").unlink()
    return World({"root": root}, boxes={0: 6, 1: 6}, num_masks=12, refused=("MISSING_MASK",))


def lidc(root: Path) -> World:
    """A nodule of four readers, one of one reader, and one below 3 mm."""
    write_lidc(root)
    return World({"root": root}, boxes={1: 4, 0: 5, None: 3}, num_masks=9)


def pictures(root: Path) -> World:
    """Tiny-ImageNet as it is unpacked, with boxes; one of them has no extent."""
    for number, wnid in enumerate(("n01", "n02")):
        lines = [f"{wnid}_{i}.JPEG\t{i}\t2\t{4 * i}\t9\n" for i in range(3)]
        write(root / "train" / wnid / f"{wnid}_boxes.txt", "".join(lines).encode())
        for i in range(3):
            write(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", jpeg(seed=10 * number + i))
    write(root / "val" / "images" / "val_0.JPEG", jpeg(seed=30, mode="L"))
    write(root / "val" / "images" / "val_1.JPEG", b"broken")
    write(root / "val" / "val_annotations.txt", b"val_0.JPEG\tn02\t0\t0\t19\t11\nval_1.JPEG\tn01\t0\t0\t5\t5\n")
    return World({"root": root, "boxes": True}, boxes={1: 5, None: 2}, refused=("BAD_IMAGE",))


def coco(root: Path) -> World:
    """Two pairs; a picture with a crowd and an object, one with a crowd only, one without annotations."""
    for name, count in (("train2017", 4), ("val2017", 2)):
        square = {"segmentation": [[2, 3, 8, 3, 8, 9, 2, 9]], "bbox": [2, 3, 6, 6], "iscrowd": 0}
        crowd = {"segmentation": {"counts": [200, 40], "size": [12, 20]}, "bbox": [16, 8, 4, 4], "iscrowd": 1}
        of_picture = [[square, crowd], [crowd], [], [square, square]][:count]
        images = [
            {"id": 7 * number, "file_name": f"{number:012}.jpg", "height": 12, "width": 20} for number in range(count)
        ]
        annotations = [
            {"id": 100 * number + place, "image_id": 7 * number, "category_id": 90 - place, **annotation}
            for number, found in enumerate(of_picture)
            for place, annotation in enumerate(found)
        ]
        categories = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 89, "name": "hair drier"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(root / "annotations" / f"instances_{name}.json", json.dumps(content).encode())
        for number in range(count):
            write(root / name / f"{number:012}.jpg", jpeg(seed=number, mode="CMYK" if number == 3 else "RGB"))
    return World({"root": root, "masks": True}, boxes={1: 2, 2: 1, 0: 1, None: 2}, num_masks=6)


def write_patient(root: Path, number: int, volume: Volume) -> None:
    """One series as ``patient <number>/<slice>.dcm``."""
    for z, ds in enumerate(ct_slices(volume), 1):
        ds.SOPInstanceUID = f"{SERIES_UID}.9{number}.{z}"
        write(root / f"patient {number}" / f"{z}.dcm", to_bytes(_of_patient(ds, number)))


def _of_patient(ds: Dataset, number: int) -> Dataset:
    """The same, of another patient, study and series."""
    ds.PatientID = f"CANARY-{number}"
    ds.StudyInstanceUID += f".9{number}"
    if ds.Modality == "CT":
        ds.SeriesInstanceUID += f".9{number}"
    for frame in ds.get("ReferencedFrameOfReferenceSequence") or []:
        frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0].SeriesInstanceUID += f".9{number}"
    for series in ds.get("ReferencedSeriesSequence") or []:
        series.SeriesInstanceUID += f".9{number}"
    return ds


MAKERS: dict[str, Callable[[Path], World]] = {
    "dicom": dicom,
    "dicom_boxes": dicom_boxes,
    "volumes": volumes,
    "deeplesion": deeplesion,
    "deeplesion3d": deeplesion3d,
    "lidc": lidc,
    "lits": lits,
    "coco": coco,
    "pictures": pictures,
}
"""By the name of the reader in ``mp3d.data.READERS``."""
