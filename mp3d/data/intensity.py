"""Statistics of the pixels of a split, over slices (or pictures) that are evenly spread over it."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from jaxtyping import Int

from mp3d.data.shard import ShardSet, decode_image


@dataclass(frozen=True, eq=False)
class Intensities:
    """How often each value occurs in the sampled rows.

    Attributes:
        unit: ``HU``, or ``grey`` for the 0..255 of all three planes of a colour picture.
        num_rows: how many were sampled.
        lowest: the value that ``counts[0]`` counts.
    """

    unit: str
    num_rows: int
    lowest: int
    counts: Int[np.ndarray, "v"]

    @property
    def values(self) -> Int[np.ndarray, "v"]:
        return np.arange(len(self.counts)) + self.lowest

    def percentile(self, percent: float) -> int:
        """The smallest value that at least so many of a hundred pixels do not exceed."""
        reached = np.cumsum(self.counts)
        return int(self.values[np.searchsorted(reached, max(percent / 100 * reached[-1], 1))])

    @property
    def mean(self) -> float:
        return float(np.average(self.values, weights=self.counts))

    @property
    def std(self) -> float:
        return float(np.sqrt(np.average((self.values - self.mean) ** 2, weights=self.counts)))


def sample_intensities(shards: ShardSet, split: str, at_most: int) -> Intensities:
    """Counts over at most so many rows of a split; the same shards give the same rows.

    Raises:
        DataError: no such split; or a file is not there, or not as it was written.
    """
    entries = shards.split(split)
    ends = list(accumulate(entry.num_rows for entry in entries))
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(at_most, ends[-1])).round().astype(int))
    is_ct = entries[0].spacing_mm is not None
    lowest, num_values = (-(2**15), 2**16) if is_ct else (0, 2**8)
    counts = np.zeros(num_values, np.int64)
    for index in chosen.tolist():
        number = bisect_right(ends, index)
        row = index - ends[number] + entries[number].num_rows
        image = decode_image(shards.read_rows(entries[number], row, row + 1)[0])
        counts += np.bincount(image.ravel().astype(np.int64) - lowest, minlength=num_values)
    return Intensities("HU" if is_ct else "grey", len(chosen), lowest, counts)
