"""Ray Data gives the batches of the plain loader, bit for bit, and no clip more or less."""

from pathlib import Path

import pytest
import torch

from mp3d.config import ClassificationHead, SegmentationHead, TrainConfig
from mp3d.data.batches import Batch, ClipDataset, Stream, training_loader
from mp3d.data.ray_batches import ray_batches
from mp3d.data.shard import open_shards
from mp3d.errors import ConfigError, DataError
from mp3d.launch import run_training
from mp3d.train import training_samples
from tests.tiny import ball_config, ball_shards, classifier_config, ct_shards, detector_config, picture_shards

STEPS = range(3, 9)


def source(config: TrainConfig) -> tuple[ClipDataset, Stream]:
    shards = open_shards(config.shards)
    stream = Stream(*training_samples(config, shards), negatives=config.loop.negatives, seed=1)
    masks = config.model.head.kind == "segmentation"
    return ClipDataset(shards, stream.samples, config.clip, config.augment, 1, every_slice=masks), stream


def assert_same(one: Batch, other: Batch) -> None:
    assert one.infos == other.infos
    for a, b in zip(one.clips, other.clips, strict=True):
        assert a.key_slices == b.key_slices
        assert a.slices.dtype == b.slices.dtype
        assert torch.equal(a.slices, b.slices)
    for a, b in zip(one.targets, other.targets, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def configs(folder: Path) -> list[TrainConfig]:
    """Windows with and without boxes, slabs, pictures, blocks with masks."""
    ct, pictures, balls = ct_shards(folder / "ct"), picture_shards(folder / "pictures"), ball_shards(folder / "balls")
    return [
        detector_config(ct, folder, loop__negatives=1.0),
        detector_config(ct, folder, clip__num_key_slices=9),
        classifier_config(pictures, folder, model__head=ClassificationHead(num_classes=2)),
        ball_config(balls, folder, SegmentationHead()),
    ]


@pytest.mark.ray
def test_every_kind_of_clip_travels_unchanged_to_every_rank(ray_cluster: None, tmp_path: Path):
    for config in configs(tmp_path):
        dataset, stream = source(config)
        for rank in range(2):
            share = {"batch_size": 3, "steps": STEPS, "rank": rank, "world_size": 2}
            expected = list(training_loader(dataset, stream, **share, workers=0))
            for one, other in zip(expected, ray_batches(dataset, stream, **share), strict=True):
                assert_same(one, other)


@pytest.mark.ray
def test_altered_shards_are_named_as_the_plain_loader_names_them(ray_cluster: None, tmp_path: Path):
    config = detector_config(ct_shards(tmp_path / "ct"), tmp_path)
    dataset, stream = source(config)
    for part in (tmp_path / "ct").glob("part-*.parquet"):
        content = bytearray(part.read_bytes())
        content[len(content) // 3] ^= 0xFF
        part.write_bytes(content)
    with pytest.raises(DataError, match=r"part-\d+\.parquet.*is not what was written"):
        list(ray_batches(dataset, stream, batch_size=2, steps=STEPS, rank=0, world_size=1))


def test_without_ray_it_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"launch\.ingest is ray_data.*use pyarrow"):
        run_training(detector_config(ct_shards(tmp_path / "ct"), tmp_path, launch__ingest="ray_data"))


@pytest.mark.acceptance
@pytest.mark.ray
def test_a_run_goes_from_one_to_the_other_and_ends_with_the_same_weights(ray_cluster: None, tmp_path: Path):
    config = detector_config(ct_shards(tmp_path / "ct"), tmp_path, loop__epochs=2, launch__keep_checkpoints=9)
    torch.set_num_threads(1)
    plain = run_training(config.override({"name": "plain"}))
    fed = config.override({"name": "fed", "launch.runner": "ray", "launch.ingest": "ray_data"})
    run_training(fed)
    for epoch in ("epoch_0001", "epoch_0002"):
        name = f"{epoch}/model.safetensors"
        assert (plain / name).read_bytes() == (tmp_path / "fed" / name).read_bytes()
