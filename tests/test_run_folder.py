"""The folder of a run: whatever ends its writer, it stands at the end of some epoch; who writes it is alone."""

import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from mp3d import checkpoint
from mp3d.checkpoint import TrainerState, open_checkpoint, save_checkpoint
from mp3d.config import TrainConfig
from mp3d.errors import CheckpointError, ConfigError, ResourceError, as_json, from_json
from mp3d.run_folder import check_name, claim, commit_epoch, held, read_metrics, resume_point, run_identity

CONFIG = TrainConfig(name="a", shards="s")
FORK = multiprocessing.get_context("fork")


def commit(run: Path, epoch: int, config: TrainConfig = CONFIG) -> Path:
    metrics = {"loss": 1 / epoch}
    tensors = {"w": torch.arange(300.0) * epoch}
    save = partial(
        save_checkpoint, config=config, model_state=tensors, epoch=epoch, score=0.5, metrics=metrics,
        trainer=TrainerState({"optimizer.0.m": tensors["w"] * 2}, {"param_groups": []}),
    )  # fmt: skip
    commit_epoch(run, epoch, 0.5, metrics, save, keep=9)
    return run / f"epoch_{epoch:04d}"


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def commit_within(run: Path, epoch: int, num_bytes: int, deadly: bool) -> None:
    """Commit where no more than so many bytes of the checkpoint can be written; then the process dies, or is told."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    written = 0

    def limited(write, path: Path, what) -> None:
        nonlocal written
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(0, num_bytes - written), resource.RLIM_INFINITY))
        write(path, what)
        written += path.stat().st_size

    for name in ("_write_json", "_save_tensors"):
        setattr(checkpoint, name, partial(limited, getattr(checkpoint, name)))
    try:
        commit(run, epoch)
    except ResourceError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (run / "told").write_text(str(error))
        raise SystemExit(error.exit_code) from error


def in_child(run: Path, epoch: int, num_bytes: int, deadly: bool) -> int | None:
    process = FORK.Process(target=commit_within, args=(run, epoch, num_bytes, deadly))
    process.start()
    process.join()
    return process.exitcode


def offsets(folder: Path, count: int) -> list[int]:
    """Places in what a checkpoint writes: the ends of its files, and so many in between."""
    order = ("config.json", "model.safetensors", "trainer.safetensors", "trainer.json", "metrics.json", "manifest.json")
    ends = [0]
    for name in order:
        ends.append(ends[-1] + (folder / name).stat().st_size)
    return sorted({*ends[:-1], ends[-1] - 1, *random.Random(0).sample(range(ends[-1]), count)})


def test_killed_at_any_byte_of_a_checkpoint_the_one_before_stands(tmp_path: Path):
    whole = tmp_path / "whole"
    commit(whole, 1)
    expected = content(commit(whole, 2))
    for number, place in enumerate(offsets(whole / "epoch_0002", 20)):
        run = tmp_path / str(number)
        commit(run, 1)
        assert in_child(run, 2, place, deadly=True) == -signal.SIGXFSZ
        assert list(run.glob(".epoch_0002.*.tmp")), "it died as it wrote"
        found = resume_point(run)
        assert found is not None
        assert found.epoch == 1
        assert sorted(path.name for path in run.iterdir()) == ["epoch_0001", "metrics.jsonl"]
        assert content(commit(run, 2)) == expected
        assert read_metrics(run) == read_metrics(whole)


def test_on_a_full_disk_nothing_half_written_is_left_and_the_run_goes_on_when_there_is_room(tmp_path: Path):
    whole = tmp_path / "whole"
    commit(whole, 1)
    expected = content(commit(whole, 2))
    for number, place in enumerate(offsets(whole / "epoch_0002", 4)):
        run = tmp_path / str(number)
        commit(run, 1)
        before = content(run)
        assert in_child(run, 2, place, deadly=False) == ResourceError.exit_code
        told = (run / "told").read_text()
        (run / "told").unlink()
        assert re.search(rf"epoch 2 could not be written to {run} \(File too large\); make room", told)
        assert content(run) == before
        assert content(commit(run, 2)) == expected


def test_a_checkpoint_of_another_epoch_is_refused_by_name_and_set_aside(tmp_path: Path):
    first, second = commit(tmp_path, 1), commit(tmp_path, 2)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.warns(
        UserWarning, match=rf"set aside as damaged_epoch_0002: {second} holds .* epoch 1: it was swapped"
    ):
        found = resume_point(tmp_path)
    assert found is not None
    assert found.path == first
    assert (tmp_path / "damaged_epoch_0002" / "model.safetensors").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    claim(tmp_path / "run", CONFIG, "digest")
    commit(tmp_path / "run", 1)
    commit(tmp_path / "run", 2, CONFIG.override({"loop.seed": 7}))
    with pytest.warns(UserWarning, match=r"epoch_0002 is of another run \(loop\.seed was 0, is 7\): it was swapped"):
        assert resume_point(tmp_path / "run").epoch == 1  # type: ignore[union-attr]
    commit(tmp_path / "run", 1, CONFIG.override({"loop.seed": 7}))
    with pytest.raises(CheckpointError, match="every checkpoint"):
        resume_point(tmp_path / "run")


def test_a_run_never_stands_for_a_swapped_checkpoint(tmp_path: Path):
    """Whoever evaluates, serves or starts from a run is told, as who resumes it."""
    run = tmp_path / "run"
    claim(run, CONFIG, "digest")
    first, second = commit(run, 1), commit(run, 2)
    commit(run, 3, CONFIG.override({"loop.seed": 7}))
    with pytest.warns(UserWarning, match=r"epoch_0003 is of another run \(loop\.seed was 0, is 7\): it was swapped"):
        assert open_checkpoint(run).path == second
    first.rename(run / "aside")
    second.rename(first)
    with (
        pytest.warns(UserWarning, match="it was swapped"),
        pytest.raises(CheckpointError, match=r"epoch_0001 holds the checkpoint of epoch 2: it was swapped"),
    ):
        open_checkpoint(run)
    with pytest.raises(CheckpointError, match="epoch 2: it was swapped"):
        open_checkpoint(first)
    assert open_checkpoint(first.rename(tmp_path / "a copy elsewhere")).epoch == 2


def test_what_was_set_aside_stays(tmp_path: Path):
    commit(tmp_path, 1)
    for _ in range(3):
        (commit(tmp_path, 2) / "model.safetensors").write_bytes(b"torn")
        with pytest.warns(UserWarning, match="set aside"):
            resume_point(tmp_path)
    aside = sorted(path.name for path in tmp_path.glob("damaged_*"))
    assert aside == ["damaged_epoch_0002", "damaged_epoch_0002.2", "damaged_epoch_0002.3"]


def test_torn_metrics_lose_a_line_and_nothing_else(tmp_path: Path):
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1]
    commit(tmp_path, 2)
    commit(tmp_path, 3)
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    commit(tmp_path, 2)  # of a run that went back
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2]


def test_other_shards_under_the_same_path_are_another_run(tmp_path: Path):
    claim(tmp_path, CONFIG, "one")
    claim(tmp_path, CONFIG, "one")
    with pytest.raises(ConfigError, match="shards_digest was 'one', is 'two'"):
        claim(tmp_path, CONFIG, "two")


@pytest.mark.parametrize("is_sweep", [False, True])
def test_a_run_begun_before_a_field_existed_has_its_default(is_sweep: bool, tmp_path: Path):
    identity = run_identity(CONFIG, "one")
    old = json.loads(json.dumps(identity))
    del old["model"]["z_padding"], old["model"]["transform_taps"], old["loop"]["ema_decay"]
    changed = run_identity(CONFIG.override({"model.z_padding": "replicate"}), "one")
    old, identity, changed = ({"lr": 1, "base": each} if is_sweep else each for each in (old, identity, changed))
    (tmp_path / "run.json").write_text(json.dumps(old))
    check_name(tmp_path, "run.json", "a", identity)
    with pytest.raises(ConfigError, match="model.z_padding was 'zeros', is 'replicate'"):
        check_name(tmp_path, "run.json", "a", changed)


def test_a_damaged_name_is_refused_and_kept(tmp_path: Path):
    for damaged in (b"{", b"\xff", b"[]", b"null", b"1"):
        (tmp_path / "run.json").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
            check_name(tmp_path, "run.json", "a", run_identity(CONFIG))
        assert (tmp_path / "run.json").read_bytes() == damaged


def hold(run: Path, ready) -> None:
    with held(run):
        ready.set()
        signal.pause()


def test_a_run_is_trained_by_one_process_at_a_time_and_a_kill_lets_go(tmp_path: Path):
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    said = rf"being trained by another process \(process {process.pid} on .*another --name"
    with pytest.raises(ConfigError, match=said), held(tmp_path, wait_s=0.1):
        pass
    process.kill()
    with held(tmp_path, wait_s=10):
        pass
    process.join()


def test_an_error_travels_as_text():
    error = from_json(as_json(CheckpointError("torn")))
    assert (type(error), str(error), error.exit_code) == (CheckpointError, "torn", 3)
    assert json.loads(as_json(ConfigError("x")))["kind"] == "ConfigError"


def test_a_new_folder_that_cannot_be_made_is_said_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/run cannot be written"):
        claim(tmp_path / "file" / "run", CONFIG)


def test_a_checkpoint_is_there_when_its_manifest_is(tmp_path: Path):
    assert open_checkpoint(commit(tmp_path, 1)).epoch == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
