"""The exponential moving average of a model's weights: what is judged, saved and served in place of the last weights.

Buffers are averaged too: batch norm's running statistics belong to the weights that they were taken with. Counters are
copied.
"""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel

WARMUP = 10
"""The decay starts low, ``(1 + n) / (WARMUP + n)`` after n updates, so that the first weights are soon forgotten."""


def build_average(model: nn.Module, decay: float) -> AveragedModel:
    """The average of a model, not yet updated; ``.module`` is a model like it."""

    @torch.no_grad()
    def blend(averaged: PARAM_LIST, current: PARAM_LIST, updates: Tensor | int) -> None:
        number = torch.as_tensor(updates, dtype=torch.float64)
        kept = ((1 + number) / (WARMUP + number)).clamp(max=decay)
        for mean, now in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, (1 - kept).to(mean.dtype))
            else:
                mean.copy_(now)

    return AveragedModel(model, multi_avg_fn=blend, use_buffers=True)
