"""Group transform: 3D features around a key slice become one 2D map (MP3D paper; ``groupconv``, ``modified_p3d.py``).

Each channel has its own weight per slice, ``y[c] = sum_t w[c, t] * x[c, key - taps // 2 + t]``: C * taps weights where
a dense convolution over z would have C * C * taps. The authors write it as a grouped 1 x 1 convolution of a window
around its middle slice; the same weights slid over a longer slab answer for several key slices.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GroupTransform(nn.Module):
    """
    Args:
        channels: channels of the feature map.
        taps: slices weighted around a key slice, odd.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        if taps % 2 == 0:
            raise ValueError(f"taps is {taps}; it must be odd so that the key slice is in the middle")
        self.taps = taps
        # The shape of the authors' Conv2d(C * taps, C, 1, groups=C), so that their checkpoints load as they are.
        self.weight = nn.Parameter(torch.empty(channels, taps, 1, 1))
        nn.init.kaiming_uniform_(self.weight, a=sqrt(5))

    def forward(self, x: Float[Tensor, "n c d h w"], key_slices: Sequence[Sequence[int]]) -> Float[Tensor, "k c h w"]:
        """One map per key slice, in clip order.

        Args:
            key_slices: for each clip its key slices, indices along ``d``.

        Raises:
            ValueError: a key slice with fewer than ``taps // 2`` slices on a side.
        """
        self._check(key_slices, depth=x.shape[2])
        band = (self.weight.flatten(1) @ self._placement(key_slices, x.shape[2])).transpose(1, 2)
        maps = torch.matmul(band, x.flatten(3)).transpose(1, 2).unflatten(3, x.shape[3:])
        most = maps.shape[1]
        if all(len(keys) == most for keys in key_slices):
            return maps.flatten(0, 1)
        return torch.cat([clip_maps[: len(keys)] for clip_maps, keys in zip(maps, key_slices, strict=True)])

    def _placement(self, key_slices: Sequence[Sequence[int]], depth: int) -> Float[Tensor, "n j t d"]:
        """1 where tap t of a clip's j-th key slice reads slice d; clips with fewer key slices end in zeros."""
        most = max(len(keys) for keys in key_slices)
        placement = torch.zeros(len(key_slices), most, self.taps, depth)
        for clip, keys in enumerate(key_slices):
            for row, key in enumerate(keys):
                first = key - self.taps // 2
                placement[clip, row, :, first : first + self.taps].fill_diagonal_(1)
        return placement.to(self.weight)

    def _check(self, key_slices: Sequence[Sequence[int]], depth: int) -> None:
        if depth < self.taps:
            raise ValueError(f"the group transform needs at least {self.taps} slices, and the clips have {depth}")
        radius = self.taps // 2
        for clip, keys in enumerate(key_slices):
            for key in keys:
                if not radius <= key < depth - radius:
                    raise ValueError(
                        f"key slice {key} of clip {clip} needs {radius} slices on each side, and the clip has {depth}; "
                        f"use key slices {radius} to {depth - radius - 1}"
                    )

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, taps={self.taps}"
