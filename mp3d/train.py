"""The training loop. It knows no Ray and asks no model what its task is: the losses are summed, the metric picks the
best checkpoint.

    config ─► model, optimiser ─► (resume) ─► for each epoch: steps ─► validation ─► session.report

Everything random is a function of the seed and of the place in the run, so that a run that was killed and resumed at
the end of an epoch goes on exactly as one that was not.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mp3d.checkpoint import Checkpoint, open_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from mp3d.config import TrainConfig
from mp3d.data.batches import Batch, ClipDataset, Stream, evaluation_batches, training_loader
from mp3d.data.samples import Sample, annotated_samples, classified_samples, masked_samples, tile_samples
from mp3d.data.shard import ShardSet, cached, open_shards
from mp3d.device import autocast, resolve_precision
from mp3d.errors import ConfigError, Mp3dError
from mp3d.evaluation import predict_clips
from mp3d.metrics import build_metric
from mp3d.models import build_model
from mp3d.models.transfer import initialise_backbone
from mp3d.progress import Progress
from mp3d.sample import Clip, Target
from mp3d.schedule import build_optimizer, learning_rate, steps_in_epoch
from mp3d.session import Session
from mp3d.snapshots import take_snapshots
from mp3d.tracking import track


class TrainingDiverged(Mp3dError):
    """A loss was not finite."""


@dataclass
class Run:
    """The parts of a training run that change as it goes on."""

    config: TrainConfig
    session: Session
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None
    """What autocast computes in."""
    steps_per_epoch: int

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapper that averages gradients."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model


def train(config: TrainConfig, session: Session) -> dict[str, float]:
    """Train to the last epoch, from the newest checkpoint of the session if there is one.

    Returns:
        The metrics of the last epoch.

    Raises:
        ConfigError: anchors that are still to be fitted.
        DataError: the shards cannot be used.
        CheckpointError: ``init_from`` or every checkpoint of the run is damaged, or nothing of ``init_from`` fits.
        TrainingDiverged: a loss was not finite; the message names the batch.
    """
    head = config.model.head
    if head.kind == "detection" and head.anchors == "fit":
        raise ConfigError(
            "model.head.anchors is 'fit'; have mp3d.fitting.fit_to_data put the fitted numbers there first"
        )
    shards = cached(open_shards(config.shards), config.launch.cache_dir, config.launch.cache_gb)
    positives, spare = training_samples(config, shards)
    stream = Stream(positives, spare, negatives=config.loop.negatives, seed=config.loop.seed)
    masks = config.model.head.kind == "segmentation"
    dataset = ClipDataset(shards, stream.samples, config.clip, config.augment, config.loop.seed, every_slice=masks)
    validation = ClipDataset(shards, validation_samples(config, shards), config.clip, every_slice=masks)

    run = start(config, session, steps_in_epoch(config.loop, len(stream), session.world_size))
    checkpoint = session.resume()
    if checkpoint:
        restore(run, checkpoint)
        _say(session, f"resumed after epoch {checkpoint.epoch} from {checkpoint.path}")
    elif config.init_from:
        report = initialise_backbone(run.bare_model, open_checkpoint(config.init_from).model_state())
        _say(session, report.summary())
        if session.rank == 0:
            (session.run_dir / "transfer.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n")

    metrics = checkpoint.metrics if checkpoint else {}
    with track(config, session.run_dir, session.rank) as tracker:
        for epoch in range((checkpoint.epoch if checkpoint else 0) + 1, config.loop.epochs + 1):
            steps = range((epoch - 1) * run.steps_per_epoch, epoch * run.steps_per_epoch)
            progress = Progress(session, config.loop, epoch, run.steps_per_epoch)
            metrics = train_epoch(run, epoch, steps, training_batches(run, dataset, stream, steps), progress)
            found, score_name = validate(run, validation)
            metrics |= found
            tracker(metrics, step=steps.stop)
            if tracker.pictures:
                taken = take_snapshots(run.bare_model, validation, tracker.pictures, session.device, run.dtype)
                tracker.show(taken, step=steps.stop)
            progress.end(metrics)
            session.report(epoch, metrics[score_name], metrics, partial(save, run, epoch, metrics, score_name))
    return metrics


def training_batches(run: Run, dataset: ClipDataset, stream: Stream, steps: range) -> Iterable[Batch]:
    """The batches of this rank; the same whoever reads them."""
    loop, session = run.config.loop, run.session
    share = {"batch_size": loop.batch_size, "steps": steps, "rank": session.rank, "world_size": session.world_size}
    if run.config.launch.ingest == "ray_data":
        from mp3d.data.ray_batches import ray_batches

        return ray_batches(dataset, stream, **share)
    return training_loader(dataset, stream, **share, workers=run.config.launch.loader_workers)


def check_inputs(config: TrainConfig) -> ShardSet:
    """Find out within seconds, before anything is started, whether the run can read what it needs; returns the shards.

    Raises:
        DataError: the shards, their splits or their truth are not what the head learns from.
        CheckpointError: ``init_from`` cannot be opened.
        ConfigError: fewer classes than the shards have.
    """
    shards = open_shards(config.shards)
    training_samples(config, shards)
    validation_samples(config, shards)
    head = config.model.head
    if head.num_classes < len(shards.class_names):
        raise ConfigError(
            f"{config.shards} has {len(shards.class_names)} classes, model.head.num_classes is {head.num_classes}"
        )
    if config.init_from:
        open_checkpoint(config.init_from)
    return shards


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
    return samples[:: math.ceil(len(samples) / (config.loop.max_validation_clips or len(samples)))]


def start(config: TrainConfig, session: Session, steps_per_epoch: int) -> Run:
    """Model and optimiser of a new run, the same on every rank."""
    torch.manual_seed(config.loop.seed)
    model = build_model(config.model, config.clip).to(session.device)
    dtype = resolve_precision(config.loop.precision, session.device)
    scaler = torch.amp.GradScaler(session.device.type, enabled=dtype == torch.float16)
    optimizer = build_optimizer(model.parameters(), config.optim)
    return Run(config, session, model, optimizer, scaler, dtype, steps_per_epoch)


def train_epoch(run: Run, epoch: int, steps: range, batches: Iterable[Batch], progress: Progress) -> dict[str, float]:
    """One epoch of steps; returns the mean of every loss and the last learning rate."""
    loop, optim = run.config.loop, run.config.optim
    # the generators that models and losses draw from depend on nothing but the place in the run
    torch.manual_seed(int(np.random.SeedSequence([loop.seed, epoch, run.session.rank]).generate_state(1)[0]))
    run.model = run.bare_model
    if run.session.world_size > 1:
        # A wrapper sorts its buckets anew after its first step, and gradients are summed in the order of the buckets:
        # one for each epoch, so that a resumed run sums as one that was not killed does.
        run.model = DistributedDataParallel(run.model)
    run.model.train()
    sums: dict[str, Tensor] = {}
    rate = 0.0
    share = run.session.world_size / loop.num_workers  # below 1 where an elastic run has lost workers
    for step, batch in zip(steps, batches, strict=True):
        rate = share * learning_rate(step, optim, steps_per_epoch=run.steps_per_epoch, epochs=loop.epochs)
        losses = train_step(run, batch, step, rate)
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
        progress.step(losses, rate)
    return {name: (value / len(steps)).item() for name, value in sums.items()} | {"lr": rate}


def train_step(run: Run, batch: Batch, step: int, rate: float) -> dict[str, Tensor]:
    """Forward, backward, update. Plain torch: works without a session's host as long as there is one process."""
    device, optim = run.session.device, run.config.optim
    clips = [Clip(clip.slices.to(device, non_blocking=True), clip.key_slices) for clip in batch.clips]
    targets = [_moved(target, device) for target in batch.targets]
    with autocast(device, run.dtype):
        losses = run.model(clips, targets, image_size=_image_size(run.config, step))
    loss = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(loss):
        where = ", ".join(f"{info.series}/{info.z_index}" for info in batch.infos)
        raise TrainingDiverged(
            f"step {step}: the loss is {loss.item()} on series/slice {where}; "
            "lower optim.lr, lengthen optim.warmup_steps, or try loop.precision fp32"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    if optim.clip_grad_norm is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), optim.clip_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return {name: value.detach() for name, value in losses.items()}


def validate(run: Run, dataset: ClipDataset) -> tuple[dict[str, float], str]:
    """Metrics of the validation samples, the same on every rank, and the name of the one that picks the best
    checkpoint.
    """
    session, loop = run.session, run.config.loop
    batches = evaluation_batches(
        dataset, batch_size=loop.batch_size, rank=session.rank, world_size=session.world_size,
        workers=run.config.launch.loader_workers,
    )  # fmt: skip
    metric = build_metric(run.config.model.head)
    for prediction, target, _ in predict_clips(run.bare_model, batches, session.device, run.dtype):
        metric.update([prediction], [target])
    if session.world_size > 1:
        gathered: list[Any] = [None] * session.world_size
        dist.all_gather_object(gathered, metric.records)
        metric.records = [record for per_rank in gathered for record in per_rank]
    return metric.compute(), metric.score_name


def save(run: Run, epoch: int, metrics: dict[str, float], score_name: str, directory: Path) -> None:
    """Write the checkpoint of an epoch."""
    trainer = pack_optimizer(run.optimizer)
    trainer.values["scaler"] = run.scaler.state_dict()
    save_checkpoint(
        directory, config=run.config, model_state=run.bare_model.state_dict(), epoch=epoch, score=metrics[score_name],
        metrics=metrics, trainer=trainer,
    )  # fmt: skip


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a run back to the end of the checkpoint's epoch."""
    run.bare_model.load_state_dict(checkpoint.model_state())
    trainer = checkpoint.trainer_state()
    unpack_optimizer(run.optimizer, trainer)
    run.scaler.load_state_dict(trainer.values["scaler"])


def _moved(target: Target, device: torch.device) -> Target:
    tensors = cast(dict[str, Tensor], target)
    return cast(Target, {name: tensor.to(device) for name, tensor in tensors.items()})


def _image_size(config: TrainConfig, step: int) -> int:
    """Multi-scale training: one size for the whole global batch, drawn from the seed and the step."""
    sizes = config.augment.image_sizes or (config.clip.image_size,)
    return int(np.random.default_rng([config.loop.seed, step]).choice(sizes))


def _say(session: Session, text: str) -> None:
    if session.rank == 0:
        print(text, flush=True)
