"""Metrics as the training loop uses them: fed batch by batch, with tensors or arrays."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mp3d.config import ClassificationHead, DetectionHead
from mp3d.errors import DataError
from mp3d.metrics import ClassificationMetric, DetectionMetric, build_metric
from mp3d.metrics.accuracy import top_k_accuracy

FOUND = {
    "boxes": torch.tensor([[10.0, 10, 30, 30], [0, 0, 5, 5]]),
    "scores": torch.tensor([0.9, 0.4]),
    "labels": torch.tensor([1, 1]),
}
NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
LESION = {"boxes": torch.tensor([[10.0, 10, 30, 30]]), "labels": torch.tensor([1])}


def test_detection_metric_over_two_batches():
    metric = build_metric(DetectionHead())
    metric.update([FOUND], [LESION])
    metric.update([NOTHING], [LESION])
    scores = metric.compute()
    assert list(scores) == [
        "froc_mean",
        *(f"sensitivity@{fps}" for fps in ("0.5", "1", "2", "4", "8", "16")),
        "ap50",
    ]
    assert scores["froc_mean"] == scores["sensitivity@1"] == 0.5
    assert scores["ap50"] == pytest.approx(51 / 101)
    assert metric.score_name in scores


def test_arrays_and_tensors_of_any_float_type_are_the_same():
    as_arrays, as_bf16 = DetectionMetric(), DetectionMetric()
    as_arrays.update(
        [{name: each.numpy() for name, each in FOUND.items()}], [{name: each.numpy() for name, each in LESION.items()}]
    )
    as_bf16.update([FOUND | {"boxes": FOUND["boxes"].bfloat16()}], [LESION])
    assert as_arrays.compute() == as_bf16.compute()


def test_predictions_without_their_targets_are_refused():
    with pytest.raises(ValueError, match="zip"):
        DetectionMetric().update([FOUND, FOUND], [LESION])


def test_detection_metric_of_nothing():
    with pytest.raises(DataError):
        DetectionMetric().compute()


def test_classification_metric():
    metric = build_metric(ClassificationHead(num_classes=3))
    logits = [[3.0, 1, 2], [0, 5, 1], [9, 0, 1]]
    metric.update([{"logits": torch.tensor(each)} for each in logits], [{"label": torch.tensor(i)} for i in (0, 1, 2)])
    scores = metric.compute()
    assert scores == {"top1": pytest.approx(2 / 3)}
    assert metric.score_name in scores
    with pytest.raises(DataError):
        ClassificationMetric(3).compute()


def test_top5_stands_where_it_says_something():
    metric = ClassificationMetric(8)
    metric.update([{"logits": np.arange(8.0)}] * 2, [{"label": 3}, {"label": 2}])
    assert metric.compute() == {"top1": 0, "top5": 0.5}


def test_ties_and_nan_do_not_flatter_the_model():
    assert top_k_accuracy(np.zeros((2, 4)), np.array([0, 3])) == 0
    assert top_k_accuracy(np.full((2, 4), np.nan), np.array([0, 3])) == 0
    assert top_k_accuracy(np.array([[np.nan, 1.0]]), np.array([1])) == 0
    assert top_k_accuracy(np.zeros((2, 4)), np.array([0, 3]), k=4) == 1


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(DataError, match=r"labels 1\.\.4 do not fit 4 classes"):
        top_k_accuracy(np.zeros((2, 4)), np.array([1, 4]))
    with pytest.raises(DataError, match="no sample"):
        top_k_accuracy(np.zeros((0, 4)), np.zeros(0, dtype=int))


def test_importing_the_metrics_does_not_import_torch():
    code = "import sys, mp3d.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
