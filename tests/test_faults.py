"""Faults in training on Ray: whatever is killed, torn or full, the run goes on to the weights of an unbroken one, or
says clearly why not.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mp3d import launch
from mp3d.checkpoint import open_checkpoint
from mp3d.config import TrainConfig
from mp3d.data.shard import open_shards
from mp3d.errors import CheckpointError, ConfigError, ResourceError, TrainingStopped
from mp3d.launch import run_training
from mp3d.run_folder import claim, read_metrics
from tests.gloo_workers import train_on_gloo
from tests.tiny import ct_shards, detector_config

ROOT = Path(__file__).parents[1]
EPOCHS, WORKERS = 4, 2
DISK_BYTES = 64 * 2**20
WAIT_S = 240


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_shards(tmp_path_factory.mktemp("ct") / "shards")


def two_workers(ct: Path, storage: Path, **changes) -> TrainConfig:
    settings = {
        "loop__num_workers": WORKERS, "loop__batch_size": 1, "loop__epochs": EPOCHS, "launch__runner": "ray",
        "launch__keep_checkpoints": 9, "launch__max_failures": 3,
    }  # fmt: skip
    return detector_config(ct, storage, **settings | changes)


@pytest.fixture(scope="module")
def unbroken(ct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to, in two plain processes."""
    folder = tmp_path_factory.mktemp("unbroken")
    return train_on_gloo(two_workers(ct, folder), folder / "run", WORKERS)


def assert_same(run: Path, expected: Path) -> None:
    """Weights, optimiser and metrics of every epoch, bit for bit."""
    for epoch in range(1, EPOCHS + 1):
        mine, other = (open_checkpoint(each / f"epoch_{epoch:04d}") for each in (run, expected))
        for found, wanted in (
            (mine.model_state(), other.model_state()),
            (mine.trainer_state().tensors, other.trainer_state().tensors),
        ):
            assert found.keys() == wanted.keys()
            assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
        assert mine.trainer_state().values == other.trainer_state().values
    assert read_metrics(run) == read_metrics(expected)


def wait_for(what: Callable[[], object], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def workers_below(root: int) -> list[int]:
    """Ray Train's workers among the processes that a process has started."""
    children: dict[int, list[int]] = {}
    names: dict[int, bytes] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(") ")[2].split()[1])
            names[int(stat.parent.name)] = stat.with_name("cmdline").read_bytes()
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        waiting += below
        found += [pid for pid in below if names[pid].startswith(b"ray::") and b"RayTrainWorker" in names[pid]]
    return sorted(found)


def holder(run: Path) -> int | None:
    """The process of rank 0, which wrote itself down."""
    try:
        return int((run / "lock").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None


class Killer(threading.Thread):
    """Ends a worker once the epoch is done, some time later or while the next checkpoint is written."""

    def __init__(self, run: Path, epoch: int, seed: int, *, while_writing: bool = False, times: int = 1) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.epoch, self.draw = run, epoch, random.Random(seed)
        self.while_writing, self.times, self.killed = while_writing, times, []

    def run(self) -> None:
        for number in range(self.times):
            epoch = self.epoch + number
            wait_for(lambda epoch=epoch: (self.run_dir / f"epoch_{epoch:04d}").exists())
            if self.while_writing:
                wait_for(lambda: list(self.run_dir.glob(".epoch_*.tmp/*")))
                victim = holder(self.run_dir)
            else:
                time.sleep(self.draw.uniform(0, 0.3))
                victim = self.draw.choice(workers_below(os.getpid()) or [None])
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                self.killed.append(victim)


@pytest.mark.ray
def test_a_killed_worker_changes_nothing(ray_cluster: None, ct: Path, unbroken: Path, tmp_path: Path):
    killer = Killer(tmp_path / "detector", epoch=1, seed=0)
    killer.start()
    run = run_training(two_workers(ct, tmp_path))
    assert killer.killed, "a worker was ended"
    assert_same(run, unbroken)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("seed", range(1, 6))
def test_workers_killed_at_seeded_moments(ray_cluster: None, ct: Path, unbroken: Path, tmp_path: Path, seed: int):
    killer = Killer(tmp_path / "detector", epoch=1 + seed % 2, seed=seed, times=2)
    killer.start()
    run = run_training(two_workers(ct, tmp_path))
    assert killer.killed
    assert_same(run, unbroken)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_worker_killed_while_it_writes(ray_cluster: None, ct: Path, unbroken: Path, tmp_path: Path, epoch: int):
    killer = Killer(tmp_path / "detector", epoch, seed=epoch, while_writing=True)
    killer.start()
    run = run_training(two_workers(ct, tmp_path))
    assert killer.killed
    assert_same(run, unbroken)
    assert list(run.glob(".epoch_*")) == []


@pytest.mark.chaos
@pytest.mark.ray
def test_more_lost_workers_than_allowed_is_said(ray_cluster: None, ct: Path, unbroken: Path, tmp_path: Path):
    killer = Killer(tmp_path / "detector", epoch=1, seed=0)
    killer.start()
    config = two_workers(ct, tmp_path, launch__max_failures=0)
    with pytest.raises(TrainingStopped, match="was lost, and launch.max_failures is used up"):
        run_training(config)
    assert_same(run_training(config), unbroken)


def test_a_lost_worker_is_told_though_the_others_failed_for_want_of_it(tmp_path: Path):
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = WorkerHealthCheckFailedError("a health check failed", ActorDiedError())
    gloo = RuntimeError("Read error: Connection reset by peer")
    told = launch._explained(WorkerGroupError("failed", {0: gloo, 1: lost}), tmp_path)
    assert isinstance(told, TrainingStopped)
    assert "worker 1 was lost" in str(told)
    assert launch._explained(WorkerGroupError("failed", {0: gloo}), tmp_path) is None


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("damage", ["torn", "flipped", "swapped", "all"])
def test_a_damaged_newest_checkpoint(ray_cluster: None, ct: Path, unbroken: Path, tmp_path: Path, damage: str):
    config = two_workers(ct, tmp_path)
    run = train_on_gloo(config, tmp_path / "detector", WORKERS, stop_after=3)
    newest, before = run / "epoch_0003", run / "epoch_0002"
    file = newest / "trainer.safetensors"
    match damage:
        case "torn":
            file.write_bytes(file.read_bytes()[:-100])
        case "flipped":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 4
            file.write_bytes(content)
        case "swapped":
            for path in before.iterdir():
                (newest / path.name).write_bytes(path.read_bytes())
        case "all":
            for path in run.glob("epoch_*/model.safetensors"):
                path.write_bytes(b"")
            with pytest.raises(CheckpointError, match="every checkpoint"):
                run_training(config)
            return
    assert_same(run_training(config), unbroken)
    assert (run / "damaged_epoch_0003" / "manifest.json").exists()


def drive(config: TrainConfig, *args: str) -> subprocess.Popen:
    """The run in a process with a Ray of its own, as a job's is."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "tests.driver", config.model_dump_json(), *args]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=WAIT_S * 2)
    return process.returncode, said


@pytest.mark.chaos
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_driver_is_started_again(ct: Path, unbroken: Path, tmp_path: Path, sent: signal.Signals):
    config = two_workers(ct, tmp_path)
    run = tmp_path / "detector"
    process = drive(config)
    wait_for(lambda: (run / "epoch_0002").exists())
    process.send_signal(sent)
    finish(process)
    code, said = finish(drive(config))
    assert code == 0, said
    assert_same(run, unbroken)


@pytest.mark.chaos
def test_a_killed_node(ct: Path, unbroken: Path, tmp_path: Path):
    code, said = finish(drive(two_workers(ct, tmp_path), "lose-a-node", "replace-it"))
    assert code == 0, said
    assert_same(tmp_path / "detector", unbroken)


@pytest.mark.chaos
def test_an_elastic_run_goes_on_with_the_workers_that_are_left(ct: Path, tmp_path: Path):
    """Not to the same bits; to every sample and the rule of its learning rate."""
    config = two_workers(ct, tmp_path, loop__min_workers=1, optim__schedule="constant", optim__warmup_steps=0)
    code, said = finish(drive(config, "lose-a-node"))
    assert code == 0, said
    lines = read_metrics(tmp_path / "detector")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines][:1] == [3e-3]
    assert lines[-1]["lr"] == pytest.approx(1.5e-3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here; tests/test_run_folder.py limits files instead")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.chaos
@pytest.mark.parametrize("tracking", ["disabled", "offline"])
def test_a_full_disk(ct: Path, small_disk: Path, tmp_path: Path, tracking: str):
    config = detector_config(
        ct, small_disk, loop__epochs=3, launch__keep_checkpoints=9, tracking__mode=tracking
    )  # fmt: skip
    roomy = {"launch.storage_path": str(tmp_path / "roomy"), "tracking.mode": "disabled"}
    assert finish(drive(config.override(roomy)))[0] == 0
    expected = tmp_path / "roomy" / "detector"
    ballast = small_disk / "ballast"
    one = sum(path.stat().st_size for path in (expected / "epoch_0001").iterdir())
    ballast.write_bytes(bytes(DISK_BYTES - 2 * one - 200_000))
    started = time.monotonic()
    code, said = finish(drive(config))
    assert code == ResourceError.exit_code, said
    assert "could not be written" in said
    assert "make room" in said
    assert time.monotonic() - started < WAIT_S
    assert list((small_disk / "detector").glob(".*")) == []
    ballast.unlink()
    code, said = finish(drive(config))
    assert code == 0, said
    for epoch in (1, 2, 3):
        name = f"epoch_{epoch:04d}/model.safetensors"
        assert (small_disk / "detector" / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.chaos
@pytest.mark.ray
def test_a_full_disk_under_ray_train(ray_cluster: None, ct: Path, unbroken: Path, small_disk: Path):
    config = two_workers(ct, small_disk, launch__keep_checkpoints=9)
    one = sum(path.stat().st_size for path in (unbroken / "epoch_0001").iterdir())
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(DISK_BYTES - 2 * one - 200_000))
    with pytest.raises(ResourceError, match="make room"):
        run_training(config)
    ballast.unlink()
    assert_same(run_training(config), unbroken)


@pytest.mark.ray
def test_a_full_cluster_is_refused_within_seconds(ray_cluster: None, ct: Path, tmp_path: Path):
    import ray

    @ray.remote(num_cpus=1.5)
    class Busy:
        def here(self) -> None:
            return None

    busy = Busy.remote()
    ray.get(busy.here.remote())
    try:
        started = time.monotonic()
        with pytest.raises(
            ResourceError,
            match=r"2 worker\(s\) with 2 CPU in all; the cluster has 2 CPU \(0.5 CPU free\), of which others",
        ):
            run_training(two_workers(ct, tmp_path))
        assert time.monotonic() - started < 15
    finally:
        ray.kill(busy)
    assert not (tmp_path / "detector").exists()


def test_a_name_with_another_configuration_is_refused_before_ray_starts(ct: Path, tmp_path: Path, monkeypatch):
    def start(**options) -> None:
        pytest.fail("Ray was started for nothing")

    config = two_workers(ct, tmp_path)
    claim(tmp_path / "detector", config, open_shards(ct).digest)
    monkeypatch.setattr(launch, "connect_ray", start)
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.003, is 0\.5"):
        run_training(config.override({"optim.lr": 0.5}))
    assert json.loads((tmp_path / "detector" / "run.json").read_text())["optim"]["lr"] == 3e-3
