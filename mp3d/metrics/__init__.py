"""What a trained head is judged by, in numpy: fed batch by batch, computed once."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mp3d.errors import ConfigError, DataError
from mp3d.metrics.accuracy import top_k_accuracy
from mp3d.metrics.average_precision import average_precision
from mp3d.metrics.froc import MP3D_PORT, Detections, FrocProtocol, froc

Records = Sequence[Mapping[str, Any]]
"""Predictions or targets of ``mp3d.sample``, one per key slice; their values are numpy arrays or CPU tensors."""


class DetectionMetric:
    """FROC and average precision of all boxes taken as one class, *lesion*."""

    score_name = "froc_mean"
    """The metric that picks the best checkpoint."""

    def __init__(self, protocol: FrocProtocol = MP3D_PORT) -> None:
        self._protocol = protocol
        self._detections: list[Detections] = []
        self._truths: list[np.ndarray] = []

    def update(self, predictions: Records, targets: Records) -> None:
        for prediction, target in zip(predictions, targets, strict=True):
            self._detections.append((_float_array(prediction["boxes"]), _float_array(prediction["scores"])))
            self._truths.append(_float_array(target["boxes"]))

    def compute(self) -> dict[str, float]:
        """``froc_mean`` (at 0.5, 1, 2 and 4 false positives per image), ``sensitivity@0.5`` .. ``@16``, ``ap50``.

        Raises:
            DataError: no key slice, or none with a true box.
        """
        result = froc(self._detections, self._truths, self._protocol)
        return {
            "froc_mean": result.mean_sensitivity,
            **{f"sensitivity@{fps:g}": value for fps, value in result.sensitivity_at.items()},
            "ap50": average_precision(self._detections, self._truths),
        }


class ClassificationMetric:
    """Top-1 accuracy, and top-5 where there are more than five classes."""

    score_name = "top1"
    """The metric that picks the best checkpoint."""

    def __init__(self) -> None:
        self._logits: list[np.ndarray] = []
        self._labels: list[int] = []

    def update(self, predictions: Records, targets: Records) -> None:
        for prediction, target in zip(predictions, targets, strict=True):
            self._logits.append(_float_array(prediction["logits"]))
            self._labels.append(int(target["label"]))

    def compute(self) -> dict[str, float]:
        """``top1`` and ``top5``.

        Raises:
            DataError: no sample, or a label that is no class.
        """
        if not self._logits:
            raise DataError("accuracy is undefined: there is no sample; the split is empty")
        logits, labels = np.stack(self._logits), np.array(self._labels)
        scores = {"top1": top_k_accuracy(logits, labels)}
        if logits.shape[1] > 5:
            scores["top5"] = top_k_accuracy(logits, labels, k=5)
        return scores


Metric = DetectionMetric | ClassificationMetric


def build_metric(head_kind: str) -> Metric:
    """The metric of a head (``ModelConfig.head.kind``).

    Raises:
        ConfigError: no such head.
    """
    match head_kind:
        case "detection":
            return DetectionMetric()
        case "classification":
            return ClassificationMetric()
        case _:
            raise ConfigError(f"there is no metric for head {head_kind!r}; heads: detection, classification")


def _float_array(values: Any) -> np.ndarray:
    """Float64 copy of an array or a CPU tensor of any floating type (numpy knows no bfloat16, hence ``double``)."""
    return np.array(values if isinstance(values, np.ndarray) else values.detach().double().numpy(), dtype=np.float64)
