"""What a trained head is judged by, in numpy: fed batch by batch, computed once."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mp3d.config import ClassificationHead, DetectionHead, SegmentationHead
from mp3d.errors import DataError
from mp3d.metrics.accuracy import top_k_accuracy
from mp3d.metrics.average_precision import average_precision, mean_average_precision
from mp3d.metrics.classification import roc_auc
from mp3d.metrics.dice import Counts, dice, overlap_counts
from mp3d.metrics.froc import Detections, froc
from mp3d.metrics.protocols import MP3D_PORT, FrocProtocol

Records = Sequence[Mapping[str, Any]]
"""Predictions or targets of ``mp3d.sample``, one per key slice; their values are numpy arrays or CPU tensors."""


class DetectionMetric:
    """FROC and average precision of all boxes taken as one class, *lesion*; of several classes COCO's mAP too.

    Attributes:
        score_name: of the metric that picks the best checkpoint.
        records: what was fed; those of several processes may be joined.
    """

    def __init__(self, num_classes: int = 1, protocol: FrocProtocol = MP3D_PORT) -> None:
        self.num_classes, self._protocol = num_classes, protocol
        self.score_name = "map" if num_classes > 1 else "froc_mean"
        self.records: list[tuple[np.ndarray, ...]] = []

    def update(self, predictions: Records, targets: Records) -> None:
        for prediction, target in zip(predictions, targets, strict=True):
            found = (_float_array(prediction["boxes"]), _float_array(prediction["scores"]))
            true_boxes = _float_array(target["boxes"])
            labels, true_labels = (np.asarray(each["labels"]) for each in (prediction, target))
            self.records.append((*found, labels, true_boxes, true_labels))

    def compute(self) -> dict[str, float]:
        """``froc_mean`` (at 0.5, 1, 2 and 4 false positives per image), ``sensitivity@0.5`` .. ``@16``, ``ap50``, and
        ``map`` of several classes.

        Raises:
            DataError: no key slice, or none with a true box.
        """
        detections: list[Detections] = [(boxes, scores) for boxes, scores, *_ in self.records]
        truths = [true_boxes for *_, true_boxes, _ in self.records]
        result = froc(detections, truths, self._protocol)
        metrics = {
            "froc_mean": result.mean_sensitivity,
            **{f"sensitivity@{fps:g}": value for fps, value in result.sensitivity_at.items()},
            "ap50": average_precision(detections, truths),
        }
        if self.num_classes > 1:
            detected_labels = [labels for _, _, labels, _, _ in self.records]
            true_labels = [labels for *_, labels in self.records]
            metrics["map"] = mean_average_precision(detections, detected_labels, truths, true_labels)
        return metrics


class ClassificationMetric:
    """Top-1 accuracy, top-5 of more than five classes, AUC of two. Attributes as of :class:`DetectionMetric`."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.score_name = "auc" if num_classes == 2 else "top1"
        self.records: list[tuple[np.ndarray, int]] = []

    def update(self, predictions: Records, targets: Records) -> None:
        for prediction, target in zip(predictions, targets, strict=True):
            self.records.append((_float_array(prediction["logits"]), int(target["label"])))

    def compute(self) -> dict[str, float]:
        """``top1``, ``top5`` and ``auc``.

        Raises:
            DataError: no sample, a label that is no class, or two classes of which one has no sample.
        """
        if not self.records:
            raise DataError("accuracy is undefined: there is no sample; the split is empty")
        logits, labels = (np.stack(column) for column in zip(*self.records, strict=True))
        scores = {"top1": top_k_accuracy(logits, labels)}
        if self.num_classes > 5:
            scores["top5"] = top_k_accuracy(logits, labels, k=5)
        if self.num_classes == 2:
            scores["auc"] = roc_auc(logits[:, 1] - logits[:, 0], labels)
        return scores


class SegmentationMetric:
    """Dice of each class over all pixels together. Attributes as of :class:`DetectionMetric`."""

    score_name = "dice"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.records: list[Counts] = []

    def update(self, predictions: Records, targets: Records) -> None:
        """A target without a mask counts for nothing."""
        for prediction, target in zip(predictions, targets, strict=True):
            if "mask" in target:
                predicted = np.asarray(prediction["mask_logits"].argmax(0))
                self.records.append(overlap_counts(predicted, np.asarray(target["mask"]), self.num_classes))

    def compute(self) -> dict[str, float]:
        """``dice``, the mean over classes, and of several classes ``dice_1`` and so on; a class that neither the masks
        nor the answers have is left out.

        Raises:
            DataError: no mask marks anything.
        """
        counts = np.sum([np.zeros((self.num_classes, 3), np.int64), *self.records], axis=0)
        if not counts[:, 2].any():
            raise DataError("Dice is undefined: no mask of the split marks anything")
        values = dice(counts)
        numbered = {f"dice_{number}": float(value) for number, value in enumerate(values, 1) if not np.isnan(value)}
        return {"dice": float(np.nanmean(values)), **(numbered if self.num_classes > 1 else {})}


Metric = DetectionMetric | ClassificationMetric | SegmentationMetric


def build_metric(head: DetectionHead | ClassificationHead | SegmentationHead) -> Metric:
    """The metric of a head."""
    match head:
        case DetectionHead():
            return DetectionMetric(head.num_classes)
        case ClassificationHead():
            return ClassificationMetric(head.num_classes)
        case SegmentationHead():
            return SegmentationMetric(head.num_classes)


def _float_array(values: Any) -> np.ndarray:
    """Float64 copy of an array or a CPU tensor of any floating type (numpy knows no bfloat16, hence ``double``)."""
    return np.array(values if isinstance(values, np.ndarray) else values.detach().double().numpy(), dtype=np.float64)
