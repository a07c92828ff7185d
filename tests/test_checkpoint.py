"""Checkpoints: they come back whole, and damaged ones are refused by name."""

import json
import random
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

from mp3d.checkpoint import (
    MANIFEST,
    TrainerState,
    epoch_directory,
    open_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from mp3d.config import OptimConfig, TrainConfig
from mp3d.errors import CheckpointError
from mp3d.run_folder import resume_point
from mp3d.schedule import build_optimizer

CONFIG = TrainConfig(name="a", shards="s")


def write(run: Path, epoch: int, score: float, trainer: TrainerState | None = None) -> Path:
    path = run / epoch_directory(epoch)
    path.mkdir(parents=True)
    save_checkpoint(
        path,
        config=CONFIG,
        model_state={"weight": torch.arange(6.0).reshape(2, 3) + epoch},
        epoch=epoch,
        score=score,
        metrics={"froc_mean": score},
        trainer=trainer,
    )
    return path


def test_what_was_saved_comes_back(tmp_path: Path):
    checkpoint = open_checkpoint(write(tmp_path, 3, 0.5))
    assert checkpoint.config == CONFIG
    assert (checkpoint.epoch, checkpoint.score, checkpoint.metrics) == (3, 0.5, {"froc_mean": 0.5})
    assert torch.equal(checkpoint.model_state()["weight"], torch.arange(6.0).reshape(2, 3) + 3)
    with pytest.raises(CheckpointError, match="not resumed"):
        checkpoint.trainer_state()


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_an_optimiser_goes_on_as_if_it_had_never_stopped(tmp_path: Path, algorithm: str):
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, build_optimizer(model.parameters(), OptimConfig(algorithm=algorithm, lr=0.1))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    write(tmp_path, 1, 0.0, pack_optimizer(optimizer))
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(model.state_dict())
    unpack_optimizer(resumed_optimizer, open_checkpoint(tmp_path).trainer_state())
    for _ in range(2):
        step(model, optimizer)
        step(resumed, resumed_optimizer)
    assert torch.equal(model.weight, resumed.weight)


def test_a_run_stands_for_its_best_and_resumes_from_its_latest(tmp_path: Path):
    for epoch, score in enumerate([0.1, 0.7, 0.3], 1):
        write(tmp_path, epoch, score)
    assert open_checkpoint(tmp_path).epoch == 2
    newest = resume_point(tmp_path)
    assert newest is not None
    assert newest.epoch == 3


def test_a_new_run_has_no_latest(tmp_path: Path):
    assert resume_point(tmp_path / "new") is None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metrics.json", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str):
    write(tmp_path, 1, 0.1)
    newest = write(tmp_path, 2, 0.9)
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage == "cut":
        content = content[: len(content) // 2]
    file.write_bytes(content)
    if damage == "remove":
        file.unlink()
    left = {path.name: path.read_bytes() for path in newest.iterdir()}
    with pytest.raises(CheckpointError, match=str(newest)):
        open_checkpoint(newest)
    with pytest.warns(UserWarning, match=f"refused and set aside as damaged_epoch_0002: .*{newest}"):
        assert resume_point(tmp_path).epoch == 1  # type: ignore[union-attr]
    assert {path.name: path.read_bytes() for path in (tmp_path / "damaged_epoch_0002").iterdir()} == left
    assert open_checkpoint(tmp_path).epoch == 1


def test_any_flipped_bit_and_any_cut_is_found(tmp_path: Path):
    path = write(tmp_path, 1, 0.1, TrainerState({"a": torch.arange(9.0)}, {"b": 1}))
    draw = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(12):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            refused(path)
            file.write_bytes(whole[: draw.randrange(len(whole))])
            refused(path)
        file.write_bytes(whole)
    assert open_checkpoint(path).epoch == 1


def refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(path)):
        open_checkpoint(path)


def test_a_pickle_in_a_checkpoint_s_place_is_not_opened(tmp_path: Path):
    path = write(tmp_path, 1, 0.1)
    opened = tmp_path / "opened"
    torch.save({"weight": Touch(opened)}, path / "model.safetensors")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["model.safetensors"] = sha256((path / "model.safetensors").read_bytes()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))  # its maker may write any manifest
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(path).model_state()
    assert not opened.exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_swapped_between_checkpoints_are_refused(tmp_path: Path):
    first, second = write(tmp_path, 1, 0.1), write(tmp_path, 2, 0.2)
    (second / "model.safetensors").write_bytes((first / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="altered or torn"):
        open_checkpoint(second)


def test_another_format_version_is_refused_with_what_to_do(tmp_path: Path):
    path = write(tmp_path, 1, 0.1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        open_checkpoint(path)


def test_all_damaged_is_no_new_start(tmp_path: Path):
    for epoch in (1, 2):
        (write(tmp_path, epoch, 0.1) / "model.safetensors").write_bytes(b"")
    for _ in range(2):  # nothing was moved, so the next start refuses too
        with pytest.raises(CheckpointError, match=r"every checkpoint.*epoch_0002.*epoch_0001"):
            resume_point(tmp_path)


def test_nothing_there_says_what_to_give(tmp_path: Path):
    with pytest.raises(CheckpointError, match="runs/<name>"):
        open_checkpoint(tmp_path)
