"""The training loop. It knows no Ray and asks no model what its task is: the losses are summed, the metric picks the
best checkpoint.

    config ─► model, optimiser ─► (resume) ─► for each epoch: steps ─► validation ─► session.report

Everything random is a function of the seed and of the place in the run, so that a run that was killed and resumed at
the end of an epoch goes on exactly as one that was not.
"""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mp3d.checkpoint import Checkpoint, open_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from mp3d.config import TrainConfig
from mp3d.data.batches import Batch, ClipDataset, batched, evaluation_batches, training_loader
from mp3d.data.samples import Sample, annotated_samples, classified_samples, masked_samples, spread, tile_samples
from mp3d.data.shard import ShardSet, cached, open_shards
from mp3d.data.stream import Stream
from mp3d.data.survey import read_image_labels
from mp3d.device import checked_precision, compile_layers, put_on_device, resolve_precision
from mp3d.early_stop import BestSoFar
from mp3d.ema import build_average
from mp3d.errors import ConfigError, DataError
from mp3d.evaluation import predict_clips
from mp3d.failures import explained
from mp3d.metrics import build_metric
from mp3d.models import build_model
from mp3d.models.segmenter import synchronise_dice
from mp3d.models.sync_batch_norm import synchronise_batch_norm
from mp3d.models.transfer import check_source, initialise_backbone
from mp3d.progress import Progress
from mp3d.schedule import build_optimizer, learning_rate, scaled_to_batch, steps_in_epoch
from mp3d.session import Session
from mp3d.snapshots import take_snapshots
from mp3d.step import Run, train_step, wrap_model
from mp3d.tracking import track

RAW = "model."
"""Prefix, among a checkpoint's trainer tensors, of the weights that are trained, where their average is the model."""


def train(config: TrainConfig, session: Session) -> dict[str, float]:
    """Train to the last epoch, from the newest checkpoint of the session if there is one.

    Returns:
        The metrics of the last epoch.

    Raises:
        ConfigError: anchors that are still to be fitted.
        DataError: the shards cannot be used.
        CheckpointError: ``init_from`` or every checkpoint of the run is damaged, or nothing of ``init_from`` fits.
        TrainingDiverged: a loss was not finite; the message names the batch.
        ResourceError: memory or disk is full.
        TrainingStopped: a process that reads clips was lost.
    """
    with explained(session.run_dir):
        return _train(config, session)


def _train(config: TrainConfig, session: Session) -> dict[str, float]:
    head = config.model.head
    if head.kind == "detection" and head.anchors == "fit":
        raise ConfigError(
            "model.head.anchors is 'fit'; have mp3d.fitting.fit_to_data put the fitted numbers there first"
        )
    shards = cached(open_shards(config.shards), config.launch.cache_dir, config.launch.cache_gb)
    positives, spare = training_samples(config, shards)
    stream = Stream(
        positives, spare, negatives=config.loop.negatives, seed=config.loop.seed, kind=balanced_by(config, shards)
    )
    masks = config.model.head.kind == "segmentation"
    dataset = ClipDataset(shards, stream.samples, config.clip, config.augment, config.loop.seed, every_slice=masks)
    validation = ClipDataset(shards, validation_samples(config, shards), config.clip, every_slice=masks)

    run = start(config, session, steps_in_epoch(config.loop, len(stream), session.world_size))
    # of all workers, be some lost: W&B drops what comes at an earlier step than it has seen
    full_epoch = steps_in_epoch(config.loop, len(stream), config.loop.num_workers)
    best = BestSoFar()
    checkpoint = session.resume()
    if checkpoint:
        best = restore(run, checkpoint)
        _say(session, f"resumed after epoch {checkpoint.epoch} from {checkpoint.path}")
    elif config.init_from:
        source = open_checkpoint(config.init_from)
        warnings = check_source(source.config.model, config.model)
        report = replace(initialise_backbone(run.bare_model, source.model_state()), warnings=warnings)
        _say(session, report.summary())
        if session.rank == 0:
            (session.run_dir / "transfer.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n")

    metrics = checkpoint.metrics if checkpoint else {}
    with track(config, session.run_dir, session.rank) as tracker:
        done = checkpoint.epoch if checkpoint else 0
        for epoch in range(done + 1, config.loop.epochs + 1):
            if best.is_stale(epoch - 1, config.loop.patience):
                _say(session, f"stopped after epoch {epoch - 1}: nothing better since epoch {best.epoch}")
                break
            steps = range((epoch - 1) * run.steps_per_epoch, epoch * run.steps_per_epoch)
            progress = Progress(session, config.loop, epoch, run.steps_per_epoch)
            metrics = train_epoch(run, epoch, steps, training_batches(run, dataset, stream, steps), progress)
            found, score_name = validate(run, validation)
            metrics |= found
            tracker(metrics, step=epoch * full_epoch)
            if tracker.pictures:
                taken = take_snapshots(run.judged_model, validation, tracker.pictures, session.device, run.dtype)
                tracker.show(taken, step=epoch * full_epoch)
            progress.end(metrics)
            best.update(epoch, metrics[score_name])
            session.report(epoch, metrics[score_name], metrics, partial(save, run, epoch, metrics, score_name, best))
    return metrics


def training_batches(run: Run, dataset: ClipDataset, stream: Stream, steps: range) -> Iterable[Batch]:
    """The batches of this rank, ``loop.accumulate`` for each step; the same whoever reads them."""
    loop, session = run.config.loop, run.session
    parts = range(steps.start * loop.accumulate, steps.stop * loop.accumulate)
    share = {"batch_size": loop.batch_size, "steps": parts, "rank": session.rank, "world_size": session.world_size}
    if run.config.launch.ingest == "ray_data":
        from mp3d.data.ray_batches import ray_batches

        return ray_batches(dataset, stream, **share)
    return training_loader(dataset, stream, **share, workers=run.config.launch.loader_workers)


def check_inputs(config: TrainConfig) -> ShardSet:
    """Find out within seconds, before anything is started, whether the run can read what it needs; returns the shards.

    Raises:
        DataError: the shards, their splits or their truth are not what the head learns from.
        ConfigError: fewer classes than the shards have.
    """
    shards = open_shards(config.shards)
    _check_kind(shards, config)
    training, _ = training_samples(config, shards)
    validation = validation_samples(config, shards)
    head = config.model.head
    if head.num_classes < len(shards.class_names):
        raise ConfigError(
            f"{config.shards} has {len(shards.class_names)} classes, model.head.num_classes is {head.num_classes}"
        )
    if head.kind == "classification":
        _check_classes(shards, "train", training, head.num_classes)
        there = _check_classes(shards, "val", validation, head.num_classes)
        if head.num_classes == 2 and len(there) < 2:
            raise DataError(
                f"the validation samples of {config.shards} are all of class {sorted(there)}, and the area "
                "under the curve needs both; prepare with another split, or raise loop.max_validation_clips"
            )
    return shards


def _check_kind(shards: ShardSet, config: TrainConfig) -> None:
    """Colour pictures and CT are read, windowed and normalised each in its own way."""
    for_pictures = config.clip.slice_spacing_mm is None and config.clip.block is None
    if any((entry.spacing_mm is None) != for_pictures for entry in shards.entries):
        kinds = ("colour pictures", "CT series")
        there, read = kinds if not for_pictures else kinds[::-1]
        raise DataError(
            f"{shards.folder} holds {there}, and the configuration reads {read} (clip.slice_spacing_mm is "
            f"{config.clip.slice_spacing_mm}); take a recipe for {there}, or other --shards"
        )


def _check_classes(shards: ShardSet, split: str, samples: list[Sample], num_classes: int) -> set[int]:
    """The classes of samples; each has one."""
    labels = read_image_labels(shards, split)
    found = Counter(labels[sample.entry.series][sample.row] for sample in samples)
    if missing := found.pop(None, 0):
        raise DataError(
            f"{missing} of {len(samples)} {split} samples of {shards.folder} have no class for a classifier to learn; "
            "prepare data with one for each (README, data sets), or take a recipe for detection or segmentation"
        )
    there = {label for label in found if label is not None}
    if strange := sorted(there - set(range(num_classes))):
        raise ConfigError(f"{shards.folder} has samples of class {strange}; model.head.num_classes is {num_classes}")
    return there


def training_samples(config: TrainConfig, shards: ShardSet) -> tuple[list[Sample], list[Sample]]:
    """What the head learns from, and what it draws from beside that: key slices or pictures with boxes, pictures or
    series with a class, blocks or pictures with masks.
    """
    match config.model.head.kind:
        case "detection":
            return annotated_samples(shards, "train", config.loop.negatives)
        case "classification":
            return classified_samples(shards, "train"), []
        case "segmentation":
            return masked_samples(shards, "train", config.clip, config.loop.negatives)


def balanced_by(config: TrainConfig, shards: ShardSet) -> Callable[[Sample], Hashable] | None:
    """What training samples are balanced by."""
    match config.loop.balance:
        case "none":
            return None
        case "patients":
            return lambda sample: sample.entry.patient
        case "classes":
            labels = read_image_labels(shards, "train")
            return lambda sample: labels[sample.entry.series][sample.row]


def validation_samples(config: TrainConfig, shards: ShardSet) -> list[Sample]:
    """At most ``max_validation_clips`` samples, evenly spread over the validation split."""
    match config.model.head.kind:
        case "detection":
            samples, _ = annotated_samples(shards, "val")
        case "classification":
            samples = classified_samples(shards, "val")
        case "segmentation" if config.clip.block == "anywhere":
            samples = tile_samples(shards, "val", config.clip)
        case "segmentation":
            samples, _ = masked_samples(shards, "val", config.clip)
    return spread(samples, config.loop.max_validation_clips)


def start(config: TrainConfig, session: Session, steps_per_epoch: int) -> Run:
    """Model and optimiser of a new run, the same on every rank."""
    torch.manual_seed(config.loop.seed)
    model = build_model(config.model, config.clip)
    put_on_device(model, session.device)
    if session.world_size > 1:
        synchronise_dice(model)
        if config.loop.sync_batch_norm:
            synchronise_batch_norm(model)
    dtype = checked_precision(model, config.clip, resolve_precision(config.loop.precision, session.device))
    if config.loop.compile:
        compile_layers(model)
    scaler = torch.amp.GradScaler(session.device.type, enabled=dtype == torch.float16)
    optimizer = build_optimizer(model.parameters(), config.optim)
    average = build_average(model, config.loop.ema_decay) if config.loop.ema_decay else None
    return Run(config, session, model, optimizer, scaler, dtype, steps_per_epoch, average)


def train_epoch(run: Run, epoch: int, steps: range, batches: Iterable[Batch], progress: Progress) -> dict[str, float]:
    """One epoch of steps; returns the mean of every loss over all workers and the last learning rate.

    Args:
        batches: ``loop.accumulate`` of them for each step.
    """
    loop, session = run.config.loop, run.session
    # the generators that models and losses draw from depend on nothing but the place in the run
    torch.manual_seed(int(np.random.SeedSequence([loop.seed, epoch, session.rank]).generate_state(1)[0]))
    wrap_model(run)
    run.model.train()
    clips_per_step = loop.step_clips * session.world_size
    optim = scaled_to_batch(run.config.optim, clips_per_step)
    sums: dict[str, Tensor] = {}
    counted, rate = 0, 0.0
    # below 1 where an elastic run has lost workers; lr_batch minds that by itself
    share = session.world_size / loop.num_workers if optim.lr_batch is None else 1.0
    for step, parts in zip(steps, batched(batches, loop.accumulate), strict=True):
        rate = share * learning_rate(step, optim, steps_per_epoch=run.steps_per_epoch, epochs=loop.epochs)
        losses = train_step(run, parts, step, rate)
        if losses is None:
            continue
        counted += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
        progress.step(losses, rate)
    means = {name: value / max(1, counted) for name, value in sums.items()}
    if session.world_size > 1 and means:
        stacked = torch.stack(list(means.values())) / session.world_size
        dist.all_reduce(stacked)
        means = dict(zip(means, stacked, strict=True))
    return {name: value.item() for name, value in means.items()} | {"lr": rate}


def validate(run: Run, dataset: ClipDataset) -> tuple[dict[str, float], str]:
    """Metrics of the validation samples, the same on every rank, and the name of the one that picks the best
    checkpoint.
    """
    session, loop = run.session, run.config.loop
    batches = evaluation_batches(
        dataset, batch_size=loop.batch_size, rank=session.rank, world_size=session.world_size,
        workers=run.config.launch.loader_workers,
    )  # fmt: skip
    if session.world_size > 1:
        averaged = [] if run.average is None else [*run.average.module.buffers()]
        for buffer in [*run.bare_model.buffers(), *averaged]:  # batch norm's: after a step each worker has its own
            dist.broadcast(buffer, src=0)
    metric = build_metric(run.config.model.head)
    for prediction, target, _ in predict_clips(run.judged_model, batches, session.device, run.dtype):
        metric.update([prediction], [target])
    if session.world_size > 1:
        gathered: list[Any] = [None] * session.world_size
        dist.all_gather_object(gathered, metric.records)
        metric.records = [record for per_rank in gathered for record in per_rank]
    return metric.compute(), metric.score_name


def save(run: Run, epoch: int, metrics: dict[str, float], score_name: str, best: BestSoFar, directory: Path) -> None:
    """Write the checkpoint of an epoch: the weights that are judged, and what training goes on from."""
    trainer = pack_optimizer(run.optimizer)
    if run.average is not None:
        trainer.tensors.update({f"{RAW}{name}": value for name, value in run.bare_model.state_dict().items()})
        trainer.values["averaged"] = int(run.average.n_averaged)
    trainer.values.update(scaler=run.scaler.state_dict(), skipped=run.skipped, best=asdict(best))
    save_checkpoint(
        directory, config=run.config, model_state=run.judged_model.state_dict(), epoch=epoch, score=metrics[score_name],
        metrics=metrics, trainer=trainer,
    )  # fmt: skip


def restore(run: Run, checkpoint: Checkpoint) -> BestSoFar:
    """Put a run back to the end of the checkpoint's epoch."""
    run.judged_model.load_state_dict(checkpoint.model_state())
    trainer = checkpoint.trainer_state()
    if run.average is not None:
        raw = {name.removeprefix(RAW): value for name, value in trainer.tensors.items() if name.startswith(RAW)}
        run.bare_model.load_state_dict(raw)
        run.average.n_averaged.fill_(trainer.values["averaged"])
    unpack_optimizer(run.optimizer, trainer)
    run.scaler.load_state_dict(trainer.values["scaler"])
    run.skipped = trainer.values["skipped"]
    return BestSoFar(**trainer.values["best"])


def _say(session: Session, text: str) -> None:
    if session.rank == 0:
        print(text, flush=True)
