"""From 3D features around a key slice to one 2D map (MP3D paper; ``conversion_type`` of ``modified_p3d.py``).

The group transform gives each channel its own weight per slice, ``y[c] = sum_t w[c, t] * x[c, key - taps // 2 + t]``:
C * taps weights where a dense convolution over z has C * C * taps. The authors write it as a grouped 1 x 1 convolution
of a window around its middle slice; the same weights slid over a longer slab answer for several key slices. The dense
convolution and the bare key slice are the paper's comparisons.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mp3d.models.folded import fold, from_columns

KeySlices = Sequence[Sequence[int]]
"""For each clip its key slices, indices along ``d``."""


class GroupTransform(nn.Module):
    """
    Args:
        channels: channels of the feature map.
        taps: slices weighted around a key slice, odd.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.taps = checked_taps(taps)
        # The shape of the authors' Conv2d(C * taps, C, 1, groups=C), so that their checkpoints load as they are.
        self.weight = nn.Parameter(torch.empty(channels, taps, 1, 1))
        nn.init.kaiming_uniform_(self.weight, a=sqrt(5))

    def forward(self, x: Float[Tensor, "n c d h w"], key_slices: KeySlices) -> Float[Tensor, "k c h w"]:
        """One map per key slice, in clip order.

        Raises:
            ValueError: a key slice with fewer than ``taps // 2`` slices on a side.
        """
        return at_key_slices(x, key_slices, self.taps, self.slide)

    def slide(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n*k c h w"]:
        """A map for every slice but the first and last ``taps // 2`` of each clip. On a CPU as a convolution of the
        columns, ten times faster than a product of matrices, which first has to bring the slices of a channel together;
        on a GPU, where cuDNN has a slow kernel for so many groups, as that product.
        """
        if x.is_cuda:
            return self.slide_by_products(x)
        maps = F.conv2d(x.flatten(3), self.weight.transpose(1, 2), groups=x.shape[1])
        return from_columns(maps, *x.shape[3:])

    def slide_by_products(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n*k c h w"]:
        """The same: a row of the matrix of a channel has the weights at the slices around one key slice."""
        depth = x.shape[2]
        num_keys = depth - self.taps + 1
        rows = F.pad(self.weight[:, :, 0, 0], (0, num_keys)).repeat(1, num_keys)[:, : num_keys * depth]
        maps = rows.unflatten(1, (num_keys, depth)) @ x.flatten(3)
        return fold(maps.unflatten(3, x.shape[3:])).contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, taps={self.taps}"


class DenseTransform(nn.Module):
    """A full taps x 1 x 1 convolution (the authors' ``conv3d``); arguments and errors as of the group transform."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.taps = checked_taps(taps)
        self.conv = nn.Conv3d(channels, channels, (taps, 1, 1), bias=False)

    def forward(self, x: Float[Tensor, "n c d h w"], key_slices: KeySlices) -> Float[Tensor, "k c h w"]:
        """One map per key slice, in clip order."""
        return at_key_slices(x, key_slices, self.taps, self.slide)

    def slide(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n*k c h w"]:
        """A map for every slice but the first and last ``taps // 2`` of each clip."""
        return from_columns(F.conv2d(x.flatten(3), self.conv.weight.squeeze(4)), *x.shape[3:])


class CentreSlice(nn.Module):
    """The features of the key slice as they are (``center_crop``); it still asks for the slices of a window."""

    def __init__(self, taps: int) -> None:
        super().__init__()
        self.taps = checked_taps(taps)

    def forward(self, x: Float[Tensor, "n c d h w"], key_slices: KeySlices) -> Float[Tensor, "k c h w"]:
        """One map per key slice, in clip order."""
        return at_key_slices(x, key_slices, self.taps, self.slide)

    def slide(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n*k c h w"]:
        """Every slice but the first and last ``taps // 2`` of each clip."""
        return fold(x[:, :, self.taps // 2 : x.shape[2] - self.taps // 2])


def at_key_slices(
    x: Float[Tensor, "n c d h w"],
    key_slices: KeySlices,
    taps: int,
    slide: Callable[[Float[Tensor, "n c _ h w"]], Float[Tensor, "_ c h w"]],
) -> Float[Tensor, "k c h w"]:
    """What ``slide`` makes of the slices between the first and the last key slice, of which the key slices are taken.

    Raises:
        ValueError: a key slice with fewer than ``taps // 2`` slices on a side.
    """
    check_key_slices(key_slices, taps, depth=x.shape[2])
    first = min(min(keys) for keys in key_slices)
    last = max(max(keys) for keys in key_slices)
    maps = slide(x[:, :, first - taps // 2 : last + taps // 2 + 1])
    wanted = [clip * (last - first + 1) + key - first for clip, keys in enumerate(key_slices) for key in keys]
    if wanted == list(range(len(maps))):
        return maps
    return maps.permute(0, 2, 3, 1)[wanted].permute(0, 3, 1, 2)


def checked_taps(taps: int) -> int:
    """Raises: ValueError where there is no middle slice."""
    if taps % 2 == 0:
        raise ValueError(f"taps is {taps}; it must be odd so that the key slice is in the middle")
    return taps


def check_key_slices(key_slices: KeySlices, taps: int, depth: int) -> None:
    """Raises: ValueError where a key slice has fewer than ``taps // 2`` slices on a side."""
    if depth < taps:
        raise ValueError(f"the group transform needs at least {taps} slices, and the clips have {depth}")
    radius = taps // 2
    for clip, keys in enumerate(key_slices):
        for key in keys:
            if not radius <= key < depth - radius:
                raise ValueError(
                    f"key slice {key} of clip {clip} needs {radius} slices on each side, and the clip has {depth}; "
                    f"use key slices {radius} to {depth - radius - 1}"
                )
