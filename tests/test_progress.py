"""What a terminal shows: something now and then where somebody watches, else one line an epoch."""

from pathlib import Path

import pytest
import torch

from mp3d import progress
from mp3d.config import LoopConfig
from mp3d.progress import Progress
from mp3d.session import PlainSession

LOSSES = {"loss": torch.tensor(0.25)}


def session(on_terminal: bool, rank: int = 0, world_size: int = 1) -> PlainSession:
    made = PlainSession(Path("run"), keep=1, device=torch.device("cpu"))
    made.on_terminal, made.rank, made.world_size = on_terminal, rank, world_size
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Two seconds a step."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def one_epoch(made: Progress, clock: list[float]) -> None:
    for _ in range(4):
        clock[0] += 2
        made.step(LOSSES, 0.01)
    made.end({"loss": 0.25, "froc_mean": 0.5})


def test_a_terminal_sees_step_speed_time_left_and_losses_in_one_place(clock, capsys: pytest.CaptureFixture[str]):
    one_epoch(Progress(session(True), LoopConfig(epochs=3, batch_size=8), 2, steps_per_epoch=4), clock)
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    drawn = shown.split("\r\x1b[K")
    assert drawn[1] == "epoch 2/3  step 1/4  4.0 clips/s  ETA 0:00:14  lr 0.01  loss 0.250"
    assert drawn[4].startswith("epoch 2/3  step 4/4  4.0 clips/s  ETA 0:00:08")  # those of the last epoch
    assert drawn[5] == "epoch 2/3  4 steps  4.0 clips/s  loss 0.25  froc_mean 0.5\n"


def test_without_a_terminal_there_is_one_line_an_epoch(clock, capsys: pytest.CaptureFixture[str]):
    one_epoch(Progress(session(False), LoopConfig(epochs=1, batch_size=8), 1, steps_per_epoch=4), clock)
    assert capsys.readouterr().out == "epoch 1/1  4 steps  4.0 clips/s  loss 0.25  froc_mean 0.5\n"


def test_of_several_workers_one_prints_whole_lines(clock, capsys: pytest.CaptureFixture[str]):
    loop = LoopConfig(epochs=1, batch_size=2, num_workers=4)
    one_epoch(Progress(session(True, 1, 4), loop, 1, steps_per_epoch=4), clock)
    assert capsys.readouterr().out == ""
    one_epoch(Progress(session(True, 0, 4), loop, 1, steps_per_epoch=4), clock)
    shown = capsys.readouterr().out
    assert "\r" not in shown
    assert [line.split("  ")[1] for line in shown.splitlines()] == ["step 3/4", "4 steps"]
    assert "4.0 clips/s" in shown


def test_memory_of_a_gpu_is_told(clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    made = session(False)
    made.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    one_epoch(Progress(made, LoopConfig(epochs=1), 1, steps_per_epoch=4), clock)
    assert capsys.readouterr().out.endswith("  GPU 3.0 GiB\n")
