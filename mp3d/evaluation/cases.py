"""The answers of classifiers and segmenters, case by case: a CT series (or the cube around a nodule), or a picture."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from mp3d.checkpoint import open_checkpoint
from mp3d.config import UNKNOWN, ClassificationHead, EvaluateConfig, ModelConfig, SegmentationHead
from mp3d.data.batches import ClipDataset, evaluation_batches
from mp3d.data.samples import Sample, classified_samples, masked_samples, spread
from mp3d.data.shard import SeriesEntry, ShardSet, decode_image, decode_truth, open_shards
from mp3d.device import pick_device, ready_for_inference
from mp3d.errors import ConfigError, DataError
from mp3d.evaluation.key_slices import predict_clips
from mp3d.evaluation.results import Case, ClassifiedCase, SegmentedCase, pack_mask
from mp3d.metrics.dice import hausdorff_95, overlap_counts
from mp3d.models import ClipSegmenter, build_model
from mp3d.segment import VolumeSegmenter, largest_components


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
    return spread(samples, config.max_clips)


class CasePredictor:
    """A checkpoint that answers for cases of a data set.

    Raises:
        CheckpointError, DataError: checkpoint or shards cannot be used.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        checkpoint = open_checkpoint(config.checkpoint or "")
        checkpoint.check_trained()
        self.config, self.clip = config, checkpoint.config.clip
        self.shards = open_shards(config.shards or "")
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
        cases: list[Case] = []
        for (prediction, target, info), sample in zip(answers, samples, strict=True):
            mask = prediction["mask_logits"].argmax(0).numpy().astype(np.uint8)
            counts = _counts(mask, target["mask"].numpy(), number)
            undefined = (math.nan,) * number
            cases.append(SegmentedCase(info.patient, info.series, counts, undefined, sample.row, pack_mask(mask)))
        return cases

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
        shown = most_wrong_slice(predicted, true)
        return SegmentedCase(
            entry.patient,
            entry.series,
            _counts(predicted, true, number),
            tuple(distances),
            shown,
            pack_mask(predicted[shown]),
        )


def most_wrong_slice(predicted: UInt8[np.ndarray, "d h w"], true: UInt8[np.ndarray, "d h w"]) -> int:
    """The slice where the most voxels of known truth are answered wrongly; where none is, the one with the most marked.

    It shows what a low Dice or a large distance is due to, which the largest cut of a lesion mostly does not.
    """
    known = true != UNKNOWN
    wrong = (known & (predicted != true)).sum(axis=(1, 2))
    marked = (known & (true > 0)).sum(axis=(1, 2))
    return int((wrong if wrong.any() else marked).argmax())


def _counts(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((both, ours, theirs) for both, ours, theirs in overlap_counts(predicted, true, num_classes).tolist())
