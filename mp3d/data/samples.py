"""What a run reads: which key slices, pictures or blocks of a split, found in the index without opening a file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from mp3d.config import ClipConfig
from mp3d.data.blocks import axis_steps
from mp3d.data.shard import SeriesEntry, ShardSet
from mp3d.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A key slice, a picture or a block: series of the split, and row in it."""

    entry: SeriesEntry
    row: int
    centre: tuple[float, float, float] | None = None
    """Of a block, as slice, row and column numbers; None: the middle of the slice."""


def spread(samples: Sequence[Sample], most: int | None) -> list[Sample]:
    """So many of the samples, evenly spread over them and in order; all, where there are not more or it is None."""
    if most is None or most >= len(samples):
        return list(samples)
    return [samples[(2 * number + 1) * len(samples) // (2 * most)] for number in range(most)]


def annotated_samples(shards: ShardSet, split: str, negatives: float = 0.0) -> tuple[list[Sample], list[Sample]]:
    """Key slices with boxes, and those without that may stand beside them (none where ``negatives`` is 0).

    Raises:
        DataError: no slice of the split has a box; or negatives are asked for, and none was searched in vain.
    """
    entries = shards.split(split)
    positives = [Sample(entry, row) for entry in entries for row in entry.rows_with_boxes()]
    if not positives:
        raise DataError(f"split {split!r} of {shards.folder} has no slice with a box; nothing to detect")
    spare = [Sample(entry, row) for entry in entries for row in entry.rows_without_boxes()] if negatives else []
    if negatives and not spare:
        raise DataError(
            f"loop.negatives is {negatives:g}, and split {split!r} of {shards.folder} has no slice that was searched "
            "and holds nothing, as in DeepLesion, where only key slices were looked at; set loop.negatives to 0"
        )
    return positives, spare


def classified_samples(shards: ShardSet, split: str) -> list[Sample]:
    """Every picture; of every CT series, which has one class, its middle."""
    return [
        Sample(entry, row)
        for entry in shards.split(split)
        for row in (range(entry.num_rows) if entry.spacing_mm is None else [entry.num_rows // 2])
    ]


def masked_samples(
    shards: ShardSet, split: str, clip: ClipConfig | None = None, negatives: float = 0.0
) -> tuple[list[Sample], list[Sample]]:
    """Where there is something to segment, and where masks say that there is nothing (none if ``negatives`` is 0).

    Of CT series these are the middles of blocks, or with ``clip.block`` centre there is one block for each series.
    Pictures count as positives whatever their mask marks.

    Raises:
        DataError: no row of the split has a mask that marks something.
    """
    entries = shards.split(split)
    if not any(any(entry.marked_per_row or ()) for entry in entries):
        raise DataError(f"split {split!r} of {shards.folder} has no mask that marks anything; nothing to segment")
    if entries[0].spacing_mm is None:
        searched = [(entry, marked) for entry in entries for marked in (True, False)]
        return [Sample(entry, row) for entry, marked in searched for row in entry.rows_with_mask(marked)], []
    if clip is not None and clip.block == "centre":
        return [Sample(entry, entry.num_rows // 2) for entry in entries if entry.marked_per_row], []
    positives = [Sample(entry, row) for entry in entries for row in entry.rows_with_mask(True)]
    spare = [Sample(entry, row) for entry in entries for row in entry.rows_with_mask(False)] if negatives else []
    return positives, spare


def tile_samples(shards: ShardSet, split: str, clip: ClipConfig) -> list[Sample]:
    """Blocks side by side over every series with masks; at the ends they may overlap.

    Raises:
        DataError: no series has a mask, or a file is not as it was written.
    """
    entries = [entry for entry in shards.split(split) if entry.marked_per_row]
    if not entries:
        raise DataError(f"split {split!r} of {shards.folder} has no mask; nothing to segment")
    return [sample for entry in entries for sample in _tiles(shards, entry, clip)]


def _tiles(shards: ShardSet, entry: SeriesEntry, clip: ClipConfig) -> Iterator[Sample]:
    first = shards.read_rows(entry, 0, 1)[0]
    shape = (entry.num_rows, first["rows"], first["columns"])
    counts = (clip.num_slices, clip.image_size, clip.image_size)
    per_axis = []
    for available, count, step in zip(shape, counts, axis_steps(clip, entry.spacing_mm), strict=True):
        number = int(np.ceil(available / (count * step) - 1e-6))
        per_axis.append([(index + 0.5) * count * step - 0.5 for index in range(number)])
    for z, y, x in product(*per_axis):
        yield Sample(entry, min(round(z), entry.num_rows - 1), (z, y, x))
