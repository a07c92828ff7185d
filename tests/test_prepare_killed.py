"""Killed at any moment and started again, the command ends with the very files of a run that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jobs import prepare as job
from mp3d.data.series import Volume
from mp3d.data.shard import MANIFEST
from mp3d.data.synthetic.dicom_files import write_ct_series

PATIENTS = 10
MOMENTS = [round(random.Random(seed).uniform(0, 0.8), 2) for seed in range(5)]
"""Shares of the files that a whole run leaves."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made patients in DICOM, one of whom lacks a slice."""
    root = tmp_path_factory.mktemp("world")
    for patient in range(PATIENTS):
        hu = np.random.default_rng(patient).integers(-1000, 1000, (40, 256, 256), dtype=np.int16)
        volume = Volume(hu, np.diag([0.8, 0.8, 2.5, 1.0]))
        write_ct_series(root / f"{patient}", volume, f"P{patient}", f"killed {patient}")
    (root / "3" / "000009.dcm").unlink()
    return root


def arguments(root: Path, out: Path, runner: str) -> list[str]:
    return ["--out", str(out), "--runner", runner, "--allowed-rejects", "1", "dicom", "--root", str(root)]


def start(root: Path, out: Path, runner: str) -> subprocess.Popen:
    """In a process of its own; on Ray, on that of the tests."""
    environment = dict(os.environ)
    if runner == "ray":
        import ray

        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    command = [sys.executable, "jobs/prepare.py", *arguments(root, out, runner)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def kill_behind(root: Path, out: Path, runner: str, num_files: int) -> None:
    """Start it and end it in the midst of what follows the file of that number; a busy machine may miss the moment."""
    for _ in range(5):
        process = start(root, out, runner)
        while process.poll() is None and (not out.exists() or len(finished_files(out)) < num_files):
            time.sleep(0.001)
        time.sleep(random.Random(num_files).uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (out / MANIFEST).exists():
            assert process.returncode == -signal.SIGKILL
            return
        shutil.rmtree(out)
    pytest.fail("it was over before it could be killed")


def finished_files(out: Path) -> list[str]:
    return [name for name in os.listdir(out) if not name.startswith(".")]


def content(out: Path) -> dict[str, bytes]:
    """Of the shards, and of what is told of the rejects beside them."""
    return {path.name: path.read_bytes() for path in (*out.iterdir(), *Path(f"{out}-private").iterdir())}


def check_killed_runs(root: Path, folder: Path, runner: str, moments: Sequence[float]) -> None:
    assert job.main(arguments(root, folder / "whole", runner)) == 0
    whole = content(folder / "whole")
    assert len(json.loads(whole["manifest.json"])["series"]) == PATIENTS - 1
    assert list(json.loads(whole["sources.json"]).values()) == ["3/000001.dcm"]
    num_files = len(finished_files(folder / "whole"))
    for moment in moments:
        out = folder / f"killed at {moment}"
        kill_behind(root, out, runner, 1 + int(moment * num_files))
        left = len(finished_files(out))
        assert 1 <= left < num_files
        assert job.main(arguments(root, out, runner)) == 0
        assert content(out) == whole, f"{left} of {num_files} files stood"


def test_two_moments(root, tmp_path):
    check_killed_runs(root, tmp_path, "local", MOMENTS[:2])


@pytest.mark.acceptance
@pytest.mark.parametrize("runner", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_five_moments(root, tmp_path, runner, request):
    if runner == "ray":
        request.getfixturevalue("ray_cluster")
    check_killed_runs(root, tmp_path, runner, MOMENTS)
