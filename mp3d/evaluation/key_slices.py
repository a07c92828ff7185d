"""A detector's answers: for annotated key slices, each in its own clip, or for every slice of whole series."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import file_digest
from importlib.metadata import version
from itertools import chain, groupby
from operator import attrgetter
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Int16
from torch import Tensor, nn

from mp3d.checkpoint import Checkpoint, open_checkpoint
from mp3d.config import EvaluateConfig
from mp3d.data.batches import Batch, ClipDataset, SliceInfo, evaluation_batches, read_clip, slice_truth
from mp3d.data.clips import series_grid
from mp3d.data.samples import Sample, annotated_samples, spread
from mp3d.data.series import Volume
from mp3d.data.shard import ShardSet, decode_image, open_shards
from mp3d.device import autocast, pick_device, ready_for_inference
from mp3d.errors import ConfigError, DataError
from mp3d.evaluation.results import KeySliceResult
from mp3d.models import build_model
from mp3d.models.stream import check_streamable
from mp3d.predict import Finding, Predictor, SeriesMode, best_mode, trained_mode
from mp3d.sample import Clip, Prediction, Target

Variant = Literal["trained", "unstreamed", "streamed", "without training", "one slice nine times"]
"""unstreamed, streamed: key slices where they lie in whole series, read in the clips of the training or streamed."""
ABLATIONS: tuple[Variant, ...] = ("without training", "one slice nine times")
"""What a detector is compared with: the same network before training, and itself without context along z."""
DECIDING_FIELDS = {
    *("split", "slices", "streamed", "choose_on", "replicates", "seed", "max_clips", "threshold", "largest_component"),
    "accelerator",
}
"""Fields of the evaluation that may change its numbers; the others are places and speed."""
LEAST_SCORE = 0.01
"""Of boxes on all slices of a series, which would be ten thousands without it."""


def predict_clips(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[tuple[Prediction, Target, SliceInfo]]:
    """The model's answer for every key slice, on the CPU in float32, in the order of the batches.

    The model is put in evaluation mode and stays so.

    Args:
        model: follows ``mp3d.sample``; already on the device.
        dtype: what autocast computes in (``mp3d.device.resolve_precision``).
    """
    model.eval()
    for batch in batches:
        # Inference mode must not span the yield: it would leak into the caller's code between two answers.
        with torch.inference_mode(), autocast(device, dtype):
            predictions = model([Clip(clip.slices.to(device), clip.key_slices) for clip in batch.clips])
        for prediction, target, info in zip(predictions, batch.targets, batch.infos, strict=True):
            yield _on_cpu(prediction), target, info


def without_context(clip: Clip) -> Clip:
    """The same clip with every slice replaced by its key slice: what the model can do without seeing along z.

    Raises:
        ValueError: the clip has several key slices, so there is no one slice to repeat.
    """
    if len(clip.key_slices) != 1:
        raise ValueError(
            f"the clip has {len(clip.key_slices)} key slices; only a clip with one can be made flat along z"
        )
    (key_slice,) = clip.key_slices
    return Clip(clip.slices[key_slice].expand_as(clip.slices), clip.key_slices)


def detection_samples(config: EvaluateConfig, shards: ShardSet, split: str | None = None) -> list[Sample]:
    """The annotated key slices of the split, at most ``max_clips`` of them, evenly spread; with ``slices`` "all" its
    searched series, a sample each.

    Args:
        split: None: ``config.split``.

    Raises:
        DataError: the split is empty, no slice of it has a box, or none of its series was searched.
    """
    split = split or config.split
    samples, _ = annotated_samples(shards, split)
    if config.slices == "all":
        searched = [entry for entry in shards.split(split) if entry.rows_without_boxes()]
        if not searched:
            raise DataError(
                f"no series of split {split!r} of {shards.folder} was searched completely: of slices without a box "
                "nothing is known; judge the key slices"
            )
        samples = [Sample(entry, 0) for entry in searched]
    return spread(samples, config.max_clips)


class KeySlicePredictor:
    """A checkpoint, or a variant of it, that answers for key slices of a data set.

    Raises:
        CheckpointError, DataError: checkpoint or shards cannot be used.
        ConfigError: the checkpoint is no detector, or one that cannot be streamed.
    """

    def __init__(self, config: EvaluateConfig, variant: Variant = "trained") -> None:
        checkpoint = open_checkpoint(config.checkpoint or "")
        if checkpoint.config.model.head.kind != "detection":
            raise ConfigError(
                f"{checkpoint.path} has a {checkpoint.config.model.head.kind} head; jobs/evaluate.py judges detectors"
            )
        if variant == "streamed":
            check_streamable(checkpoint.config.model)
        self.variant, self.batch_size = variant, config.batch_size
        self.clip = checkpoint.config.clip
        self.shards = open_shards(config.shards or "")
        self.device = pick_device(config.accelerator)
        torch.manual_seed(checkpoint.config.loop.seed)
        self.model = build_model(checkpoint.config.model, self.clip)
        if variant != "without training":
            checkpoint.check_trained()
            self.model.load_state_dict(checkpoint.model_state())
        self.dtype = ready_for_inference(self.model, self.clip, checkpoint.config.loop.precision, self.device)

    def __call__(self, samples: list[Sample]) -> list[KeySliceResult]:
        if self.variant == "streamed":
            return self._of_whole_series(samples, "stream")
        if self.variant == "unstreamed" and (mode := trained_mode(self.clip)) != "window":  # which has one middle
            return self._of_whole_series(samples, mode)
        batches = evaluation_batches(ClipDataset(self.shards, samples, self.clip), batch_size=self.batch_size)
        if self.variant == "one slice nine times":
            batches = (replace(batch, clips=[without_context(clip) for clip in batch.clips]) for batch in batches)
        return [
            KeySliceResult.of(prediction, target, info)
            for prediction, target, info in predict_clips(self.model, batches, self.device, self.dtype)
        ]

    def _of_whole_series(self, samples: list[Sample], mode: SeriesMode) -> list[KeySliceResult]:
        predictor = Predictor(self.model.eval(), self.clip, 1.0, self.device, self.dtype, mode=mode)
        results = []
        for entry, of_series in groupby(samples, key=attrgetter("entry")):
            if entry.spacing_mm is None:
                raise DataError(f"{entry.series} is a picture; only the slices of a series can be judged in it")
            of_series = list(of_series)
            hu = np.stack([decode_image(row) for row in self.shards.iter_rows(entry)])
            answers = answers_for(predictor, hu, entry.spacing_mm[0], [sample.row for sample in of_series])
            for sample in of_series:
                _, (target,), info = read_clip(self.shards, sample, self.clip)
                results.append(KeySliceResult.of(_on_cpu(answers[sample.row]), target, info))
        return results


def answers_for(
    predictor: Predictor, hu: Int16[np.ndarray, "n h w"], slice_spacing_mm: float, slices: Sequence[int]
) -> dict[int, Prediction]:
    """What a predictor of whole series says of some slices: the answer of the grid position nearest to each, where it
    lies on the grid on which a series without labels is read. The series is gone through once.
    """
    grid = series_grid(len(hu), slice_spacing_mm, predictor.clip)
    wanted = {grid.index_of(number) for number in slices}
    answers = enumerate(chain.from_iterable(predictor.answers(hu, grid)))
    kept = {index: prediction for index, prediction in answers if index in wanted}
    return {number: kept[grid.index_of(number)] for number in slices}


class SeriesPredictor:
    """A checkpoint that answers for every slice of whole series: thin ones are read on several grids.

    Raises:
        CheckpointError, DataError: checkpoint or shards cannot be used.
    """

    variant: Variant = "trained"

    def __init__(self, config: EvaluateConfig) -> None:
        self.shards = open_shards(config.shards or "")
        self.predictor = Predictor.open(config.checkpoint or "", config.accelerator)

    def __call__(self, samples: list[Sample]) -> list[KeySliceResult]:
        return list(chain.from_iterable(self._series(sample) for sample in samples))

    def _series(self, sample: Sample) -> Iterator[KeySliceResult]:
        """Of the slices that were searched; on the others nobody knows what is true."""
        entry = sample.entry
        rows = list(self.shards.iter_rows(entry))
        affine = np.reshape(rows[0]["affine"], (4, 4))
        volume = Volume(np.stack([decode_image(row) for row in rows]), affine)
        grid_mm = self.predictor.clip.slice_spacing_mm or 0.0
        every_slice = replace(self.predictor, phases=max(1, math.ceil(grid_mm / volume.spacing_mm[0] - 1e-6)))
        on_slice: dict[int, list[Finding]] = defaultdict(list)
        for finding in every_slice.find_lesions(volume, LEAST_SCORE):
            on_slice[finding.slice_index].append(finding)
        for index, row in enumerate(rows):
            target, info = slice_truth(row, entry)
            if "boxes" in target:
                yield KeySliceResult.of(_as_prediction(on_slice[index]), target, info)


def _as_prediction(findings: Sequence[Finding]) -> Prediction:
    return Prediction(
        boxes=torch.tensor([finding.box_px for finding in findings]).reshape(-1, 4),
        scores=torch.tensor([finding.score for finding in findings]),
        labels=torch.tensor([finding.label for finding in findings], dtype=torch.int64),
    )


def provenance_of(checkpoint: Checkpoint, shards: ShardSet, config: EvaluateConfig) -> dict[str, str]:
    """Where numbers come from, without names of folders."""
    passport = shards.folder / "passport.json"
    known = {}
    if passport.exists():
        with passport.open("rb") as file:
            known["data passport"] = file_digest(file, "sha256").hexdigest()
    settings = checkpoint.config.model_dump(mode="json", exclude={"shards", "init_from", "launch", "tracking"})
    if config.slices == "all":
        known["series read"] = f"by {best_mode(checkpoint)}, boxes of a score from {LEAST_SCORE:g} on"
    judged = config.model_dump(mode="json", include=DECIDING_FIELDS)
    return {
        "checkpoint": checkpoint.digest,
        "run": f"{checkpoint.config.name}, epoch {checkpoint.epoch}",
        "model": f"{checkpoint.config.model.backbone} x{checkpoint.config.model.width:g}",
        "data set": f"{shards.dataset}, split {config.split}",
        "data manifest": shards.digest,
        **known,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **{package: version(package) for package in ("mp3d", "torch", "torchvision", "numpy")},
        "config": json.dumps(settings, sort_keys=True),
        "evaluation": json.dumps(judged, sort_keys=True),
    }


def _on_cpu(prediction: Prediction) -> Prediction:
    tensors = cast(dict[str, Tensor], prediction)
    answer = {name: (each.float() if each.is_floating_point() else each).cpu() for name, each in tensors.items()}
    return cast(Prediction, answer)
