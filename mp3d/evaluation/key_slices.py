"""A detector judged on key slices: clips to predictions, predictions to one file, predictions to metrics."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Int16, Int64
from torch import Tensor, nn

from mp3d.checkpoint import Checkpoint, open_checkpoint
from mp3d.config import EvaluateConfig
from mp3d.data.batches import Batch, ClipDataset, SliceInfo, evaluation_batches, read_clip
from mp3d.data.clips import series_grid, stored_slices
from mp3d.data.samples import Sample, annotated_samples
from mp3d.data.shard import ShardSet, decode_image, open_shards
from mp3d.device import autocast, pick_device, ready_for_inference
from mp3d.errors import ConfigError, DataError
from mp3d.metrics.average_precision import average_precision
from mp3d.metrics.froc import MP3D_PORT, FrocProtocol, FrocResult, froc
from mp3d.models import build_model
from mp3d.models.stream import check_streamable
from mp3d.predict import Predictor
from mp3d.sample import Clip, Prediction, Target

PREDICTIONS_FORMAT = b"mp3d key-slice predictions 1"
_BOXES = pa.list_(pa.list_(pa.float32(), 4))
_LABELS = pa.list_(pa.int64())
PREDICTIONS_SCHEMA = pa.schema(
    {
        "patient": pa.string(),
        "series": pa.string(),
        "z_index": pa.int32(),
        "spacing_mm": pa.list_(pa.float64(), 3),
        "true_boxes": _BOXES,
        "true_labels": _LABELS,
        "boxes": _BOXES,
        "scores": pa.list_(pa.float32()),
        "labels": _LABELS,
    }
)
"""One row per key slice: truth and answer, no pixels, ids as hashed in the shards."""

Variant = Literal["trained", "streamed", "without training", "one slice nine times"]
ABLATIONS: tuple[Variant, ...] = ("without training", "one slice nine times")
"""What a detector is compared with: the same network before training, and itself without context along z."""


@dataclass(frozen=True, eq=False)
class KeySliceResult:
    """What is true of one key slice and what the model said.

    Attributes:
        patient: hashed id, as in the shards; so is ``series``.
        z_index: slice number in the source series.
        spacing_mm: z, y, x.
        true_boxes: xyxy in pixels of the key slice, half-open; so are ``boxes``.
        image: the key slice in HU, or None where the pixels were not kept.
    """

    patient: str
    series: str
    z_index: int
    spacing_mm: tuple[float, float, float]
    true_boxes: Float32[np.ndarray, "t 4"]
    true_labels: Int64[np.ndarray, " t"]
    boxes: Float32[np.ndarray, "b 4"]
    scores: Float32[np.ndarray, " b"]
    labels: Int64[np.ndarray, " b"]
    image: Int16[np.ndarray, "h w"] | None = None

    @classmethod
    def of(cls, prediction: Prediction, target: Target, info: SliceInfo) -> Self:
        """From what :func:`predict_clips` yields.

        Raises:
            DataError: the slice is a picture, which has no spacing.
        """
        if info.spacing_mm is None:
            raise DataError(f"{info.series} is a picture; lesions are judged on CT slices")
        return cls(
            patient=info.patient,
            series=info.series,
            z_index=info.z_index,
            spacing_mm=info.spacing_mm,
            true_boxes=target["boxes"].float().numpy(),
            true_labels=target["labels"].long().numpy(),
            boxes=prediction["boxes"].float().numpy(),
            scores=prediction["scores"].float().numpy(),
            labels=prediction["labels"].long().numpy(),
        )

    def as_row(self) -> dict[str, Any]:
        """Plain values of ``PREDICTIONS_SCHEMA``."""
        return {name: _plain(getattr(self, name)) for name in PREDICTIONS_SCHEMA.names}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """What :meth:`as_row` made."""
        return cls(
            patient=row["patient"],
            series=row["series"],
            z_index=row["z_index"],
            spacing_mm=tuple(row["spacing_mm"]),
            true_boxes=np.array([*row["true_boxes"]], dtype=np.float32).reshape(-1, 4),
            true_labels=np.array(row["true_labels"], dtype=np.int64),
            boxes=np.array([*row["boxes"]], dtype=np.float32).reshape(-1, 4),
            scores=np.array(row["scores"], dtype=np.float32),
            labels=np.array(row["labels"], dtype=np.int64),
        )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model on one set of key slices.

    Attributes:
        name: what was evaluated, e.g. the run's name.
        provenance: where the numbers come from: digests of checkpoint and data, config, versions, date, command.
        comparisons: FROC of other models, or of the same one fed otherwise, on the same key slices.
    """

    name: str
    froc: FrocResult
    ap50: float
    results: Sequence[KeySliceResult]
    provenance: Mapping[str, str] = field(default_factory=dict)
    comparisons: Mapping[str, FrocResult] = field(default_factory=dict)

    @property
    def protocol(self) -> FrocProtocol:
        return self.froc.protocol

    @property
    def num_patients(self) -> int:
        return len({result.patient for result in self.results})


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


def key_slice_samples(config: EvaluateConfig, shards: ShardSet) -> list[Sample]:
    """The annotated key slices of the split, at most ``max_clips`` of them, evenly spread.

    Raises:
        DataError: the split is empty, or no slice of it has a box.
    """
    samples, _ = annotated_samples(shards, config.split)
    return samples[:: math.ceil(len(samples) / (config.max_clips or len(samples)))]


class KeySlicePredictor:
    """A checkpoint, or a variant of it, that answers for key slices of a data set.

    Raises:
        CheckpointError, DataError: checkpoint or shards cannot be used.
        ConfigError: the checkpoint is no detector, or one that cannot be streamed.
    """

    def __init__(self, config: EvaluateConfig, variant: Variant = "trained") -> None:
        checkpoint = open_checkpoint(config.checkpoint)
        if checkpoint.config.model.head.kind != "detection":
            raise ConfigError(
                f"{checkpoint.path} has a {checkpoint.config.model.head.kind} head; jobs/evaluate.py judges detectors"
            )
        if variant == "streamed":
            check_streamable(checkpoint.config.model)
        self.variant, self.batch_size = variant, config.batch_size
        self.clip = checkpoint.config.clip
        self.shards = open_shards(config.shards)
        self.device = pick_device(config.accelerator)
        torch.manual_seed(checkpoint.config.loop.seed)
        self.model = build_model(checkpoint.config.model, self.clip)
        if variant != "without training":
            checkpoint.check_trained()
            self.model.load_state_dict(checkpoint.model_state())
        self.dtype = ready_for_inference(self.model, self.clip, checkpoint.config.loop.precision, self.device)

    def __call__(self, samples: list[Sample]) -> list[KeySliceResult]:
        if self.variant == "streamed":
            return self._streamed(samples)
        batches = evaluation_batches(ClipDataset(self.shards, samples, self.clip), batch_size=self.batch_size)
        if self.variant == "one slice nine times":
            batches = (replace(batch, clips=[without_context(clip) for clip in batch.clips]) for batch in batches)
        return [
            KeySliceResult.of(prediction, target, info)
            for prediction, target, info in predict_clips(self.model, batches, self.device, self.dtype)
        ]

    def _streamed(self, samples: list[Sample]) -> list[KeySliceResult]:
        predictor = Predictor(self.model.eval(), self.clip, 1.0, self.device, self.dtype, mode="stream")
        results = []
        for entry, of_series in groupby(samples, key=attrgetter("entry")):
            if entry.spacing_mm is None:
                raise DataError(f"{entry.series} is a picture; only the slices of a series can be streamed")
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
    """What a predictor of whole series says of some slices, each of which is on the grid when it is asked about: the
    series is gone through once for all that lie on one grid.
    """
    answers = {}
    for wanted in slices:
        if wanted in answers:
            continue
        grid = series_grid(len(hu), slice_spacing_mm, predictor.clip, through=wanted)
        on_grid = stored_slices(grid.positions)
        for index, prediction in enumerate(chain.from_iterable(predictor.answers(hu, grid))):
            if on_grid.get(index) in slices:
                answers[on_grid[index]] = prediction
    return answers


def with_pictures(
    results: Sequence[KeySliceResult], samples: Sequence[Sample], shards: ShardSet, limit: int = 500
) -> list[KeySliceResult]:
    """The results with their key slice in HU, for at most ``limit`` of them, evenly spread: what a report can draw."""
    stride = math.ceil(len(results) / limit)
    pictured = list(results)
    for index in range(0, len(results), stride):
        sample = samples[index]
        row = shards.read_rows(sample.entry, sample.row, sample.row + 1)[0]
        pictured[index] = replace(results[index], image=decode_image(row))
    return pictured


def provenance_of(checkpoint: Checkpoint, shards: ShardSet, config: EvaluateConfig) -> dict[str, str]:
    """Where numbers come from, without names of folders."""
    return {
        "checkpoint": checkpoint.digest,
        "run": f"{checkpoint.config.name}, epoch {checkpoint.epoch}",
        "model": f"{checkpoint.config.model.backbone} x{checkpoint.config.model.width:g}",
        "data set": f"{shards.dataset}, split {config.split}",
        "data manifest": shards.digest,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **{package: version(package) for package in ("mp3d", "torch", "torchvision")},
    }


def froc_of(results: Sequence[KeySliceResult], protocol: FrocProtocol = MP3D_PORT) -> FrocResult:
    """All labels taken as one class, *lesion*.

    Raises:
        DataError: no result, or none with a true box.
    """
    return froc([(each.boxes, each.scores) for each in results], [each.true_boxes for each in results], protocol)


def evaluate_detector(
    results: Sequence[KeySliceResult],
    protocol: FrocProtocol = MP3D_PORT,
    name: str = "detector",
    provenance: Mapping[str, str] | None = None,
    comparisons: Mapping[str, Sequence[KeySliceResult]] | None = None,
) -> Evaluation:
    """FROC and AP50 of the results, and the FROC of others to compare with.

    Args:
        comparisons: the results of other models on the same key slices, by name.

    Raises:
        DataError: no result, none with a true box, or a comparison on other key slices or another truth.
    """
    comparisons = comparisons or {}
    for other_name, other in comparisons.items():
        _check_same_truth(name, results, other_name, other)
    return Evaluation(
        name=name,
        froc=froc_of(results, protocol),
        ap50=average_precision([(each.boxes, each.scores) for each in results], [each.true_boxes for each in results]),
        results=results,
        provenance=provenance or {},
        comparisons={other_name: froc_of(other, protocol) for other_name, other in comparisons.items()},
    )


def write_predictions(
    path: Path, results: Sequence[KeySliceResult], provenance: Mapping[str, str] | None = None
) -> None:
    """One Parquet file from which every metric can be computed again; pixels are left out."""
    rows = [result.as_row() for result in results]
    metadata = {b"format": PREDICTIONS_FORMAT, b"provenance": json.dumps(dict(provenance or {})).encode()}
    table = pa.Table.from_pylist(rows, PREDICTIONS_SCHEMA.with_metadata(metadata))
    pq.write_table(table, path, compression="zstd")


def read_predictions(path: Path) -> tuple[list[KeySliceResult], dict[str, str]]:
    """The results, without pixels, and the provenance that :func:`write_predictions` stored.

    Raises:
        DataError: the file is missing, no Parquet file, or not one of ours.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read predictions from {path}: {error}") from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"format") != PREDICTIONS_FORMAT:
        raise DataError(f"{path} holds no key-slice predictions of this format; write it again with jobs/evaluate.py")
    results = [KeySliceResult.from_row(row) for row in table.to_pylist()]
    return results, json.loads(metadata[b"provenance"])


def _on_cpu(prediction: Prediction) -> Prediction:
    tensors = cast(dict[str, Tensor], prediction)
    answer = {name: (each.float() if each.is_floating_point() else each).cpu() for name, each in tensors.items()}
    return cast(Prediction, answer)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _check_same_truth(
    name: str, results: Sequence[KeySliceResult], other_name: str, other: Sequence[KeySliceResult]
) -> None:
    def truth(each: KeySliceResult) -> tuple:
        return each.series, each.z_index, each.true_boxes.tobytes()

    if [truth(each) for each in results] != [truth(each) for each in other]:
        raise DataError(
            f"{other_name!r} was not evaluated on the key slices of {name!r}, in the same order and with the same "
            "true boxes; only then may they stand side by side"
        )
