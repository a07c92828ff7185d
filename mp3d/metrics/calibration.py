"""Whether a score means what it says: of the answers with a score of 0.7, are 70 % right?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mp3d.errors import DataError

NUM_BINS = 10


@dataclass(frozen=True, eq=False)
class Calibration:
    """A reliability diagram and its summary.

    Attributes:
        counts: answers in each of the bins, which divide [0, 1] evenly.
        mean_score: of each bin; NaN where it is empty, and so is ``share_right``.
        ece: expected calibration error (Guo et al. 2017): the mean distance of the two, weighted by the counts.
        brier: mean squared distance of the score from 1 where the answer is right, 0 where it is wrong.
    """

    counts: Int[np.ndarray, " bins"]
    mean_score: Float[np.ndarray, " bins"]
    share_right: Float[np.ndarray, " bins"]
    ece: float
    brier: float


def calibration(
    scores: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], num_bins: int = NUM_BINS
) -> Calibration:
    """
    Args:
        scores: in [0, 1]; a score on the edge of two bins is in the lower one.
        right: whether each answer is.

    Raises:
        DataError: no answer, or a score that is no probability.
    """
    if len(scores) == 0:
        raise DataError("calibration is undefined: there is no answer")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise DataError(f"scores reach from {scores.min():g} to {scores.max():g}; a probability is between 0 and 1")
    place = np.clip(np.ceil(scores * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(place, minlength=num_bins)
    mean_score, share_right = (
        np.divide(
            np.bincount(place, weights=values, minlength=num_bins),
            counts,
            out=np.full(num_bins, np.nan),
            where=counts > 0,
        )
        for values in (scores, right.astype(float))
    )
    apart = np.nan_to_num(np.abs(mean_score - share_right))
    brier = float(np.mean((scores - right) ** 2))
    return Calibration(counts, mean_score, share_right, float((counts * apart).sum() / len(scores)), brier)
