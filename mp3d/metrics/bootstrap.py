"""How far a figure would move with other patients: intervals by resampling patients, never slices or lesions.

Slices of one patient resemble each other, so intervals that resample slices are too narrow. A replicate draws as many
patients as there are, with replacement; a record weighs as often as its patient was drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

NUM_REPLICATES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """Percentile interval; NaN where hardly a replicate defines the figure."""

    low: float
    high: float


def patient_weights(
    patients: Sequence[str], num_replicates: int = NUM_REPLICATES, seed: int = 0
) -> Int[np.ndarray, "replicates records"]:
    """How often each record is in each replicate; the same for the same patients and seed, in whatever order records
    stand.

    Args:
        patients: of each record.
    """
    names, of_record = np.unique(list(patients), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), num_replicates)
    return draws.astype(np.int32)[:, of_record]


def interval(replicates: Float[np.ndarray, " replicates"], level: float = LEVEL) -> Interval:
    """Where the middle ``level`` of the replicates lies, of those in which the figure is defined."""
    defined = replicates[~np.isnan(replicates)]
    if 2 * len(defined) < len(replicates) or len(defined) == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(low), float(high))


def weighted_mean(
    values: Float[np.ndarray, " records"], weights: Int[np.ndarray, "replicates records"]
) -> Float[np.ndarray, " replicates"]:
    """Of each replicate, over the records whose value is no NaN; NaN where there is none."""
    defined = ~np.isnan(values)
    total = weights[:, defined].sum(1)
    sums = weights[:, defined] @ values[defined]
    return np.divide(sums, total, out=np.full(len(weights), np.nan), where=total > 0)
