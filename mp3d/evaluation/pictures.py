"""The pixels behind predictions, read from the shards when a report asks for one."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mp3d.data.shard import Row, SeriesEntry, ShardSet, decode_image, decode_truth, read_columns
from mp3d.errors import DataError
from mp3d.evaluation.results import ClassifiedCase, KeySliceResult, Record, SegmentedCase, unpack_mask


class MaskedSlice(NamedTuple):
    """A slice (or the planes of a picture), what is true of it and what was answered.

    Attributes:
        image: ``(h, w)`` HU, or the planes ``(3, h, w)``.
        true_mask: ``(h, w)``; so is ``predicted_mask``.
        spacing_mm: z, y, x; None: of a picture.
    """

    image: np.ndarray
    true_mask: np.ndarray
    predicted_mask: np.ndarray
    spacing_mm: tuple[float, float, float] | None = None


class Pictures:
    """Slices of one split; None where the shards do not hold what a prediction is of."""

    def __init__(self, shards: ShardSet, split: str) -> None:
        self.shards, self.split, self.entries = shards, split, shards.split(split)

    def check_holds(self, records: Sequence[Record]) -> None:
        """Raises: DataError, none of the records is of this split: the predictions are of other data."""
        there = {entry.series for entry in self.entries}
        if not any(record.series in there or record.series in self._picture_places for record in records):
            raise DataError(
                f"split {self.split!r} of {self.shards.folder} holds nothing that the predictions are of; give the "
                "shards that were judged, or none for a report without pictures"
            )

    def key_slice(self, result: KeySliceResult) -> np.ndarray | None:
        """``(h, w)`` HU."""
        for entry in self._entries_of(result.series):
            first = self.shards.read_rows(entry, 0, 1)[0]
            row = self._row(entry, result.z_index - first["z_index"])
            if row is not None:
                return decode_image(row)
        return None

    def classified(self, case: ClassifiedCase) -> np.ndarray | None:
        """The middle slice, ``(h, w)`` HU; or the planes of a picture, ``(3, h, w)``."""
        for entry in self._entries_of(case.series):
            row = self._row(entry, entry.num_rows // 2)
            return None if row is None else decode_image(row)
        found = self._picture(case.series)
        return None if found is None else decode_image(found)

    def segmented(self, case: SegmentedCase) -> MaskedSlice | None:
        """The slice that the case shows."""
        row, spacing_mm = self._picture(case.series), None
        for entry in self._entries_of(case.series):
            row, spacing_mm = self._row(entry, case.shown_slice), entry.spacing_mm
        if row is None:
            return None
        true = decode_truth(row).mask
        predicted = unpack_mask(case.shown_mask, (row["rows"], row["columns"]))
        if true is None or predicted is None:
            return None
        return MaskedSlice(decode_image(row), true, predicted, spacing_mm)

    def _entries_of(self, series: str) -> list[SeriesEntry]:
        return [entry for entry in self.entries if entry.series == series and entry.spacing_mm is not None]

    def _row(self, entry: SeriesEntry, index: int) -> Row | None:
        return self.shards.read_rows(entry, index, index + 1)[0] if 0 <= index < entry.num_rows else None

    def _picture(self, series: str) -> Row | None:
        place = self._picture_places.get(series)
        return None if place is None else self._row(*place)

    @cached_property
    def _picture_places(self) -> dict[str, tuple[SeriesEntry, int]]:
        batches = [entry for entry in self.entries if entry.spacing_mm is None]
        return {
            name: (entry, index)
            for entry in batches
            for index, name in enumerate(read_columns(self.shards, entry, ["series"])["series"].to_pylist())
        }
