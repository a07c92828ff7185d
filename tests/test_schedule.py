"""The learning rate as a function of the step."""

import pytest
import torch

from mp3d.config import OptimConfig
from mp3d.schedule import build_optimizer, learning_rate

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
