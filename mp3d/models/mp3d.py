"""MP3D backbones: pseudo-3D ResNets that keep z (MP3D paper; authors' file ``modified_p3d.py``).

A 3D kernel is split into S (1 x 3 x 3, in the slice) and T (3 x 1 x 1, along z). The three kinds of block differ in how
S and T are joined; the kind is ``"ABC"[i % 3]`` for the i-th block of the whole network, so MP3D-63 runs ABC / ABCA /
BCABCA / BCA. Rows and columns are halved by the first convolution of stages 2, 3 and 4; slices never.

Differs from the paper: group norm may take its statistics per slice (``slice_gn``), and the first and last slice may be
replicated beyond the ends of a clip (``z_padding``), with the same weights.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mp3d.config import StrideConfig
from mp3d.models.folded import AlongZ, ConvNorm, Norm, NormKind
from mp3d.models.resnet import PUBLISHED_STRIDES, FoldedResNet, Stem, base_channels, build_resnet, scaled_norm

Depth = Literal["18ba", "34ba", "18", "63", "131"]

NUM_BLOCKS: dict[Depth, tuple[int, int, int, int]] = {
    "18ba": (2, 2, 2, 2),
    "34ba": (3, 4, 6, 3),
    "18": (2, 2, 2, 2),
    "63": (3, 4, 6, 3),
    "131": (3, 4, 23, 3),
}
"""Blocks of the four stages; ``ba`` networks have basic blocks, the others bottlenecks."""


class UnitA(nn.Module):
    """S, then T: ``T(S(x))``, each with norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv_s = ConvNorm(in_channels, channels, (1, 3, 3), stride, norm=norm)
        self.conv_t = ConvNorm(channels, channels, (3, 1, 1), norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        s = F.relu(self.conv_s(x, z), inplace=True)
        return F.relu(self.conv_t(s, z), inplace=True)


class UnitB(nn.Module):
    """S beside T: ``S(x) + T(x)``, each with norm and ReLU; both carry the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv_s = ConvNorm(in_channels, channels, (1, 3, 3), stride, norm=norm)
        self.conv_t = ConvNorm(in_channels, channels, (3, 1, 1), stride, norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        s = F.relu(self.conv_s(x, z), inplace=True)
        return z.add(s, F.relu(self.conv_t(x, z), inplace=True))


class UnitC(nn.Module):
    """S, then T on a branch: ``s + T(s)`` with ``s = S(x)``, each with norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv_s = ConvNorm(in_channels, channels, (1, 3, 3), stride, norm=norm)
        self.conv_t = ConvNorm(channels, channels, (3, 1, 1), norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        s = F.relu(self.conv_s(x, z), inplace=True)
        return z.add(s, F.relu(self.conv_t(s, z), inplace=True))


UNITS = (UnitA, UnitB, UnitC)


class Bottleneck(nn.Module):
    """1 x 1 x 1 (strided), one S-T unit, 1 x 1 x 1 to four times the channels; plus the shortcut."""

    expansion = 4

    def __init__(self, kind: int, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.reduce = ConvNorm(in_channels, channels, (1, 1, 1), stride, norm=norm)
        self.unit = UNITS[kind](channels, channels, 1, norm)
        self.expand = ConvNorm(channels, out_channels, (1, 1, 1), norm=norm)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, (1, 1, 1), stride, norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        y = F.relu(self.reduce(x, z), inplace=True)
        y = self.expand(self.unit(y, z), z)
        return F.relu(z.add(x if self.shortcut is None else self.shortcut(x, z), y), inplace=True)


class BasicBlock(nn.Module):
    """Two S-T units of the same kind, the first strided; plus the shortcut."""

    expansion = 1

    def __init__(self, kind: int, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.unit1 = UNITS[kind](in_channels, channels, stride, norm)
        self.unit2 = UNITS[kind](channels, channels, 1, norm)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = ConvNorm(in_channels, channels, (1, 1, 1), stride, norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        y = self.unit2(self.unit1(x, z), z)
        return F.relu(z.add(x if self.shortcut is None else self.shortcut(x, z), y), inplace=True)


def build_mp3d(
    depth: Depth,
    width: float = 1.0,
    norm: NormKind = "slice_gn",
    strides: StrideConfig = PUBLISHED_STRIDES,
    kind: type[FoldedResNet] = FoldedResNet,
) -> FoldedResNet:
    """An MP3D backbone for one input channel.

    Args:
        width: factor on every channel count.
        strides: only their pool may differ from the published ones.
        kind: what follows the stages.

    Raises:
        ConfigError: a width that leaves no channel.
    """
    base, scaled = base_channels(width), scaled_norm(norm, width)
    kind_of_block = BasicBlock if depth.endswith("ba") else Bottleneck

    def block(index: int, in_channels: int, channels: int, stride: int) -> nn.Module:
        return kind_of_block(index % len(UNITS), in_channels, channels, stride, scaled)

    stem = Stem([ConvNorm(1, base, (1, 7, 7), 2, norm=scaled)], strides)
    return build_resnet(stem, NUM_BLOCKS[depth], base, kind_of_block.expansion, block, strides, kind)
