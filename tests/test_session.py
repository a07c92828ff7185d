"""Hosts of the loop: which device a trial takes, which checkpoints are kept."""

from functools import partial
from pathlib import Path

import pytest
import ray
import torch

from mp3d.checkpoint import checkpoints_of, open_checkpoint, save_checkpoint
from mp3d.config import TrainConfig
from mp3d.run_folder import commit_epoch, read_metrics
from mp3d.session import TuneSession

CONFIG = TrainConfig(name="a", shards="s")


def commit(run: Path, epoch: int, score: float, keep: int = 1) -> list[str]:
    """End an epoch; returns the checkpoints that are left."""
    save = partial(
        save_checkpoint, config=CONFIG, model_state={"w": torch.zeros(1)}, epoch=epoch, score=score, metrics={}
    )
    commit_epoch(run, epoch, score, {}, save, keep=keep)
    return [path.name for path in checkpoints_of(run)]


@pytest.mark.parametrize(("given", "device"), [([], "cpu"), ([3], "cuda")])
def test_a_trial_takes_the_gpu_that_ray_gave_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[int], device: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: given)
    assert TuneSession(tmp_path, keep=1).device == torch.device(device)


def test_the_best_and_the_latest_are_kept(tmp_path: Path):
    assert commit(tmp_path, 1, 0.3) == ["epoch_0001"]
    assert commit(tmp_path, 2, 0.9) == ["epoch_0002"]
    assert commit(tmp_path, 3, 0.5) == ["epoch_0002", "epoch_0003"]
    assert commit(tmp_path, 4, 0.7, keep=2) == ["epoch_0002", "epoch_0004"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"score": null}', '{"score": NaN}', "\udcff", None])
def test_a_checkpoint_with_damaged_metrics_stops_no_training_and_goes_first(tmp_path: Path, content: str | None):
    commit(tmp_path, 1, 0.9, keep=2)
    commit(tmp_path, 2, 0.3, keep=2)
    metrics = tmp_path / "epoch_0001" / "metrics.json"
    if content is None:
        metrics.unlink()
    else:
        metrics.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=r"removed: .*epoch_0001, whose metrics.json is damaged"):
        assert commit(tmp_path, 3, 0.2, keep=2) == ["epoch_0002", "epoch_0003"]
    assert open_checkpoint(tmp_path).epoch == 2
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]
