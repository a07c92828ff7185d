"""Classifiers and segmenters judged case by case: a case is a CT series (or the cube around a nodule), or a picture."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit

from mp3d.checkpoint import open_checkpoint
from mp3d.config import UNKNOWN, ClassificationHead, EvaluateConfig, ModelConfig, SegmentationHead
from mp3d.data.batches import ClipDataset, evaluation_batches
from mp3d.data.samples import Sample, classified_samples, masked_samples
from mp3d.data.shard import SeriesEntry, ShardSet, decode_image, decode_truth, open_shards
from mp3d.device import pick_device, ready_for_inference
from mp3d.errors import ConfigError, DataError
from mp3d.evaluation.key_slices import predict_clips
from mp3d.metrics.accuracy import top_k_accuracy
from mp3d.metrics.classification import AUTHORS_THRESHOLDS, best_threshold, roc_auc, threshold_scores
from mp3d.metrics.dice import dice, hausdorff_95, overlap_counts
from mp3d.models import ClipSegmenter, build_model
from mp3d.segment import VolumeSegmenter, largest_components


@dataclass(frozen=True)
class ClassifiedCase:
    """``label`` is what is true, ``logits`` are the model's, one a class; ids as hashed in the shards."""

    patient: str
    series: str
    label: int
    logits: tuple[float, ...]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        return cls(row["patient"], row["series"], row["label"], tuple(row["logits"]))


@dataclass(frozen=True)
class SegmentedCase:
    """How the mask of a case agrees with the true one.

    Attributes:
        patient: hashed id, as in the shards; so is ``series``.
        counts: of each class of the foreground, voxels in both masks, in the predicted one, in the true one.
        hausdorff_95_mm: of each class; NaN where one of the masks is empty, for pictures, and where the truth of a
            slice is not known.
    """

    patient: str
    series: str
    counts: tuple[tuple[int, int, int], ...]
    hausdorff_95_mm: tuple[float, ...]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        counts = tuple((both, ours, theirs) for both, ours, theirs in row["counts"])
        return cls(row["patient"], row["series"], counts, tuple(row["hausdorff_95_mm"]))


Case = ClassifiedCase | SegmentedCase


def as_row(case: Case) -> dict[str, Any]:
    """Plain lists and numbers, for :func:`case_from_row`."""
    return json.loads(json.dumps(asdict(case)))


def case_from_row(row: Mapping[str, Any]) -> Case:
    return ClassifiedCase.from_row(row) if "logits" in row else SegmentedCase.from_row(row)


def case_samples(config: EvaluateConfig, model: ModelConfig, shards: ShardSet, split: str) -> list[Sample]:
    """The cases of a split, at most ``max_clips`` of them, evenly spread.

    Raises:
        DataError: the split is empty, or nothing in it has a mask where masks are judged.
        ConfigError: the model is a detector.
    """
    entries = shards.split(split)
    match model.head:
        case ClassificationHead():
            samples = classified_samples(shards, split)
        case SegmentationHead() if entries[0].spacing_mm is None:
            samples, _ = masked_samples(shards, split)
        case SegmentationHead():
            samples = [Sample(entry, 0) for entry in entries if any(entry.marked_per_row or ())]
        case _:
            raise ConfigError("a detector is judged on key slices, not on cases")
    if not samples:
        raise DataError(f"split {split!r} of {shards.folder} has no mask that marks anything; nothing to judge")
    return samples[:: math.ceil(len(samples) / (config.max_clips or len(samples)))]


class CasePredictor:
    """A checkpoint that answers for cases of a data set.

    Raises:
        CheckpointError, DataError: checkpoint or shards cannot be used.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        checkpoint = open_checkpoint(config.checkpoint)
        checkpoint.check_trained()
        self.config, self.clip = config, checkpoint.config.clip
        self.shards = open_shards(config.shards)
        self.device = pick_device(config.accelerator)
        self.model = build_model(checkpoint.config.model, self.clip)
        self.model.load_state_dict(checkpoint.model_state())
        self.dtype = ready_for_inference(self.model, self.clip, checkpoint.config.loop.precision, self.device)

    def __call__(self, samples: Sequence[Sample]) -> list[Case]:
        if isinstance(self.model, ClipSegmenter) and self.clip.block is not None:
            segmenter = VolumeSegmenter(self.model, self.clip, self.device, self.dtype)
            return [self._segmented(segmenter, sample.entry) for sample in samples]
        dataset = ClipDataset(self.shards, list(samples), self.clip)
        batches = evaluation_batches(dataset, batch_size=self.config.batch_size)
        answers = predict_clips(self.model, batches, self.device, self.dtype)
        if not isinstance(self.model, ClipSegmenter):
            return [
                ClassifiedCase(info.patient, info.series, int(target["label"]), tuple(prediction["logits"].tolist()))
                for prediction, target, info in answers
            ]
        number = self.model.head.num_classes
        return [
            SegmentedCase(
                info.patient,
                info.series,
                _counts(prediction["mask_logits"].argmax(0).numpy(), target["mask"].numpy(), number),
                (math.nan,) * number,
            )
            for prediction, target, info in answers
        ]

    def _segmented(self, segmenter: VolumeSegmenter, entry: SeriesEntry) -> SegmentedCase:
        """On the series' own voxels."""
        if entry.spacing_mm is None:
            raise DataError(f"{self.shards.folder} holds pictures, and the segmenter was trained on blocks of CT")
        rows = list(self.shards.iter_rows(entry))
        hu = np.stack([decode_image(row) for row in rows])
        true = np.full(hu.shape, UNKNOWN, np.uint8)
        for plane, row in zip(true, rows, strict=True):
            if (mask := decode_truth(row).mask) is not None:
                plane[...] = mask
        predicted = segmenter.segment(hu, entry.spacing_mm)
        if self.config.largest_component:
            predicted = largest_components(predicted)
        number, all_known = segmenter.model.head.num_classes, not (true == UNKNOWN).any()
        distances = [
            hausdorff_95(predicted == each, true == each, entry.spacing_mm) if all_known else math.nan
            for each in range(1, number + 1)
        ]
        return SegmentedCase(entry.patient, entry.series, _counts(predicted, true, number), tuple(distances))


def case_scores(cases: Sequence[Case], choose_on: Sequence[Case] | None = None) -> dict[str, float]:
    """:func:`classification_scores` or :func:`segmentation_scores`.

    Raises:
        DataError: no case, or as they say.
    """
    classified, others = ([case for case in of or () if isinstance(case, ClassifiedCase)] for of in (cases, choose_on))
    if classified:
        return classification_scores(classified, None if choose_on is None else others)
    return segmentation_scores([case for case in cases if isinstance(case, SegmentedCase)])


def classification_scores(
    cases: Sequence[ClassifiedCase], choose_on: Sequence[ClassifiedCase] | None = None
) -> dict[str, float]:
    """``top1``, ``top5`` of more than five classes; of two classes ``auc``, and at a threshold of the probability of
    class 1: ``threshold``, ``accuracy``, ``sensitivity``, ``specificity``, ``precision``, ``f1``.

    Args:
        choose_on: cases of another split, on which the threshold is chosen; None: as the authors do, the best tenth
            on the very cases that are judged, which flatters.

    Raises:
        DataError: a label that is no class, or two classes of which one has no case.
    """
    logits, labels = _columns(cases)
    scores = {"top1": top_k_accuracy(logits, labels)}
    if logits.shape[1] > 5:
        scores["top5"] = top_k_accuracy(logits, labels, k=5)
    if logits.shape[1] == 2:
        of_class_1 = _probability(logits)
        if choose_on is None:
            threshold = best_threshold(of_class_1, labels, AUTHORS_THRESHOLDS)
        else:
            other_logits, other_labels = _columns(choose_on)
            threshold = best_threshold(_probability(other_logits), other_labels)
        scores["auc"] = roc_auc(logits[:, 1] - logits[:, 0], labels)
        scores |= threshold_scores(of_class_1, labels, threshold).as_dict()
    return scores


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


def write_cases(
    folder: Path, cases: Sequence[Case], scores: Mapping[str, float], provenance: Mapping[str, str]
) -> None:
    """``predictions.parquet``, one row a case, and ``metrics.json``, in which what is undefined is null."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([as_row(case) for case in cases])
    pq.write_table(table, folder / "predictions.parquet", compression="zstd")
    content = {
        "metrics": {name: None if math.isnan(value) else value for name, value in scores.items()},
        "num_cases": len(cases),
        "num_patients": len({case.patient for case in cases}),
        "provenance": dict(provenance),
    }
    (folder / "metrics.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _counts(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((both, ours, theirs) for both, ours, theirs in overlap_counts(predicted, true, num_classes).tolist())


def _columns(cases: Sequence[ClassifiedCase]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([case.logits for case in cases], float), np.array([case.label for case in cases])


def _probability(logits: np.ndarray) -> np.ndarray:
    """Of class 1 of two."""
    return expit(logits[:, 1] - logits[:, 0])


def _nan_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is defined."""
    defined = ~np.isnan(values)
    number = defined.sum(0)
    return np.where(number > 0, np.where(defined, values, 0).sum(0) / np.maximum(number, 1), np.nan)
