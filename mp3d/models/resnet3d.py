"""Plain ResNets in 3D, and in 2D for comparison (VDT paper; authors' ``mmcls`` and ``mmseg`` files ``resnet3d.py``).

Two stems. The published weights have one 7 x 7 x 7 convolution; on the three planes of a picture its first and last z
plane only ever see padding and get no gradient (6,272 of 21,952 weights). V1c, three 3 x 3 x 3 ones, has none such.

Strides along z are a choice: none for pre-training and detection (``depth_stride=False``), as in the plane for nodules
(``True``). The stride of a bottleneck sits on its 3 x 3 x 3 convolution, as in torchvision.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mp3d.config import StrideConfig
from mp3d.models.folded import AlongZ, Conv, ConvNorm, Norm, NormKind, WholeClips, unfold
from mp3d.models.resnet import PUBLISHED_STRIDES, FoldedResNet, Stem, base_channels, build_resnet, scaled_norm

Depth = Literal["18", "34", "50"]
StemKind = Literal["7x7x7", "v1c"]

NUM_BLOCKS: dict[Depth, tuple[int, int, int, int]] = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3)}
"""Blocks of the four stages; 50 has bottlenecks, the others basic blocks."""
PLANES_OF_A_PICTURE = 3
"""Slices that the 2D networks read as colours."""


class BasicBlock3D(nn.Module):
    """Two cubic convolutions, the first strided; plus the shortcut.

    Args:
        z_stride: of the first convolution along z; ``stride`` is in the plane.
        kz: slices of the kernels: 3, or 1 in a 2D network.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, norm: Norm, z_stride: int = 1, kz: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, (kz, 3, 3), stride, z_stride, norm=norm)
        self.conv2 = ConvNorm(channels, channels, (kz, 3, 3), norm=norm)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = ConvNorm(in_channels, channels, (1, 1, 1), stride, z_stride, norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        y = self.conv2(F.relu(self.conv1(x, z), inplace=True), z)
        return F.relu(z.add(x if self.shortcut is None else self.shortcut(x, z), y), inplace=True)


class Bottleneck3D(nn.Module):
    """1 x 1 x 1, cubic and strided, 1 x 1 x 1 to four times the channels; plus the shortcut. Arguments as above."""

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, norm: Norm, z_stride: int = 1, kz: int = 3
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = ConvNorm(in_channels, channels, (1, 1, 1), norm=norm)
        self.conv2 = ConvNorm(channels, channels, (kz, 3, 3), stride, z_stride, norm=norm)
        self.conv3 = ConvNorm(channels, out_channels, (1, 1, 1), norm=norm)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, (1, 1, 1), stride, z_stride, norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        y = F.relu(self.conv1(x, z), inplace=True)
        y = self.conv3(F.relu(self.conv2(y, z), inplace=True), z)
        return F.relu(z.add(x if self.shortcut is None else self.shortcut(x, z), y), inplace=True)


class PseudoColourResNet(FoldedResNet):
    """A 2D network that reads the three slices of a clip as the colours of one picture (the 2.5D way)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.keeps_z = False

    def forward(self, x: Float[Tensor, "n 1 d h w"]) -> list[Float[Tensor, "n _ 1 _ _"]]:
        """The outputs of stage 1 to 4, for the middle slice."""
        colours = x[:, 0].contiguous(memory_format=torch.channels_last)
        return [unfold(features, 1) for features in self.run(colours, WholeClips(len(x)))]


def build_stem(kind: StemKind, out_channels: int, norm: Norm, strides: StrideConfig = PUBLISHED_STRIDES) -> Stem:
    """From one channel to ``out_channels``."""
    plane, along_z = strides.stem, strides.stem if strides.isotropic else 1
    match kind:
        case "7x7x7":
            return Stem([ConvNorm(1, out_channels, (7, 7, 7), plane, along_z, norm=norm)], strides)
        case "v1c":
            half = out_channels // 2
            layers = [
                ConvNorm(1, half, (3, 3, 3), plane, along_z, norm=norm),
                ConvNorm(half, half, (3, 3, 3), norm=norm),
                ConvNorm(half, out_channels, (3, 3, 3), norm=norm),
            ]
            return Stem(layers, strides)


def build_resnet3d(
    depth: Depth = "18",
    stem: StemKind = "7x7x7",
    width: float = 1.0,
    norm: NormKind = "slice_gn",
    strides: StrideConfig = PUBLISHED_STRIDES,
) -> FoldedResNet:
    """A 3D ResNet for one input channel.

    Args:
        width: factor on every channel count.

    Raises:
        ConfigError: a width that leaves no channel.
    """
    base, scaled = base_channels(width), scaled_norm(norm, width)
    kind_of_block = Bottleneck3D if depth == "50" else BasicBlock3D

    def block(index: int, in_channels: int, channels: int, stride: int) -> nn.Module:
        return kind_of_block(in_channels, channels, stride, scaled, stride if strides.isotropic else 1)

    stem_layers = build_stem(stem, base, scaled, strides)
    return _initialised(build_resnet(stem_layers, NUM_BLOCKS[depth], base, kind_of_block.expansion, block, strides))


def build_resnet2d(depth: Depth = "50", width: float = 1.0, norm: NormKind = "slice_gn") -> FoldedResNet:
    """A 2D ResNet for clips of three slices, with torchvision's layers.

    Args:
        width: factor on every channel count.

    Raises:
        ConfigError: a width that leaves no channel.
    """
    base, scaled = base_channels(width), scaled_norm(norm, width)
    kind_of_block = Bottleneck3D if depth == "50" else BasicBlock3D

    def block(index: int, in_channels: int, channels: int, stride: int) -> nn.Module:
        return kind_of_block(in_channels, channels, stride, scaled, kz=1)

    strides = StrideConfig(pool="1x3x3")
    stem = Stem([ConvNorm(PLANES_OF_A_PICTURE, base, (1, 7, 7), 2, norm=scaled)], strides)
    expansion = kind_of_block.expansion
    return _initialised(build_resnet(stem, NUM_BLOCKS[depth], base, expansion, block, strides, PseudoColourResNet))


def _initialised(backbone: FoldedResNet) -> FoldedResNet:
    for module in backbone.modules():
        if isinstance(module, Conv):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone
