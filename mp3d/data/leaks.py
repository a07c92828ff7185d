"""Who or what is in two splits, of one data set or of two.

Patients, studies and series are told by their keyed hashes, so names that are equal count as the same, and two data
sets can be compared where they were prepared with the same id key only. Images are told by their pixels, whatever
their names and keys: each picture, and of a CT series the slices around its middle. CT slices are told by how often
each value occurs, so that one which another header turned or flipped, as happens in LiTS, is the same.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations, product

import numpy as np

from mp3d.data.shard import MANIFEST, SeriesEntry, ShardSet, read_columns
from mp3d.data.survey import SplitSurvey

COMPARED_SLICES = 20_000
"""Of all series of a data set together, about a minute: a whole LIDC-IDRI gets 20 of each series, LiTS all."""
MIN_VALUES = 64
"""Slices with fewer values are told apart by their bytes, and of these only the middle ones: others show hardly
anything."""

Traces = dict[str, dict[str, dict[str, str]]]
"""Of each kind and split: what it is recognised by, and the hashed id that it is reported under."""


@dataclass(frozen=True)
class Shared:
    """What two splits have in common.

    Attributes:
        kind: ``patients``, ``studies``, ``series`` or ``images``.
        split: of this data set.
        other_split: of this data set, or of the other one.
        ids: hashed ids in this data set, in order; of images those of their series.
    """

    kind: str
    split: str
    other_split: str
    ids: tuple[str, ...]

    @property
    def is_leak(self) -> bool:
        """Training twice on the same is none; whatever is learned from here and judged or chosen by there is."""
        return self.split != self.other_split


def id_key_fingerprint(shards: ShardSet) -> str | None:
    """Equal for data sets whose ids can be compared; None where the manifest is too old to say."""
    return json.loads((shards.folder / MANIFEST).read_bytes()).get("id_key")


def traces(shards: ShardSet, surveys: Mapping[str, SplitSurvey]) -> Traces:
    """What each split can be recognised by.

    Pictures are told by their pixels only: names such as ``train/cat/1.jpg`` say nothing between two data sets.

    Raises:
        DataError: a file is not there, or not as it was written.
    """
    is_ct = any(entry.spacing_mm is not None for entry in shards.entries)
    found: Traces = {
        kind: {split: {name: name for name in getattr(of, kind)} for split, of in surveys.items()}
        for kind in (("patients", "studies", "series") if is_ct else ())
    }
    found["images"] = {split: dict(_images(shards, split)) for split in surveys}
    return found


def shared_within(mine: Traces) -> list[Shared]:
    """What two splits of a data set have in common."""
    return [
        found
        for kind, splits in mine.items()
        for first, second in combinations(splits, 2)
        if (found := _shared(kind, first, splits[first], second, splits[second]))
    ]


def shared_between(mine: Traces, other: Traces, *, same_key: bool) -> list[Shared]:
    """What the splits of two data sets have in common; with different id keys only images can be told."""
    return [
        found
        for kind in mine
        if kind in other and (same_key or kind == "images")
        for first, second in product(mine[kind], other[kind])
        if (found := _shared(kind, first, mine[kind][first], second, other[kind][second]))
    ]


def _shared(kind: str, split: str, mine: Mapping[str, str], other_split: str, other: Mapping) -> Shared | None:
    common = mine.keys() & other.keys()
    return Shared(kind, split, other_split, tuple(sorted({mine[each] for each in common}))) if common else None


def _images(shards: ShardSet, split: str) -> Iterator[tuple[str, str]]:
    """Digest and series of each picture, and of some slices around the middle of each series that show something."""
    num_series = sum(entry.spacing_mm is not None for entry in shards.entries)
    for entry in shards.split(split):
        if entry.spacing_mm is None:
            table = read_columns(shards, entry, ("image", "series"))
            for image, series in zip(table["image"], table["series"], strict=True):
                yield _digest(image.as_buffer()), series.as_py()
        else:
            for digest in _slices(shards, entry, COMPARED_SLICES // num_series):
                yield digest, entry.series


def _slices(shards: ShardSet, entry: SeriesEntry, at_most: int) -> Iterator[str]:
    """Of the middle slice (of an even number both, for the series may be stored upside down), and of those around."""
    last = entry.num_rows - 1
    middle = {last // 2, last - last // 2}
    start = max((entry.num_rows - at_most) // 2, 0)
    for z in sorted(middle | set(range(start, min(start + at_most, entry.num_rows)))):
        (row,) = shards.view_rows(entry, z, z + 1)
        counts = np.bincount(np.frombuffer(row["image"], "<i2").view("<u2"), minlength=2**16)
        num_values = np.count_nonzero(counts)
        if num_values >= MIN_VALUES:
            yield _digest(counts.tobytes())
        elif num_values > 1 and z in middle:
            yield _digest(row["image"])


def _digest(content: bytes | memoryview) -> str:
    return blake2b(content, digest_size=16).hexdigest()
