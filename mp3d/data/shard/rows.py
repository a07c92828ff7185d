"""The stored row: its schema, how it is made of a series or a picture, and back."""

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from mp3d.data.series import CTSeries, Picture, Truth

SCHEMA = pa.schema(
    [
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("patient", pa.string(), nullable=False),  # keyed hashes: see hashed_id
        pa.field("study", pa.string(), nullable=False),
        pa.field("series", pa.string(), nullable=False),
        pa.field("z_index", pa.int32(), nullable=False),  # slice number in the source; a picture's place in its batch
        pa.field("z_mm", pa.float64()),  # along the slice normal, from the first slice
        pa.field("spacing_mm", pa.list_(pa.float64())),  # z, y, x
        pa.field("affine", pa.list_(pa.float64())),  # 16 values, row by row: (column, row, slice, 1) -> LPS mm
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("columns", pa.int32(), nullable=False),
        pa.field("encoding", pa.string(), nullable=False),  # "int16" or "jpeg"
        pa.field("image", pa.binary(), nullable=False),
        pa.field("boxes", pa.list_(pa.float32())),  # 4 values a box, xyxy; null: nobody looked
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("instances", pa.list_(pa.int32())),  # one a box: which object of the series it is a slice of
        pa.field("lesion_types", pa.list_(pa.string())),  # one a box, in the data set's words
        pa.field("diameters_mm", pa.list_(pa.float32())),  # one a box, long diameter; absent in older files: null
        pa.field("mask", pa.binary()),  # rows x columns uint8
        pa.field("image_label", pa.int32()),
        pa.field("reader", pa.string(), nullable=False),
        pa.field("crc32", pa.int64(), nullable=False),
    ]
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """What every row of a part has in common."""

    dataset: str
    reader: str
    """Reader and its version, e.g. ``volumes/1``."""
    id_key: bytes
    """Secret of the keyed hashes; with the same key a patient has the same id in every data set."""


def hashed_id(value: str, key: bytes) -> str:
    """Keyed hash (BLAKE2b, 64 bits, hex) that stands for a patient, study or series."""
    return blake2b(value.encode(errors="surrogateescape"), key=key, digest_size=8).hexdigest()


def series_rows(series: CTSeries, split: str, origin: Origin) -> list[Row]:
    """The rows of a CT series, slices in ascending order; images are views of the volume where that is contiguous.

    Raises:
        ValueError: no slices, pixels that are not int16, an affine that is not finite, has no extent or mirrors, or a
            truth that does not fit its slice.
    """
    volume = series.volume
    if volume.hu.ndim != 3 or 0 in volume.hu.shape or volume.hu.dtype != np.int16:
        raise ValueError(f"pixels are {volume.hu.dtype} {volume.hu.shape}; they must be int16 (d, h, w), each above 0")
    if not np.isfinite(volume.affine).all() or min(volume.spacing_mm) <= 0:
        raise ValueError(f"spacing (z, y, x) is {volume.spacing_mm} mm; it must be above 0, and the affine finite")
    if (determinant := float(np.linalg.det(volume.affine[:3, :3]))) <= 0:
        rule = "it must be above 0: slices ascend along the normal, which is the axis of columns x that of rows"
        raise ValueError(f"the determinant of the affine is {determinant:g}; {rule}; turn the volume")
    hu = np.ascontiguousarray(volume.hu, dtype="<i2")
    common = {
        **_identity(series.patient, series.study, series.series, split, origin),
        "spacing_mm": list(volume.spacing_mm),
        "affine": volume.affine.ravel().tolist(),
        "rows": volume.hu.shape[1],
        "columns": volume.hu.shape[2],
        "encoding": "int16",
        "image_label": series.image_label,
    }
    return [
        _sealed(
            common
            | _truth_columns(truth, volume.hu.shape[1], volume.hu.shape[2])
            | {
                "z_index": series.first_index + z,
                "z_mm": z * volume.spacing_mm[0],
                "image": hu[z].data.cast("B"),
            }
        )
        for z, truth in enumerate(series.truths)
    ]


def picture_rows(pictures: Iterable[Picture], split: str, origin: Origin) -> list[Row]:
    """The rows of colour pictures; each picture is a patient of its own.

    Raises:
        ValueError: a truth that does not fit its picture.
    """
    return [
        _sealed(
            _identity(picture.name, picture.name, picture.name, split, origin)
            | _truth_columns(picture.truth, picture.rows, picture.columns)
            | {
                "z_index": index,
                "z_mm": None,
                "spacing_mm": None,
                "affine": None,
                "rows": picture.rows,
                "columns": picture.columns,
                "encoding": "jpeg",
                "image": picture.jpeg,
                "image_label": picture.image_label,
            }
        )
        for index, picture in enumerate(pictures)
    ]


def rows_of(table: pa.Table) -> list[Row]:
    """The rows of a table with :data:`SCHEMA`; images are views of the table's memory."""
    images = [image for chunk in table["image"].chunks for image in _views(chunk)]
    rows = table.drop_columns(["image"]).to_pylist()
    return [row | {"image": image} for row, image in zip(rows, images, strict=True)]


def _views(column: pa.BinaryArray) -> list[memoryview]:
    _, offsets, content = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].tolist()
    memory = memoryview(content)
    return [memory[start:stop] for start, stop in pairwise(bounds)]


def decode_image(row: Row) -> np.ndarray:
    """The picture of a row: int16 HU ``(h, w)`` of a slice, or uint8 ``(3, h, w)`` planes of a colour picture."""
    if row["encoding"] == "int16":
        return np.frombuffer(row["image"], "<i2").reshape(row["rows"], row["columns"])
    from PIL import Image

    with Image.open(BytesIO(row["image"])) as picture:
        return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


def decode_truth(row: Row) -> Truth:
    """The annotation of a row; see :class:`~mp3d.data.series.Truth` for null against empty."""
    boxes, labels, mask = row["boxes"], row["labels"], row["mask"]
    return Truth(
        boxes=None if boxes is None else np.asarray(boxes, np.float32).reshape(-1, 4),
        labels=None if labels is None else np.asarray(labels, np.int64),
        mask=None if mask is None else np.frombuffer(mask, np.uint8).reshape(row["rows"], row["columns"]),
        instances=None if row["instances"] is None else np.asarray(row["instances"], np.int64),
        types=None if row["lesion_types"] is None else tuple(row["lesion_types"]),
        diameters_mm=None if (known := row.get("diameters_mm")) is None else np.asarray(known, np.float32),
    )


def row_is_intact(row: Row) -> bool:
    """Whether a row that another reader of Parquet delivered is the row that was written."""
    return row["crc32"] == _crc32(row)


def _identity(patient: str, study: str, series: str, split: str, origin: Origin) -> Row:
    return {
        "dataset": origin.dataset,
        "split": split,
        "patient": hashed_id(patient, origin.id_key),
        "study": hashed_id(study, origin.id_key),
        "series": hashed_id(series, origin.id_key),
        "reader": origin.reader,
    }


def _truth_columns(truth: Truth, rows: int, columns: int) -> Row:
    boxes = None if truth.boxes is None else np.asarray(truth.boxes, np.float32)
    labels = None if truth.labels is None else np.asarray(truth.labels)
    instances = None if truth.instances is None else np.asarray(truth.instances)
    diameters = None if truth.diameters_mm is None else np.asarray(truth.diameters_mm, np.float32)
    if boxes is not None:
        _check_boxes(boxes, rows, columns)
    for name, numbers in (("label", labels), ("instance", instances)):
        if numbers is not None and (boxes is None or numbers.shape != boxes.shape[:1] or not (numbers >= 1).all()):
            rule = f"there must be one {name} from 1 on for each box"
            raise ValueError(f"{name}s {numbers.tolist()} for boxes {boxes}; {rule}")
    if truth.types is not None and (boxes is None or len(truth.types) != len(boxes)):
        raise ValueError(f"lesion types {truth.types} for boxes {boxes}; there must be one for each box")
    if diameters is not None and (boxes is None or diameters.shape != boxes.shape[:1] or (diameters <= 0).any()):
        rule = "there must be one above 0, or NaN, for each box"
        raise ValueError(f"diameters {diameters.tolist()} mm for boxes {boxes}; {rule}")
    if truth.mask is not None and (truth.mask.shape != (rows, columns) or truth.mask.dtype != np.uint8):
        raise ValueError(f"the mask is {truth.mask.dtype} {truth.mask.shape}; it must be uint8 {(rows, columns)}")
    return {
        "boxes": None if boxes is None else boxes.ravel().tolist(),
        "labels": None if labels is None else labels.tolist(),
        "instances": None if instances is None else instances.tolist(),
        "lesion_types": None if truth.types is None else list(truth.types),
        "diameters_mm": None if diameters is None else diameters.tolist(),
        "mask": None if truth.mask is None else truth.mask.tobytes(),
    }


def _check_boxes(boxes: np.ndarray, rows: int, columns: int) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have shape {boxes.shape}; it must be (b, 4)")
    x1, y1, x2, y2 = boxes.T
    good = (x1 >= 0) & (x1 < x2) & (x2 <= columns) & (y1 >= 0) & (y1 < y2) & (y2 <= rows)  # false for NaN
    if not good.all():
        raise ValueError(f"box {boxes[~good][0].tolist()} in {columns} x {rows} pixels; 0 <= x1 < x2 <= columns, so y")


def _sealed(row: Row) -> Row:
    return row | {"crc32": _crc32(row)}


def _crc32(row: Row) -> int:
    """CRC over the bytes columns and a canonical text of all others, in schema order.

    Diameters stand behind the others, and only where there are some: so a row of a file that was written before there
    was this column has the CRC that it was written with.
    """
    crc = zlib.crc32(row["image"])
    if row["mask"] is not None:
        crc = zlib.crc32(row["mask"], crc)
    rest = [row[name] for name in SCHEMA.names if name not in ("image", "mask", "crc32", "diameters_mm")]
    if row.get("diameters_mm") is not None:
        rest.append(row["diameters_mm"])
    return zlib.crc32(json.dumps(rest).encode(), crc)
