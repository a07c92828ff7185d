"""What the rows of prepared shards say without their pixels: who is in which split, how large, how many boxes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mp3d.data.shard import Row, SeriesEntry, ShardSet, read_columns
from mp3d.data.splits import SPLITS

_OF_BOXES = ("rows", "columns", "boxes", "labels")
_OF_ROWS = ("patient", "study", "series", "rows", "columns", "boxes", "instances", "image_label")


@dataclass(frozen=True, eq=False)
class SplitBoxes:
    """The boxes of a split, one row each.

    Attributes:
        boxes: xyxy in pixels of the stored picture.
        labels: from 1 on.
        image_sizes: rows and columns of the picture.
        spacing_mm: between rows and between columns; NaN in pictures without a scale.
    """

    boxes: Float[np.ndarray, "b 4"]
    labels: Int[np.ndarray, "b"]
    image_sizes: Int[np.ndarray, "b 2"]
    spacing_mm: Float[np.ndarray, "b 2"]

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def widths_heights(self) -> Float[np.ndarray, "b 2"]:
        """In pixels of the stored picture."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).astype(float)

    @property
    def widths_heights_mm(self) -> Float[np.ndarray, "b 2"]:
        return self.widths_heights * self.spacing_mm[:, ::-1]

    def widths_heights_at(self, image_size: int) -> Float[np.ndarray, "b 2"]:
        """In pixels of a picture whose longer side was made so long, as the model's first part does it."""
        scale = image_size / self.image_sizes.max(axis=1, keepdims=True, initial=1)
        resized = np.maximum(np.round(self.image_sizes * scale), 1)
        return self.widths_heights * (resized / self.image_sizes)[:, ::-1]


@dataclass(frozen=True, eq=False)
class SplitSurvey:
    """One split. A picture is a patient, a study and a series of its own.

    Attributes:
        patients: hashed ids, as ``studies`` and ``series``.
        num_rows: slices or pictures.
        num_searched: rows of which it is known what they hold, be it nothing.
        num_key_rows: rows with a box.
        num_instances: objects whose boxes on several slices are known to be of one.
        image_labels: how often each occurs.
        image_sizes: rows and columns of series (or pictures), and how often they occur.
        slices_per_series: of CT series.
        spacing_mm: z, y, x of CT series.
    """

    patients: frozenset[str]
    studies: frozenset[str]
    series: frozenset[str]
    num_rows: int
    num_searched: int
    num_key_rows: int
    num_instances: int
    image_labels: Counter[int]
    image_sizes: Counter[tuple[int, int]]
    slices_per_series: Int[np.ndarray, "s"]
    spacing_mm: Float[np.ndarray, "s 3"]
    boxes: SplitBoxes


def survey(shards: ShardSet) -> dict[str, SplitSurvey]:
    """Every split that has a series.

    Raises:
        DataError: a file is not there, or not as it was written.
    """
    present = {entry.split for entry in shards.entries}
    return {split: _survey_split(shards, split) for split in SPLITS if split in present}


def read_boxes(shards: ShardSet, split: str) -> SplitBoxes:
    """The boxes of a split; only series that have any are opened.

    Raises:
        DataError: no such split; or a file is not there, or not as it was written.
    """
    parts = []
    for entry in shards.split(split):
        if keys := entry.rows_with_boxes():
            rows = read_columns(shards, entry, _OF_BOXES).take(keys).to_pylist()
            parts.append(_box_table(rows, entry))
    return _stacked(parts)


def read_image_labels(shards: ShardSet, split: str) -> dict[str, list[int | None]]:
    """By series (or batch of pictures) the class of each row.

    Raises:
        DataError: no such split; or a file is not there, or not as it was written.
    """
    return {
        entry.series: read_columns(shards, entry, ("image_label",))["image_label"].to_pylist()
        for entry in shards.split(split)
    }


def _survey_split(shards: ShardSet, split: str) -> SplitSurvey:
    patients, studies, series = set[str](), set[str](), set[str]()
    image_labels, image_sizes = Counter[int](), Counter[tuple[int, int]]()
    counted = Counter[str]()
    for entry in shards.split(split):
        table = read_columns(shards, entry, _OF_ROWS)
        for ids, name in ((patients, "patient"), (studies, "study"), (series, "series")):
            ids.update(table[name].unique().to_pylist())
        image_labels.update(label for label in table["image_label"].to_pylist() if label is not None)
        sizes = list(zip(table["rows"].to_pylist(), table["columns"].to_pylist(), strict=True))
        image_sizes.update(sizes if entry.spacing_mm is None else sizes[:1])
        counted["rows"] += len(sizes)
        counted["searched"] += len(sizes) - table["boxes"].null_count
        counted["key"] += len(entry.rows_with_boxes())
        counted["instances"] += len({each for row in table["instances"].to_pylist() for each in row or ()})
    stacks = [entry for entry in shards.split(split) if entry.spacing_mm is not None]
    return SplitSurvey(
        patients=frozenset(patients),
        studies=frozenset(studies),
        series=frozenset(series),
        num_rows=counted["rows"],
        num_searched=counted["searched"],
        num_key_rows=counted["key"],
        num_instances=counted["instances"],
        image_labels=image_labels,
        image_sizes=image_sizes,
        slices_per_series=np.array([entry.num_rows for entry in stacks], int),
        spacing_mm=np.array([entry.spacing_mm for entry in stacks], float).reshape(-1, 3),
        boxes=read_boxes(shards, split),
    )


def _box_table(rows: Iterable[Row], entry: SeriesEntry) -> SplitBoxes:
    """Of rows that have boxes; without labels all are of class 1, as in training."""
    boxes, labels, sizes = [], [], []
    for row in rows:
        count = len(row["boxes"]) // 4
        boxes += row["boxes"]
        labels += row["labels"] or [1] * count
        sizes += [(row["rows"], row["columns"])] * count
    in_plane = (np.nan, np.nan) if entry.spacing_mm is None else entry.spacing_mm[1:]
    return SplitBoxes(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, int),
        image_sizes=np.array(sizes, int),
        spacing_mm=np.tile(np.array(in_plane, float), (len(sizes), 1)),
    )


def _stacked(parts: Sequence[SplitBoxes]) -> SplitBoxes:
    if not parts:
        return SplitBoxes(np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros((0, 2), int), np.zeros((0, 2)))
    columns = ("boxes", "labels", "image_sizes", "spacing_mm")
    return SplitBoxes(*(np.concatenate([getattr(part, column) for part in parts]) for column in columns))
