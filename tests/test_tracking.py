"""W&B can neither stop a run nor leak."""

import getpass
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import wandb
from PIL import Image

from mp3d.checkpoint import open_checkpoint
from mp3d.config import Config, TrackingConfig, TrainConfig
from mp3d.session import PlainSession
from mp3d.tracking import CONFIG_FIELDS, Tracker, allowed_config, allowed_metrics, track, track_report, tracking_mode
from mp3d.train import train
from tests.tiny import ct_shards, detector_config
from tests.wandb_server import WandbServer

CANARY = "CANARY-doe-jane-1970"


def config(mode: str) -> TrainConfig:
    return TrainConfig(
        name="watched",
        shards=f"/data/{CANARY}",
        init_from=f"/runs/{CANARY}",
        launch={"storage_path": f"/home/{CANARY}"},  # type: ignore[arg-type]
        tracking=TrackingConfig(mode=mode),  # type: ignore[arg-type]
    )


@pytest.fixture
def no_wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    yield
    wandb.teardown()


def test_offline_without_a_key_online_with_one(no_wandb_environment, monkeypatch: pytest.MonkeyPatch):
    assert tracking_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracking_mode("auto") == "online"
    assert tracking_mode("disabled") == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking_mode("auto") == "offline"


def test_an_offline_run_keeps_metrics_and_no_path(no_wandb_environment, tmp_path: Path):
    with track(config("offline"), tmp_path, rank=0) as tracker:
        tracker({"froc_mean": 0.123456789}, step=10)
    wandb.teardown()  # its helper process writes the last records when it ends
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    content = b"".join(path.read_bytes() for path in files)
    assert b"froc_mean" in content
    assert CANARY.encode() not in content


@pytest.fixture
def server(no_wandb_environment, monkeypatch: pytest.MonkeyPatch):
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    yield server
    server.close()


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_shards(tmp_path_factory.mktemp("ct") / "shards")


def run_watched(shards: Path, storage: Path, mode: str, *failure: str, pictures: int = 0) -> tuple[float, str]:
    """In a process of its own; returns its seconds, all that W&B does as it ends included, and what it said."""
    command = [sys.executable, "-m", "tests.watched_run", str(shards), str(storage), mode, str(pictures), *failure]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - started, done.stdout + done.stderr


def weights(storage: Path) -> bytes:
    return (storage / "watched" / "epoch_0003" / "model.safetensors").read_bytes()


def own_lines(said: str) -> list[str]:
    """What the run prints, without speeds."""
    return [re.sub(r"[\d.]+ clips/s", "", line) for line in said.splitlines() if line.startswith("epoch")]


def test_a_run_sends_what_is_allowed_and_a_resumed_one_goes_on_in_it(server: WandbServer, ct: Path, tmp_path: Path):
    _, said = run_watched(ct, tmp_path, "online", pictures=2)
    (run,) = server.history
    first = server.upserts[0]
    assert (first["displayName"], first["project"], first["name"]) == ("watched", "mp3d", run)
    sent = {name: value for name, value in json.loads(first["config"]).items() if name != "_wandb"}
    assert sent.keys() == set(CONFIG_FIELDS)
    assert sent["optim"]["value"]["lr"] == 3e-3
    scored = [row for row in server.history[run] if "froc_mean" in row]
    assert [row["_step"] for row in scored] == [3, 6, 9]
    assert any("system.memory_percent" in row for row in server.events[run])
    shown = [name for name in server.files if name.endswith(".png")]
    assert len(shown) == 6
    artifact = next(variables for name, variables in server.operations if name.startswith("CreateArtifact"))
    assert "watched-checkpoint" in json.dumps(artifact)
    best = open_checkpoint(tmp_path / "watched")
    assert best.digest in json.dumps(artifact) or any(best.digest.encode() in body for body in server.bodies)
    # the last epoch is lost, and trained again
    shutil.rmtree(tmp_path / "watched" / "epoch_0003")
    run_watched(ct, tmp_path, "online")
    assert {upsert["name"] for upsert in server.upserts} == {run}
    assert {name for name, _ in server.operations} >= {"RunResumeStatus", "UpsertBucket"}
    forbidden = [socket.gethostname(), getpass.getuser(), str(tmp_path), str(ct), "watched_run", "python -m"]
    everything = b"".join(server.bodies)
    assert [word for word in forbidden if len(word) > 4 and word.encode() in everything] == []


def test_an_epoch_has_the_same_step_however_many_workers_are_left(
    ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """W&B drops what comes at a lower step than the last one, as after an epoch of fewer workers, which has more."""
    steps = []

    class Told(Tracker):
        def __call__(self, metrics: Mapping[str, float], step: int) -> None:
            steps.append(step)

    monkeypatch.setattr("mp3d.train.track", lambda *args: nullcontext(Told()))
    config = detector_config(
        ct, tmp_path, loop__num_workers=2, loop__min_workers=1, loop__batch_size=1, loop__steps_per_epoch=2
    )
    session = PlainSession(tmp_path / "run", keep=1, device=torch.device("cpu"))
    train(config, session)  # one worker of two, in twice as many steps
    assert steps == [2, 4]


@pytest.mark.acceptance
def test_an_offline_run_is_sent_later(server: WandbServer, ct: Path, tmp_path: Path):
    run_watched(ct, tmp_path, "offline")
    assert server.history == {}
    (folder,) = (tmp_path / "watched" / "wandb").glob("offline-run-*")
    tool = Path(sys.executable).with_name("wandb")
    subprocess.run([str(tool), "sync", str(folder)], check=True, capture_output=True, timeout=120, cwd=tmp_path)
    (rows,) = server.history.values()
    assert [row["_step"] for row in rows if "froc_mean" in row] == [3, 6, 9]


FAULTS = ("refuse", "silent", "error", "garbage")
PHASES = ("start", "middle", "end")
LOST_S = 15


def check_fault(server: WandbServer, ct: Path, folder: Path, phase: str, fault: str) -> None:
    plain_s, plain_said = run_watched(ct, folder / "plain", "disabled")
    if phase == "start":
        server.turn(fault)
    took_s, said = run_watched(ct, folder / "watched", "online", phase, fault, server.url)
    assert weights(folder / "watched") == weights(folder / "plain")
    assert own_lines(said) == own_lines(plain_said)
    assert took_s - plain_s < LOST_S + import_s()
    kept = list((folder / "watched" / "watched" / "wandb").glob("*run-*/*.wandb"))
    assert any(b"froc_mean" in path.read_bytes() for path in kept), "what could not be sent is there to be synced"


def import_s() -> float:
    """What W&B's client takes to load here, server or not."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import wandb"], check=True)
    return time.monotonic() - started


def test_a_server_that_is_lost_costs_seconds_and_nothing_else(server: WandbServer, ct: Path, tmp_path: Path):
    check_fault(server, ct, tmp_path, "middle", "silent")


@pytest.mark.acceptance
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("phase", PHASES)
def test_whenever_and_however_the_server_fails(server: WandbServer, ct: Path, tmp_path: Path, phase: str, fault: str):
    check_fault(server, ct, tmp_path, phase, fault)


def test_a_full_disk_under_wandb_stops_no_run(no_wandb_environment, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "wandb").write_text("a file where its folder should be")
    with track(config("offline"), tmp_path, rank=0) as tracker:
        tracker({"loss": 1.0}, step=1)
        tracker.show([], step=1)


def test_fields_that_are_sent_are_numbers_and_choices():
    """Free text could hold anything; a new field of that kind has to be left out."""

    def texts(kind: Any, path: str) -> list[str]:
        if isinstance(kind, type) and issubclass(kind, Config):
            return [
                found
                for name, field in kind.model_fields.items()
                for found in texts(field.annotation, f"{path}.{name}")
            ]
        if get_origin(kind) is Literal:
            return []
        if kind is str:
            return [path]
        return [found for inner in get_args(kind) for found in texts(inner, path)]

    fields = TrainConfig.model_fields
    assert [found for name in CONFIG_FIELDS for found in texts(fields[name].annotation, name)] == []
    assert texts(fields["shards"].annotation, "shards") == ["shards"], "the search finds what it looks for"
    assert allowed_config(config("offline")).keys() == set(CONFIG_FIELDS)


def test_metrics_that_are_sent_are_numbers_under_plain_names():
    odd = {"loss": 1, "sensitivity@0.5": 0.5, "nan": float("nan"), "Doe^Jane": 1.0, "note": CANARY, f"x {CANARY}": 2}
    assert allowed_metrics(odd) == {"loss": 1.0, "sensitivity@0.5": 0.5}


def test_a_report_is_kept_with_its_figures_and_no_path(no_wandb_environment, tmp_path: Path):
    picture = tmp_path / "froc.png"
    Image.new("RGB", (8, 8)).save(picture)
    folder = tmp_path / CANARY
    folder.mkdir()
    track_report(TrackingConfig(mode="offline"), "judged", folder, {"froc_mean/LUNA16": 0.5}, {"froc": picture})
    wandb.teardown()
    files = [path for path in (folder / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".png" for path in files)
    content = b"".join(path.read_bytes() for path in files)
    assert b"froc_mean/LUNA16" in content
    track_report(TrackingConfig(mode="disabled"), "judged", tmp_path / "none", {}, {})
    assert not (tmp_path / "none").exists()


def test_other_ranks_are_silent(tmp_path: Path):
    with track(config("offline"), tmp_path, rank=1) as tracker:
        tracker({"loss": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_run_is_passed_on(no_wandb_environment, tmp_path: Path):
    with pytest.raises(ZeroDivisionError), track(config("offline"), tmp_path, rank=0):
        raise ZeroDivisionError
