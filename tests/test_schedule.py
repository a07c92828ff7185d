"""The learning rate as a function of the step."""

import pytest
import torch
from pydantic import ValidationError

from mp3d.config import LoopConfig, OptimConfig
from mp3d.schedule import build_optimizer, learning_rate, steps_in_epoch

SPAN = {"steps_per_epoch": 1000, "epochs": 24}


def test_the_authors_schedule():
    optim = OptimConfig()
    assert learning_rate(0, optim, **SPAN) == pytest.approx(0.02 / 3)
    assert learning_rate(250, optim, **SPAN) == pytest.approx(0.02 * 2 / 3)
    assert learning_rate(500, optim, **SPAN) == 0.02
    assert learning_rate(15_999, optim, **SPAN) == 0.02
    assert learning_rate(16_000, optim, **SPAN) == pytest.approx(0.002)
    assert learning_rate(22_000, optim, **SPAN) == pytest.approx(0.0002)


def test_cosine_falls_to_nearly_zero():
    optim = OptimConfig(schedule="cosine", warmup_steps=0, lr=0.1)
    rates = [learning_rate(step, optim, **SPAN) for step in range(0, 24_000, 100)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(12_000, optim, **SPAN) == pytest.approx(0.05)
    assert learning_rate(23_999, optim, **SPAN) < 1e-6


def test_frozen_parameters_are_not_handed_to_the_optimiser():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    (group,) = build_optimizer(layer.parameters(), OptimConfig()).param_groups
    assert group["params"] == [layer.weight]


@pytest.mark.parametrize(("steps", "expected"), [(None, [25, 50, 101]), (30, [30, 60, 120])])
def test_an_elastic_epoch_has_the_same_samples_whoever_is_left(steps: int | None, expected: list[int]):
    loop = LoopConfig(steps_per_epoch=steps, batch_size=2, num_workers=4, min_workers=1)
    assert [steps_in_epoch(loop, 203, world_size) for world_size in (4, 2, 1)] == expected
    assert steps_in_epoch(LoopConfig(batch_size=64, num_workers=4), 3, 4) == 1


def test_no_more_workers_are_needed_than_there_are():
    with pytest.raises(ValidationError, match="min_workers is 3, above num_workers, which is 2"):
        LoopConfig(num_workers=2, min_workers=3)
