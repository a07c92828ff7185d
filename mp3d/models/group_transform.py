"""Group transform: 3D features around a key slice become one 2D map (MP3D paper; ``groupconv``, ``modified_p3d.py``).

Each channel has its own weight per slice, ``y[c] = sum_t w[c, t] * x[c, key - taps // 2 + t]``: C * taps weights where
a dense convolution over z would have C * C * taps. The authors write it as a grouped 1 x 1 convolution of a window
around its middle slice; the same weights slid over a longer slab answer for several key slices.
"""

from collections.abc import Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mp3d.models.folded import from_columns


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
        first = min(min(keys) for keys in key_slices)
        last = max(max(keys) for keys in key_slices)
        maps = self.slide(x[:, :, first - self.taps // 2 : last + self.taps // 2 + 1])
        wanted = [clip * (last - first + 1) + key - first for clip, keys in enumerate(key_slices) for key in keys]
        if wanted == list(range(len(maps))):
            return maps
        return maps.permute(0, 2, 3, 1)[wanted].permute(0, 3, 1, 2)

    def slide(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n*k c h w"]:
        """A map for every slice but the first and last ``taps // 2`` of each clip, as a convolution of the columns: on
        a CPU ten times faster than a product of matrices, which first has to bring the slices of a channel together.
        """
        maps = F.conv2d(x.flatten(3), self.weight.transpose(1, 2), groups=x.shape[1])
        return from_columns(maps, *x.shape[3:])

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
