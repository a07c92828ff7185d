"""W&B can neither stop a run nor leak."""

import socket
import time
from pathlib import Path

import pytest
import wandb
from PIL import Image

from mp3d.config import TrackingConfig, TrainConfig
from mp3d.tracking import track, track_report, tracking_mode

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


def test_an_unreachable_server_costs_seconds_and_nothing_else(
    no_wandb_environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as closed:  # bound, never listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        started = time.monotonic()
        with track(config("online"), tmp_path, rank=0) as tracker:
            tracker({"loss": 1.0}, step=1)
        assert time.monotonic() - started < 30
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_other_ranks_are_silent(tmp_path: Path):
    with track(config("offline"), tmp_path, rank=1) as tracker:
        tracker({"loss": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_run_is_passed_on(no_wandb_environment, tmp_path: Path):
    with pytest.raises(ZeroDivisionError), track(config("offline"), tmp_path, rank=0):
        raise ZeroDivisionError
