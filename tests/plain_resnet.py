"""The authors' ResNets as plain functions of a state dict under their names: an oracle without our layers."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from mp3d.config import StrideConfig

State = Mapping[str, Tensor]


def resnet3d(state: State, x: Tensor, strides: StrideConfig, v1c: bool = False) -> list[Tensor]:
    """The outputs of the four stages, batch norm in evaluation mode."""
    stem = _along(strides.stem, strides)
    if v1c:
        for layer in range(3):
            x = _norm(state, f"stem.{layer}.bn", _conv(state, f"stem.{layer}.conv", x, stem if layer == 0 else 1))
            x = F.relu(x)
    else:
        x = F.relu(_norm(state, "bn1", _conv(state, "conv1", x, stem)))
    match strides.pool:
        case "3x3x3":
            x = F.max_pool3d(x, 3, _along(2, strides), 1)
        case "1x3x3":
            x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    outputs = []
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            x = _block(
                state, f"layer{stage}.{block}", x, _along(strides.stages[stage - 1] if block == 0 else 1, strides)
            )
            block += 1
        outputs.append(x)
    return outputs


def _block(state: State, name: str, x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    is_bottleneck = f"{name}.conv3.weight" in state
    layers = 3 if is_bottleneck else 2
    strided = 2 if is_bottleneck else 1
    y = x
    for layer in range(1, layers + 1):
        y = _conv(state, f"{name}.conv{layer}", y, stride if layer == strided else 1)
        y = _norm(state, f"{name}.bn{layer}", y)
        y = F.relu(y) if layer < layers else y
    if f"{name}.downsample.0.weight" in state:
        x = _norm(state, f"{name}.downsample.1", _conv(state, f"{name}.downsample.0", x, stride))
    return F.relu(x + y)


def _conv(state: State, name: str, x: Tensor, stride: int | tuple[int, int, int]) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv3d(x, weight, stride=stride, padding=tuple(size // 2 for size in weight.shape[2:]))


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias)


def _along(stride: int, strides: StrideConfig) -> tuple[int, int, int]:
    return (stride if strides.isotropic else 1, stride, stride)
