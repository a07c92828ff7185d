"""Scores of two-class answers against tables worked out by hand, and against every pair of samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from mp3d.config import ClassificationHead
from mp3d.errors import DataError
from mp3d.metrics import build_metric
from mp3d.metrics.classification import AUTHORS_THRESHOLDS, best_threshold, roc_auc, threshold_scores

SCORES = np.array([0.1, 0.35, 0.4, 0.8])
LABELS = np.array([0, 1, 0, 1])
samples = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=2, max_size=40).filter(
    lambda pairs: len({label for _, label in pairs}) == 2
)


def test_area_by_hand():
    assert roc_auc(SCORES, LABELS) == 3 / 4
    assert roc_auc(np.zeros(4), LABELS) == 0.5
    assert roc_auc(-SCORES, LABELS) == 1 / 4


@given(samples)
def test_area_is_the_share_of_pairs_in_order(pairs: list[tuple[int, int]]):
    scores, labels = np.array(pairs, float).T
    ones, zeros = scores[labels == 1], scores[labels == 0]
    order = (ones[:, None] > zeros).mean() + 0.5 * (ones[:, None] == zeros).mean()
    assert roc_auc(scores, labels.astype(int)) == pytest.approx(order)
    assert roc_auc(scores, labels.astype(int)) == pytest.approx(
        mannwhitneyu(ones, zeros).statistic / (len(ones) * len(zeros))
    )


def test_what_a_threshold_makes_of_the_scores():
    scores = threshold_scores(np.array([0.9, 0.5, 0.4, 0.6, 0.2]), np.array([1, 1, 1, 0, 0]), 0.5)
    assert scores.as_dict() == {
        "threshold": 0.5,
        "accuracy": 3 / 5,
        "sensitivity": 2 / 3,
        "specificity": 1 / 2,
        "precision": 2 / 3,
        "f1": 2 / 3,
    }


def test_shares_of_nothing_are_not_numbers():
    scores = threshold_scores(np.array([0.2, 0.3]), np.array([0, 0]), 0.5)
    assert (scores.accuracy, scores.specificity) == (1, 1)
    assert np.isnan([scores.sensitivity, scores.precision, scores.f1]).all()


def test_the_best_threshold_by_hand():
    # at 0.1: 1 + 0, at 0.35: 1 + 1/2, at 0.4: 1/2 + 1/2, at 0.8: 1/2 + 1; of two equally good ones the lower
    assert best_threshold(SCORES, LABELS) == 0.35
    # tenths: at 0.2 and 0.3 everything from 0.35 on, as above
    assert best_threshold(SCORES, LABELS, AUTHORS_THRESHOLDS) == 0.2


@given(samples)
def test_no_candidate_is_better(pairs: list[tuple[int, int]]):
    scores, labels = np.array(pairs, float).T

    def youden(threshold: float) -> float:
        found = threshold_scores(scores, labels.astype(int), threshold)
        return found.sensitivity + found.specificity

    best = youden(best_threshold(scores, labels.astype(int)))
    assert best == pytest.approx(max(youden(threshold) for threshold in scores))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([], [], "no sample"),
        ([0.1, 0.2], [1, 1], "0 samples of class 0 and 2 of class 1"),
        ([0.1, 0.2], [0, 2], r"labels are \[0, 2\]"),
        ([0.1, np.nan], [0, 1], "diverged"),
    ],
)
def test_what_cannot_be_judged_is_refused(scores: list[float], labels: list[int], message: str):
    with pytest.raises(DataError, match=message):
        roc_auc(np.array(scores, float), np.array(labels, int))


def test_two_classes_are_ranked_by_the_area():
    metric = build_metric(ClassificationHead(num_classes=2))
    for score, label in zip(SCORES, LABELS, strict=True):
        metric.update([{"logits": np.array([0.0, score])}], [{"label": int(label)}])
    assert metric.compute() == {"top1": 0.5, "auc": 3 / 4}
    assert metric.score_name == "auc"
