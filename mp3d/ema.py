"""The exponential moving average of a model's weights: what is judged, saved and served in place of the last weights.

Buffers are averaged too: batch norm's running statistics belong to the weights that they were taken with. Counters are
copied.
"""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

WARMUP = 10
"""The decay starts low, ``(1 + n) / (WARMUP + n)`` after n updates, so that the first weights are soon forgotten."""


def build_average(model: nn.Module, decay: float) -> AveragedModel:
    """The average of a model, not yet updated; ``.module`` is a model like it."""

    @torch.no_grad()
    def blend(averaged: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        kept = torch.minimum(updates.new_tensor(decay, dtype=torch.float64), (1 + updates) / (WARMUP + updates))
        for mean, now in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, (1 - kept).to(mean.dtype))
            else:
                mean.copy_(now)

    return AveragedModel(model, multi_avg_fn=blend, use_buffers=True)
