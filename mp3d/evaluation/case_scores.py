"""Classifiers and segmenters by their numbers: scores with intervals by patient, calibration, paired tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import softmax
from scipy.stats import rankdata

from mp3d.errors import DataError
from mp3d.evaluation.prediction_file import Predictions, check_same_truth
from mp3d.evaluation.results import Case, ClassifiedCase, SegmentedCase
from mp3d.metrics.accuracy import top_k_accuracy
from mp3d.metrics.bootstrap import NUM_REPLICATES, Interval, interval, patient_weights, weighted_mean
from mp3d.metrics.calibration import Calibration, calibration
from mp3d.metrics.classification import (
    AUTHORS_THRESHOLDS,
    best_threshold,
    roc_auc,
    threshold_scores,
    weighted_auc,
    weighted_threshold_scores,
)
from mp3d.metrics.dice import dice


@dataclass(frozen=True, eq=False)
class CaseEvaluation:
    """A classifier or a segmenter on one set of cases.

    Attributes:
        scores: by name, as :func:`classification_scores` or :func:`segmentation_scores` have them.
        intervals: 95 %, by resampling patients, of those that have one.
        num_defined: of scores that are means over cases, how many of the cases define them (:func:`num_defined`).
        threshold_from: where the threshold of a two-class classifier comes from, in words.
        calibration: of a classifier, of the class it says.
        comparisons: of other models on the same cases, the score by which they are compared and the paired test.
    """

    name: str
    head: str
    cases: Sequence[Case]
    scores: Mapping[str, float]
    intervals: Mapping[str, Interval]
    num_defined: Mapping[str, int]
    threshold_from: str | None
    calibration: Calibration | None
    class_names: Sequence[str]
    provenance: Mapping[str, str] = field(default_factory=dict)
    comparisons: Mapping[str, "CaseComparison"] = field(default_factory=dict)
    num_replicates: int = NUM_REPLICATES

    @property
    def num_patients(self) -> int:
        return len({case.patient for case in self.cases})


@dataclass(frozen=True)
class CaseComparison:
    """Another model: its value of ``score``, the difference from the judged one, the chance of it, and its answers."""

    score: str
    value: float
    difference: float
    interval: Interval
    p_value: float
    cases: Sequence[Case] = field(compare=False, repr=False)


def evaluate_cases(
    predictions: Predictions,
    name: str,
    comparisons: Mapping[str, Sequence[Case]] | None = None,
    class_names: Sequence[str] = (),
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> CaseEvaluation:
    """Scores of a classifier or segmenter with their intervals.

    Raises:
        DataError: no case, or as the scores say; or a comparison on other cases.
    """
    cases: Sequence[Case] = predictions.records
    if not cases:
        raise DataError("there is no case to judge; the split is empty")
    weights = patient_weights([case.patient for case in cases], num_replicates, seed)
    point = predictions.operating_point or {}
    classified = [case for case in cases if isinstance(case, ClassifiedCase)]
    known, defined = None, {}
    if classified:
        scores = classification_scores(classified, point.get("threshold"))
        logits, labels = _columns(classified)
        said, probabilities = logits.argmax(1), softmax(logits, axis=1)
        known = calibration(probabilities[np.arange(len(said)), said], said == labels)
    else:
        segmented = [case for case in cases if isinstance(case, SegmentedCase)]
        scores, defined = segmentation_scores(segmented), num_defined(segmented)
    replicates = case_replicates(cases, weights, scores.get("threshold"))
    return CaseEvaluation(
        name=name,
        head=predictions.head,
        cases=cases,
        scores=scores,
        intervals={score: interval(values) for score, values in replicates.items()},
        num_defined=defined,
        threshold_from=(point.get("chosen_on") or "the judged cases themselves") if "threshold" in scores else None,
        calibration=known,
        class_names=class_names,
        provenance=predictions.provenance,
        comparisons={
            other_name: _compared(name, cases, other_name, other, weights, seed)
            for other_name, other in (comparisons or {}).items()
        },
        num_replicates=num_replicates,
    )


def case_replicates(cases: Sequence[Case], weights: np.ndarray, threshold: float | None) -> dict[str, np.ndarray]:
    """Scores under each row of weights of the cases, by name."""
    classified = [case for case in cases if isinstance(case, ClassifiedCase)]
    if classified:
        logits, labels = _columns(classified)
        replicates = {"top1": weighted_mean((_rank(logits, labels) <= 1).astype(float), weights)}
        if logits.shape[1] == 2:
            replicates["auc"] = weighted_auc(logits[:, 1] - logits[:, 0], labels, weights)
            if threshold is not None:
                replicates |= weighted_threshold_scores(_probability(logits), labels, threshold, weights)
        return replicates
    counts = np.array([case.counts for case in cases if isinstance(case, SegmentedCase)], np.int64)
    distances = np.array([case.hausdorff_95_mm for case in cases if isinstance(case, SegmentedCase)], float)
    each_dice = dice(counts)
    per_class = {
        "dice_per_case": np.stack([weighted_mean(column, weights) for column in each_dice.T], 1),
        "dice_global": dice(np.einsum("rn,ncv->rcv", weights, counts)),
        "hausdorff_95_mm": np.stack([weighted_mean(column, weights) for column in distances.T], 1),
    }
    replicates = {name: _nan_mean(values.T) for name, values in per_class.items()}
    if counts.shape[1] > 1:
        for name, values in per_class.items():
            replicates |= {f"{name}_{number}": column for number, column in enumerate(values.T, 1)}
    return replicates


def _compared(
    name: str, cases: Sequence[Case], other_name: str, others: Sequence[Case], weights: np.ndarray, seed: int
) -> CaseComparison:
    """By AUC, top-1 accuracy or Dice per case: a bootstrap interval, and a permutation of the answers of patients."""
    check_same_truth(name, cases, other_name, others)
    whole = case_replicates(cases, np.ones((1, len(cases)), np.int64), None)
    score = next(score for score in ("auc", "top1", "dice_per_case") if score in whole)
    value = case_replicates(others, np.ones((1, len(cases)), np.int64), None)[score][0]
    difference = float(value - whole[score][0])
    spread = case_replicates(others, weights, None)[score] - case_replicates(cases, weights, None)[score]
    names, of_case = np.unique([case.patient for case in cases], return_inverse=True)
    swap = np.random.default_rng(seed).integers(0, 2, (len(weights), len(names)))[:, of_case]
    both = [*_ranked(cases), *_ranked(others)]
    doubled = (np.concatenate([1 - swap, swap], axis=1), np.concatenate([swap, 1 - swap], axis=1))
    first, second = (case_replicates(both, of, None)[score] for of in doubled)
    as_large = int((np.abs(second - first) >= abs(difference) - 1e-12).sum())
    p_value = (1 + as_large) / (1 + len(weights))
    return CaseComparison(score, float(value), difference, interval(spread), p_value, others)


def _ranked(cases: Sequence[Case]) -> Sequence[Case]:
    """Two-class cases with ranks among themselves for logits: the answers of two models can be swapped though their
    logits lie elsewhere, as the ROC curve of either is the same."""
    classified = [case for case in cases if isinstance(case, ClassifiedCase)]
    if not classified or len(classified[0].logits) != 2:
        return cases
    logits, _ = _columns(classified)
    ranks = rankdata(logits[:, 1] - logits[:, 0])
    return [replace(case, logits=(0.0, float(rank))) for case, rank in zip(classified, ranks, strict=True)]


def classification_scores(cases: Sequence[ClassifiedCase], threshold: float | None = None) -> dict[str, float]:
    """``top1``, ``top5`` of more than five classes; of two classes ``auc``, and at a threshold of the probability of
    class 1: ``threshold``, ``accuracy``, ``sensitivity``, ``specificity``, ``precision``, ``f1``.

    Args:
        threshold: chosen on other cases (:func:`chosen_threshold`); None: as the authors do, the best tenth on the very
            cases that are judged, which flatters.

    Raises:
        DataError: a label that is no class, or two classes of which one has no case.
    """
    logits, labels = _columns(cases)
    scores = {"top1": top_k_accuracy(logits, labels)}
    if logits.shape[1] > 5:
        scores["top5"] = top_k_accuracy(logits, labels, k=5)
    if logits.shape[1] == 2:
        of_class_1 = _probability(logits)
        if threshold is None:
            threshold = best_threshold(of_class_1, labels, AUTHORS_THRESHOLDS)
        scores["auc"] = roc_auc(logits[:, 1] - logits[:, 0], labels)
        scores |= threshold_scores(of_class_1, labels, threshold).as_dict()
    return scores


def chosen_threshold(cases: Sequence[ClassifiedCase]) -> float:
    """The threshold of the probability of class 1 that is best on these cases, those of the validation split.

    Raises:
        DataError: a class without a case.
    """
    logits, labels = _columns(cases)
    return best_threshold(_probability(logits), labels)


def segmentation_scores(cases: Sequence[SegmentedCase]) -> dict[str, float]:
    """``dice_per_case``, ``dice_global`` (over the voxels of all cases) and ``hausdorff_95_mm``, means over classes;
    of several classes each of them too, as ``dice_per_case_1`` and so on. Where all cases are undefined it is NaN.

    Raises:
        DataError: no case.
    """
    if not cases:
        raise DataError("there is no case to judge; the split is empty")
    counts = np.array([case.counts for case in cases], np.int64)
    per_class = {
        "dice_per_case": _nan_mean(dice(counts)),
        "dice_global": dice(counts.sum(0)),
        "hausdorff_95_mm": _nan_mean(np.array([case.hausdorff_95_mm for case in cases], float)),
    }
    scores = {name: float(_nan_mean(values)) for name, values in per_class.items()}
    if counts.shape[1] > 1:
        for name, values in per_class.items():
            scores |= {f"{name}_{number}": float(value) for number, value in enumerate(values, 1)}
    return scores


def num_defined(cases: Sequence[SegmentedCase]) -> dict[str, int]:
    """By name of a score of :func:`segmentation_scores` that is a mean over cases, how many of them it is over.

    Dice needs a voxel in one of the masks; HD95 one in each of them, and a truth that is known everywhere. Over several
    classes, a case counts in which one of them is defined.
    """
    values = {
        "dice_per_case": dice(np.array([case.counts for case in cases], np.int64)),
        "hausdorff_95_mm": np.array([case.hausdorff_95_mm for case in cases], float),
    }
    numbers = {}
    for name, of_classes in values.items():
        defined = ~np.isnan(of_classes)
        numbers[name] = int(defined.any(axis=1).sum())
        if defined.shape[1] > 1:
            numbers |= {f"{name}_{number}": int(each.sum()) for number, each in enumerate(defined.T, 1)}
    return numbers


def _columns(cases: Sequence[ClassifiedCase]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([case.logits for case in cases], float), np.array([case.label for case in cases])


def _probability(logits: np.ndarray) -> np.ndarray:
    """Of class 1 of two."""
    return softmax(logits, axis=1)[:, 1]


def _rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of the true class; ties count against the model, as in :func:`~mp3d.metrics.accuracy.top_k_accuracy`."""
    own = logits[np.arange(len(labels)), labels]
    return np.sum(~(logits < own[:, None]), axis=1)


def _nan_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is defined."""
    defined = ~np.isnan(values)
    number = defined.sum(0)
    return np.where(number > 0, np.where(defined, values, 0).sum(0) / np.maximum(number, 1), np.nan)
