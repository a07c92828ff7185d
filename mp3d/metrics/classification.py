"""Two-class answers: the area under the ROC curve, and what a threshold makes of the scores."""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Int

from mp3d.errors import DataError

AUTHORS_THRESHOLDS = tuple(tenth / 10 for tenth in range(10))
"""Among which the authors' ``base_dataset.py`` chooses, on the test set."""


@dataclass(frozen=True)
class ThresholdScores:
    """Class 1 is said from the threshold on. A share of nothing is NaN, as is the precision of no positive answer."""

    threshold: float
    accuracy: float
    sensitivity: float
    specificity: float
    precision: float
    f1: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def roc_auc(scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Chance that a sample of class 1 has a higher score than one of class 0; ties count half.

    Raises:
        DataError: a class without a sample, a label that is neither, or a score that is NaN.
    """
    _check(scores, labels)
    positives, negatives = scores[labels == 1], np.sort(scores[labels == 0])
    below, not_above = (np.searchsorted(negatives, positives, side=side) for side in ("left", "right"))
    return float((below + not_above).sum() / 2 / (len(positives) * len(negatives)))


def roc_curve(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """1 - specificity, sensitivity and threshold of each point, from none said to all said; equal scores: one point.

    Raises:
        DataError: as of :func:`roc_auc`.
    """
    _check(scores, labels)
    thresholds = np.unique(scores)[::-1]
    positives, negatives = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    sensitivity = 1 - np.searchsorted(positives, thresholds, side="left") / len(positives)
    alarms = 1 - np.searchsorted(negatives, thresholds, side="left") / len(negatives)
    return np.r_[0.0, alarms], np.r_[0.0, sensitivity], np.r_[np.inf, thresholds]


def weighted_auc(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], weights: Int[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """:func:`roc_auc` under each row of weights; NaN where a class has none."""
    _, place = np.unique(scores, return_inverse=True)
    at = np.eye(place.max() + 1, dtype=np.int64)[place]
    positives, negatives = ((weights * (labels == label)) @ at for label in (1, 0))
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = (positives * (2 * below + negatives)).sum(1)
    possible = 2 * positives.sum(1) * negatives.sum(1)
    return np.divide(pairs, possible, out=np.full(len(weights), np.nan), where=possible > 0)


def weighted_threshold_scores(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], threshold: float, weights: Int[np.ndarray, "r n"]
) -> dict[str, Float[np.ndarray, " r"]]:
    """:func:`threshold_scores` under each row of weights, by name; NaN where it is a share of nothing."""
    said, true = scores >= threshold, labels == 1
    hits, misses, alarms, rejections = (
        weights @ which for which in (said & true, ~said & true, said & ~true, ~said & ~true)
    )

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.full(len(weights), np.nan), where=whole > 0)

    return {
        "accuracy": share(hits + rejections, weights.sum(1)),
        "sensitivity": share(hits, hits + misses),
        "specificity": share(rejections, rejections + alarms),
        "precision": share(hits, hits + alarms),
        "f1": share(2 * hits, 2 * hits + alarms + misses),
    }


def threshold_scores(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], threshold: float
) -> ThresholdScores:
    """What is right where class 1 is said from ``threshold`` on.

    Raises:
        DataError: no sample, a label that is neither 0 nor 1, or a score that is NaN.
    """
    _check_values(scores, labels)
    said, true = scores >= threshold, labels == 1
    hits, misses = int((said & true).sum()), int((~said & true).sum())
    alarms, rejections = int((said & ~true).sum()), int((~said & ~true).sum())
    return ThresholdScores(
        threshold=float(threshold),
        accuracy=(hits + rejections) / len(labels),
        sensitivity=_share(hits, hits + misses),
        specificity=_share(rejections, rejections + alarms),
        precision=_share(hits, hits + alarms),
        f1=_share(2 * hits, 2 * hits + alarms + misses),
    )


def best_threshold(
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    candidates: tuple[float, ...] | None = None,
) -> float:
    """The candidate with the highest sum of sensitivity and specificity; of several the lowest.

    To be chosen on other samples than those that it is judged on.

    Args:
        candidates: None: every score that occurs.

    Raises:
        DataError: as of :func:`roc_auc`.
    """
    _check(scores, labels)
    tried = np.unique(scores) if candidates is None else np.sort(candidates)
    positives, negatives = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    sensitivity = 1 - np.searchsorted(positives, tried, side="left") / len(positives)
    specificity = np.searchsorted(negatives, tried, side="left") / len(negatives)
    return float(tried[np.argmax(sensitivity + specificity)])


def _check(scores: np.ndarray, labels: np.ndarray) -> None:
    _check_values(scores, labels)
    counts = int((labels == 0).sum()), int((labels == 1).sum())
    if 0 in counts:
        raise DataError(f"there are {counts[0]} samples of class 0 and {counts[1]} of class 1; both need at least one")


def _check_values(scores: np.ndarray, labels: np.ndarray) -> None:
    if len(labels) == 0:
        raise DataError("there is no sample to judge; the split is empty")
    if not np.isin(labels, (0, 1)).all():
        raise DataError(f"the labels are {np.unique(labels).tolist()}; of two classes they are 0 and 1")
    if np.isnan(scores).any():
        raise DataError("a score is NaN: the model has diverged")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
