"""A numeric check of a network without random numbers: weights filled from the authors' key, input from its index.

For the j-th element of a tensor whose key in the authors' state dict is k, ``a = cos(0.37 j + crc32(k) mod 1000)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from zlib import crc32

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6
"""Of every figure, in float64."""


@dataclass(frozen=True)
class Figures:
    """What the authors' network puts out; ``std`` is the unbiased one, ``middle`` starts at index numel // 2."""

    shape: tuple[int, ...]
    mean: float
    std: float
    max_abs: float
    first: tuple[float, ...]
    middle: tuple[float, ...]


def fill(module: nn.Module, authors_key: Callable[[str], str]) -> None:
    """Fills every floating-point parameter and buffer in place."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(_values(authors_key(key), tensor.shape).to(tensor))


def _values(key: str, shape: torch.Size) -> Tensor:
    a = torch.cos(0.37 * torch.arange(shape.numel(), dtype=torch.float64) + crc32(key.encode()) % 1000).view(shape)
    if len(shape) > 1:
        return a * sqrt(2 / (shape.numel() / shape[0]))
    if key.endswith("running_var"):
        return 1 + 0.2 * a**2
    if key.endswith("running_mean"):
        return 0.05 * a
    return 1 + 0.1 * a if key.endswith("weight") else 0.1 * a


def picture(*shape: int) -> Tensor:
    return torch.sin(0.01 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).view(shape)


def check(output: Tensor, figures: Figures) -> None:
    assert output.shape == figures.shape
    flat = output.detach().flatten()
    middle = len(flat) // 2
    ours = torch.stack([flat.mean(), flat.std(), flat.abs().max(), *flat[:5], *flat[middle : middle + 5]])
    theirs = [figures.mean, figures.std, figures.max_abs, *figures.first, *figures.middle]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=TOLERANCE)
