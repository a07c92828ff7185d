"""One Parquet file of what a model said and what is true, from which every metric can be computed again.

Format ``mp3d predictions 2``. A row is a slice (detection) or a case (classification, segmentation), as the fields of
:mod:`mp3d.evaluation.results` say. Boxes are all that the model gave, with their scores; no threshold and no protocol
has been applied. No pixels; patients and series by the keyed hashes of the shards. The schema's metadata:

    format           mp3d predictions 2
    head             detection | classification | segmentation
    slices           key (annotated slices, each judged in its own clip) | all (every slice of searched series)
    grid_spacing_mm  JSON: of the grid whose positions are answered for in a whole series; null: every slice
    provenance       JSON: digests of checkpoint, data and passport, configuration, versions, date
    operating_point  JSON: what was chosen on the validation split, or null
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mp3d.data.shard.aside import commit_aside, create_aside
from mp3d.errors import DataError
from mp3d.evaluation.results import ClassifiedCase, KeySliceResult, Record, SegmentedCase

FORMAT = b"mp3d predictions 2"
Head = Literal["detection", "classification", "segmentation"]

_IDS = {"patient": pa.string(), "series": pa.string()}
_BOXES = pa.list_(pa.list_(pa.float32(), 4))
_NUMBERS = pa.list_(pa.int64())
SCHEMAS: dict[Head, pa.Schema] = {
    "detection": pa.schema(
        {
            **_IDS,
            "z_index": pa.int32(),
            "spacing_mm": pa.list_(pa.float64(), 3),
            "true_boxes": _BOXES,
            "true_labels": _NUMBERS,
            "true_types": pa.list_(pa.string()),
            "true_instances": _NUMBERS,
            "true_diameters_mm": pa.list_(pa.float32()),
            "boxes": _BOXES,
            "scores": pa.list_(pa.float32()),
            "labels": _NUMBERS,
        }
    ),
    "classification": pa.schema({**_IDS, "label": pa.int64(), "logits": pa.list_(pa.float64())}),
    "segmentation": pa.schema(
        {
            **_IDS,
            "counts": pa.list_(pa.list_(pa.int64(), 3)),
            "hausdorff_95_mm": pa.list_(pa.float64()),
            "shown_slice": pa.int32(),
            "shown_mask": pa.binary(),
        }
    ),
}
RECORDS: dict[Head, type[Record]] = {
    "detection": KeySliceResult,
    "classification": ClassifiedCase,
    "segmentation": SegmentedCase,
}


@dataclass(frozen=True, eq=False)
class Predictions:
    """The content of a prediction file; its attributes are those of the format."""

    head: Head
    records: Sequence[Any]
    provenance: Mapping[str, str] = field(default_factory=dict)
    slices: Literal["key", "all"] = "key"
    grid_spacing_mm: float | None = None
    operating_point: Mapping[str, Any] | None = None

    @property
    def split(self) -> str | None:
        """The split that was judged, as the provenance has it."""
        _, is_told, split = self.provenance.get("data set", "").rpartition(", split ")
        return split if is_told else None


def write_predictions(path: Path, predictions: Predictions) -> Path:
    """Write or replace the file, whole or not at all."""
    metadata = {
        b"format": FORMAT,
        b"head": predictions.head.encode(),
        b"slices": predictions.slices.encode(),
        b"grid_spacing_mm": json.dumps(predictions.grid_spacing_mm).encode(),
        b"provenance": json.dumps(dict(predictions.provenance)).encode(),
        b"operating_point": json.dumps(predictions.operating_point).encode(),
    }
    schema = SCHEMAS[predictions.head].with_metadata(metadata)
    table = pa.Table.from_pylist([record.as_row() for record in predictions.records], schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = create_aside(path)
    try:
        pq.write_table(table, temporary, compression="zstd")
        commit_aside(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_predictions(path: Path) -> Predictions:
    """What :func:`write_predictions` wrote.

    Raises:
        DataError: the file is missing, damaged, no Parquet file, or not one of ours.
    """
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        if metadata.get(b"format") != FORMAT:
            raise DataError(
                f"{path} is no file of the format {FORMAT.decode()!r}; write it again with jobs/evaluate.py"
            )
        head: Head = metadata[b"head"].decode()
        if head == "detection" and "true_diameters_mm" not in table.column_names:  # as in older files
            unknown = pa.array([[math.nan] * len(boxes) for boxes in table["true_boxes"]], pa.list_(pa.float32()))
            place = SCHEMAS[head].get_field_index("true_diameters_mm")
            table = table.add_column(place, "true_diameters_mm", unknown)
        if not table.schema.remove_metadata().equals(SCHEMAS[head]):
            raise DataError(f"{path} has other columns than {SCHEMAS[head].names}; write it again")
        return Predictions(
            head=head,
            records=[RECORDS[head].from_row(row) for row in table.to_pylist()],
            provenance=json.loads(metadata[b"provenance"]),
            slices=metadata[b"slices"].decode(),
            grid_spacing_mm=json.loads(metadata[b"grid_spacing_mm"]),
            operating_point=json.loads(metadata[b"operating_point"]),
        )
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise DataError(f"cannot read predictions from {path}: {type(error).__name__}: {error}") from error


def check_same_truth(name: str, records: Sequence[Any], other_name: str, others: Sequence[Any]) -> None:
    """Raises: DataError, the two were not judged on the same records with the same truth, in the same order."""

    def truth(each: Record) -> tuple:
        match each:
            case KeySliceResult():
                return each.series, each.z_index, each.true_boxes.tobytes()
            case ClassifiedCase():
                return each.series, each.label
            case SegmentedCase():
                return each.series, *(theirs for _, _, theirs in each.counts)

    if [truth(each) for each in records] != [truth(each) for each in others]:
        raise DataError(
            f"{other_name!r} was not judged on the slices or cases of {name!r}, in the same order and with the same "
            "truth; only then may they stand side by side"
        )
