"""Optimiser and learning rate. The rate is a function of the step alone, so that a resumed run needs no scheduler
state.
"""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from mp3d.config import LoopConfig, OptimConfig

WARMUP_FACTOR = 1 / 3
"""The authors' linear warm-up starts from this share of the rate (``mp3d_groupconv.py``)."""

POLY_POWER = 0.9
"""Of the authors' segmentation recipes (CSPR ``medseg``)."""


def build_optimizer(parameters: Iterable[nn.Parameter], optim: OptimConfig) -> Optimizer:
    """Optimiser over the parameters that are trained."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if optim.algorithm == "sgd":
        return SGD(trained, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    algorithm = Adam if optim.algorithm == "adam" else AdamW
    return algorithm(trained, lr=optim.lr, weight_decay=optim.weight_decay)


def scaled_to_batch(optim: OptimConfig, clips_per_step: int) -> OptimConfig:
    """The rates that :attr:`OptimConfig.lr_batch` asks for: linear in the batch for SGD (Goyal et al. 2017), the square
    root of it for Adam (Malladi et al. 2022).
    """
    if optim.lr_batch is None:
        return optim
    factor = clips_per_step / optim.lr_batch
    if optim.algorithm != "sgd":
        factor = math.sqrt(factor)
    return optim.override({"lr": optim.lr * factor, "min_lr": optim.min_lr * factor})


def learning_rate(step: int, optim: OptimConfig, *, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of a step, counted from 0 over the whole run."""
    rate = optim.lr
    if optim.schedule == "step":
        rate *= optim.gamma ** sum(step // steps_per_epoch >= milestone for milestone in optim.milestones)
    elif optim.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs)))
        rate = optim.min_lr + (rate - optim.min_lr) * share
    elif optim.schedule == "poly":
        remaining = 1 - step / (steps_per_epoch * epochs)
        rate = optim.min_lr + (rate - optim.min_lr) * remaining**POLY_POWER
    if step < optim.warmup_steps:
        rate *= WARMUP_FACTOR + (1 - WARMUP_FACTOR) * step / optim.warmup_steps
    return rate


def steps_in_epoch(loop: LoopConfig, num_samples: int, world_size: int) -> int:
    """Steps of every epoch as long as so many workers train; an elastic run with fewer takes more.

    Args:
        num_samples: in one pass over the training split.
    """
    if loop.steps_per_epoch is not None:
        return max(1, loop.steps_per_epoch * loop.num_workers // world_size)
    return max(1, num_samples // (loop.step_clips * world_size))
