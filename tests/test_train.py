"""The loop on tiny data: it learns, it resumes to the bit, it refuses what it cannot use."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mp3d.checkpoint import open_checkpoint
from mp3d.config import ClassificationHead
from mp3d.data.batches import ClipDataset
from mp3d.data.shard import write_manifest
from mp3d.data.stream import Place
from mp3d.errors import CheckpointError, ConfigError, DataError, Mp3dError, ResourceError, TrainingStopped
from mp3d.failures import explained
from mp3d.launch import run_training
from mp3d.run_folder import read_metrics
from mp3d.session import PlainSession
from mp3d.step import TrainingDiverged
from mp3d.train import check_inputs, train
from tests.gloo_workers import train_on_gloo
from tests.tiny import ball_config, classifier_config, ct_shards, detector_config, picture_shards


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_shards(tmp_path_factory.mktemp("ct") / "shards")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_shards(tmp_path_factory.mktemp("pictures") / "shards")


class Killed(Exception):
    """Stands for the end of a process."""


class MortalSession(PlainSession):
    """Dies when an epoch ends: right after its checkpoint, or while it is written."""

    def __init__(self, run_dir: Path, die_in_epoch: int, while_saving: bool) -> None:
        super().__init__(run_dir, keep=2, device=torch.device("cpu"))
        self.die_in_epoch, self.while_saving = die_in_epoch, while_saving

    def report(self, epoch, score, metrics, save):
        def torn(path: Path) -> None:
            save(path)
            (path / "manifest.json").unlink()
            raise Killed

        dies = epoch == self.die_in_epoch
        super().report(epoch, score, metrics, torn if dies and self.while_saving else save)
        if dies:
            raise Killed


def weights(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    return open_checkpoint(run / f"epoch_{epoch:04d}").model_state()


@pytest.mark.parametrize("while_saving", [False, True])
@pytest.mark.parametrize("head", ["detector", "classifier"])
def test_a_killed_run_goes_on_to_the_same_weights(
    ct: Path, pictures: Path, tmp_path: Path, head: str, while_saving: bool
):
    make, shards = {"detector": (detector_config, ct), "classifier": (classifier_config, pictures)}[head]
    config = make(shards, tmp_path, loop__epochs=3)
    unbroken = run_training(config.override({"name": "unbroken"}))
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(Killed):
        train(config, MortalSession(broken, 2, while_saving))
    train(config, PlainSession(broken, keep=2, device=torch.device("cpu")))
    expected, got = weights(unbroken, 3), weights(broken, 3)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [line["epoch"] for line in read_metrics(broken)] == [1, 2, 3]
    assert read_metrics(broken) == read_metrics(unbroken)


def test_a_finished_run_is_not_trained_again(ct: Path, tmp_path: Path):
    config = detector_config(ct, tmp_path, loop__epochs=1)
    run = run_training(config)
    before = (run / "epoch_0001" / "model.safetensors").stat().st_mtime_ns
    run_training(config)
    assert (run / "epoch_0001" / "model.safetensors").stat().st_mtime_ns == before


def test_the_best_checkpoints_and_the_latest_are_kept(ct: Path, tmp_path: Path):
    run = run_training(
        detector_config(ct, tmp_path, loop__epochs=5, loop__steps_per_epoch=1, launch__keep_checkpoints=1)
    )
    kept = sorted(path.name for path in run.glob("epoch_*"))
    scores = {line["epoch"]: line["score"] for line in read_metrics(run)}
    best = max(scores, key=lambda epoch: (scores[epoch], epoch))
    assert kept == sorted({f"epoch_{best:04d}", "epoch_0005"})
    assert open_checkpoint(run).score == max(scores.values())


def test_the_same_name_with_another_configuration_is_refused(ct: Path, tmp_path: Path):
    config = detector_config(ct, tmp_path, loop__epochs=1, loop__steps_per_epoch=1)
    run_training(config)
    with pytest.raises(ConfigError, match=r"optim.lr was 0.003, is 0.1"):
        run_training(config.override({"optim.lr": 0.1}))


def test_a_detector_learns(ct: Path, tmp_path: Path):
    run = run_training(detector_config(ct, tmp_path, loop__epochs=4, loop__steps_per_epoch=20))
    assert open_checkpoint(run).metrics["sensitivity@1"] >= 0.5


def test_a_detector_learns_from_slabs(ct: Path, tmp_path: Path):
    run = run_training(detector_config(ct, tmp_path, clip__num_key_slices=9, loop__epochs=4, loop__steps_per_epoch=20))
    assert open_checkpoint(run).metrics["sensitivity@1"] >= 0.5


def test_a_classifier_learns_and_its_backbone_starts_a_detector(
    ct: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pretrained = run_training(classifier_config(pictures, tmp_path, loop__epochs=3, loop__steps_per_epoch=6))
    assert open_checkpoint(pretrained).metrics["top1"] == 1.0
    capsys.readouterr()
    run = run_training(detector_config(ct, tmp_path, init_from=str(pretrained), loop__epochs=1, optim__lr=1e-9))
    said = capsys.readouterr().out
    assert "stage4" in said
    assert "re-initialised" in said
    source, moved = open_checkpoint(pretrained).model_state(), weights(run, 1)
    name = next(name for name in source if name.endswith("stem.layers.0.conv.weight"))
    ours = next(key for key in moved if key.endswith("stem.layers.0.conv.weight"))
    torch.testing.assert_close(moved[ours], source[name], atol=1e-6, rtol=0)


def test_another_beginning_under_the_same_path_is_refused_and_none_is_needed_later(ct: Path, tmp_path: Path):
    short = {"loop__epochs": 1, "loop__steps_per_epoch": 1}
    first = run_training(detector_config(ct, tmp_path, "first", **short))
    config = detector_config(ct, tmp_path, init_from=str(first), **short)
    run = run_training(config)
    digest = open_checkpoint(first).digest
    expected = weights(run, 1)
    shutil.rmtree(first)
    assert run_training(config) == run, "it has begun and needs no beginning"
    run_training(detector_config(ct, tmp_path, "first", loop__seed=1, **short))
    shutil.rmtree(run / "epoch_0001")
    with pytest.raises(ConfigError, match=rf"init_digest was '{digest}', is"):
        run_training(config)
    shutil.rmtree(first)
    run_training(detector_config(ct, tmp_path, "first", **short))
    run_training(config)
    assert all(torch.equal(value, expected[name]) for name, value in weights(run, 1).items())


def test_frozen_stages_do_not_move(ct: Path, tmp_path: Path):
    run = run_training(detector_config(ct, tmp_path, loop__epochs=2, loop__steps_per_epoch=1, model__frozen_stages=1))
    first, last = weights(run, 1), weights(run, 2)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert any("stage2" in name for name in changed)
    assert not any("stem" in name or "stage1" in name for name in changed)


def test_negatives_and_several_sizes_train(ct: Path, tmp_path: Path):
    config = detector_config(ct, tmp_path, loop__epochs=1, loop__negatives=1.0, augment__image_sizes=(32, 48))
    assert run_training(config).exists()


def test_a_loss_that_is_not_finite_names_the_batch(ct: Path, tmp_path: Path):
    with pytest.raises(TrainingDiverged, match=r"step \d+: the loss is (nan|inf) on series/slice [0-9a-f]{16}/\d"):
        run_training(detector_config(ct, tmp_path, optim__lr=1e18, optim__clip_grad_norm=None, optim__warmup_steps=0))


def test_every_checkpoint_damaged_is_refused(ct: Path, tmp_path: Path):
    config = detector_config(ct, tmp_path, loop__epochs=1, loop__steps_per_epoch=1)
    run = run_training(config)
    (run / "epoch_0001" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        run_training(config)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shards": "nowhere"}, DataError, "run jobs/prepare.py"),
        ({"clip.slice_spacing_mm": None}, DataError, "holds CT series, and the configuration reads colour pictures"),
        ({"shards": "pictures"}, DataError, "holds colour pictures, and the configuration reads CT"),
        ({"init_from": "nowhere"}, CheckpointError, "neither a checkpoint"),
        (
            {"shards": "pictures", "model.head": {"kind": "classification", "num_classes": 1}, "clip.num_slices": 3}
            | {"clip.slice_spacing_mm": None},
            ConfigError,
            "2 classes",
        ),
    ],
)
def test_unusable_inputs_are_refused_before_anything_starts(
    ct: Path, pictures: Path, tmp_path: Path, changes: dict, error: type[Exception], message: str
):
    if changes.get("shards") == "pictures":
        changes = changes | {"shards": str(pictures)}
    with pytest.raises(error, match=message):
        run_training(detector_config(ct, tmp_path).override(changes))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_data_set_is_refused_before_the_run_exists(ct: Path, tmp_path: Path):
    shards = tmp_path / "shards"
    shutil.copytree(ct, shards)
    content = json.loads((shards / "manifest.json").read_text())
    for left, said in (([], "no series in split 'train', only in: none"), (["train"], "no series in split 'val'")):
        series = [entry for entry in content["series"] if entry["split"] in left]
        rest = {name: value for name, value in content.items() if name not in ("digest", "format_version")}
        write_manifest(shards, rest | {"series": series})
        with pytest.raises(DataError, match=said):
            run_training(detector_config(shards, tmp_path))
    assert not (tmp_path / "detector").exists()


def test_a_missing_gpu_is_refused_before_the_run_exists(ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="PyTorch sees none here"):
        run_training(detector_config(ct, tmp_path, launch__accelerator="gpu"))
    assert not (tmp_path / "detector").exists()


@pytest.mark.acceptance
def test_three_workers_go_on_to_the_same_weights(ct: Path, tmp_path: Path):
    """Sums of more than two gradients depend on their order."""
    config = detector_config(ct, tmp_path, loop__num_workers=3, loop__batch_size=1)
    unbroken = train_on_gloo(config, tmp_path / "unbroken", 3)
    broken = train_on_gloo(config, tmp_path / "broken", 3, stop_after=1)
    train_on_gloo(config, broken, 3)
    expected, got = weights(unbroken, 2), weights(broken, 2)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


@pytest.mark.parametrize("num_classes", [2, 3])
def test_shards_without_classes_cannot_train_a_classifier(ct: Path, tmp_path: Path, num_classes: int):
    head = ClassificationHead(num_classes=num_classes)
    with pytest.raises(DataError, match=r"4 of 4 train samples of .* have no class for a classifier to learn"):
        check_inputs(ball_config(ct, tmp_path, head))


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), ResourceError, r"loop\.batch_size.*accumulate"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), ResourceError, r"loop\.batch_size"),
        (OSError(errno.ENOSPC, "No space left", "/runs/a/transfer.json"), ResourceError, r"transfer\.json cannot be"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), TrainingStopped, "loader_workers"),
        (RuntimeError("Caught KeyError in DataLoader worker process 0."), RuntimeError, "Caught KeyError"),
        (FileNotFoundError(errno.ENOENT, "No such file"), FileNotFoundError, "No such file"),
    ],
)
def test_what_is_no_defect_is_told_as_an_error_of_ours(
    raised: Exception, kind: type[Exception], message: str, tmp_path: Path
):
    with pytest.raises(kind, match=message) as told, explained(tmp_path):
        raise raised
    assert isinstance(told.value, Mp3dError) == (kind in (ResourceError, TrainingStopped))


def test_a_full_disk_beside_the_checkpoints_is_told(ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pretrained = run_training(detector_config(ct, tmp_path, "first", loop__epochs=1, loop__steps_per_epoch=1))
    write_text = Path.write_text

    def full(path: Path, content: str, **options: str) -> int:
        if path.name == "transfer.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_text(path, content, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResourceError, match=r"transfer\.json cannot be written \(No space left on device\); make room"):
        run_training(detector_config(ct, tmp_path, init_from=str(pretrained)))


def test_a_killed_process_that_reads_is_told(ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def die(dataset: ClipDataset, place: Place) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ClipDataset, "__getitem__", die)
    with pytest.raises(TrainingStopped, match="a process that reads clips was lost"):
        run_training(detector_config(ct, tmp_path, launch__loader_workers=1))


def test_shards_without_boxes_cannot_train_a_detector(pictures: Path, tmp_path: Path):
    planes = {"clip.num_slices": 3, "clip.slice_spacing_mm": None}
    with pytest.raises(DataError, match="no slice with a box"):
        check_inputs(detector_config(pictures, tmp_path).override(planes))


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_altered_shards_stop_the_run_with_the_file_named(ct: Path, tmp_path: Path, loader_workers: int):
    copy = tmp_path / "shards"
    shutil.copytree(ct, copy)
    for part in copy.glob("part-*.parquet"):
        content = bytearray(part.read_bytes())
        content[len(content) // 3] ^= 0xFF
        part.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{copy}/part-\d+\.parquet[^\n]*$"):
        run_training(detector_config(copy, tmp_path, launch__loader_workers=loader_workers))
