"""Hosts of the loop: which device a trial takes, which checkpoints are kept."""

from pathlib import Path

import pytest
import ray
import torch

from mp3d.session import TuneSession


@pytest.mark.parametrize(("given", "device"), [([], "cpu"), ([3], "cuda")])
def test_a_trial_takes_the_gpu_that_ray_gave_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[int], device: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: given)
    assert TuneSession(tmp_path, keep=1).device == torch.device(device)
