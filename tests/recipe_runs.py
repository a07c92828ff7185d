"""What every recipe must do on data of its format: read its first batch, train two steps, go on for two."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mp3d.config import DetectionHead, LaunchConfig, TrackingConfig, TrainConfig
from mp3d.data.batches import Batch, ClipDataset, training_loader
from mp3d.data.prepare import prepare
from mp3d.data.shard import open_shards
from mp3d.data.source import Source
from mp3d.data.stream import Stream
from mp3d.fitting import fit_to_data
from mp3d.recipes import FINETUNE, PRETRAIN, Recipe
from mp3d.session import PlainSession, read_metrics
from mp3d.train import check_inputs, train, training_samples
from tests.tiny import ID_KEY

LARGE = [recipe for recipe in PRETRAIN + FINETUNE if not recipe.__name__.startswith(("synthetic_", "small_"))]


class Killed(Exception):
    """Stands for the end of a process."""


class MortalSession(PlainSession):
    """Dies at the end of its first epoch."""

    def report(self, epoch, score, metrics, save):
        super().report(epoch, score, metrics, save)
        raise Killed


def split_shards(source: Source, out: Path, split_of: Callable[[int], str]) -> Path:
    """Shards of a source whose items are dealt to splits by their number."""
    items = tuple(replace(item, split=split_of(number)) for number, item in enumerate(source.items))
    prepare(replace(source, items=items), out, id_key=ID_KEY, runner="local")
    return out


def first_batch(config: TrainConfig) -> Batch:
    """As the run of the recipe would read it, at its full size."""
    shards = open_shards(config.shards)
    positives, spare = training_samples(config, shards)
    stream = Stream(positives, spare, negatives=config.loop.negatives, seed=0)
    every_slice = config.model.head.kind == "segmentation"
    dataset = ClipDataset(shards, stream.samples, config.clip, config.augment, every_slice=every_slice)
    loader = training_loader(
        dataset, stream, batch_size=config.loop.batch_size, steps=range(1), rank=0, world_size=1, workers=0
    )
    return next(iter(loader))


def check_first_batch(recipe: Recipe, shards: Path) -> None:
    config = recipe().override({"shards": str(shards), "loop.batch_size": min(4, recipe().loop.batch_size)})
    batch = first_batch(config)
    clip, kind = config.clip, config.model.head.kind
    assert len(batch.clips) == config.loop.batch_size
    assert len(batch.targets) == sum(len(part.key_slices) for part in batch.clips)
    for part in batch.clips:
        assert part.slices.shape[0] == (clip.num_slices if clip.block else clip.depth)
        assert part.slices.dtype == (torch.uint8 if clip.slice_spacing_mm is None else torch.int16)
        if clip.block or clip.square_pictures:
            assert part.slices.shape[1:] == (clip.image_size, clip.image_size)
    wanted = {"detection": {"boxes", "labels"}, "classification": {"label"}, "segmentation": {"mask"}}[kind]
    assert all(wanted <= set(target) for target in batch.targets)
    if kind == "detection":
        assert any(len(target["boxes"]) for target in batch.targets)


def quick(recipe: Recipe, shards: Path, storage: Path) -> TrainConfig:
    """Batch, crop and width overridden; optimiser, schedule, norm, losses, augmentation are the recipe's."""
    config = recipe()
    changes = {
        "shards": str(shards), "model.width": 0.125, "clip.image_size": 48, "loop.batch_size": 2, "loop.epochs": 2,
        "loop.steps_per_epoch": 2, "loop.num_workers": 1, "loop.max_validation_clips": 6,
        "augment.image_sizes": (32, 48) if config.augment.image_sizes else (),
        "launch": LaunchConfig(runner="local", storage_path=str(storage)), "tracking": TrackingConfig(mode="disabled"),
    }  # fmt: skip
    if config.clip.block:
        changes |= {"clip.num_slices": 16, "clip.image_size": 16, "augment.shift_px": (1, 2)}
    if isinstance(config.model.head, DetectionHead):
        small = {"fpn_channels": 16, "box_features": 16, "rpn_pre_nms": (60, 60), "rpn_post_nms": (20, 20)}
        changes |= {f"model.head.{name}": value for name, value in small.items()}
    return config.override(changes)


def check_two_steps_and_two_more(recipe: Recipe, shards: Path, storage: Path) -> None:
    config = quick(recipe, shards, storage)
    check_inputs(config)
    config = fit_to_data(config, say=lambda line: None)
    run = storage / config.name
    run.mkdir()
    for session in (MortalSession, PlainSession):
        try:
            train(config, session(run, keep=2, device=torch.device("cpu")))
        except Killed:
            assert [line["epoch"] for line in read_metrics(run)] == [1]
    lines = read_metrics(run)
    assert [line["epoch"] for line in lines] == [1, 2]
    losses = [value for line in lines for name, value in line.items() if name.startswith("loss")]
    assert losses
    assert torch.isfinite(torch.tensor(losses)).all()
