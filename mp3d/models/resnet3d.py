"""ResNet3D-18: a 3D ResNet that keeps z (VDT paper; authors' ``mmcls`` file ``resnet3d.py``, ``depth_stride=False``).

Two stems. The published weights have one 7 x 7 x 7 convolution; on the three planes of a picture its first and last z
plane only ever see padding and get no gradient (6,272 of 21,952 weights). V1c, three 3 x 3 x 3 ones, has none such.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mp3d.models.folded import AlongZ, Conv, ConvNorm, Norm, NormKind
from mp3d.models.resnet import FoldedResNet, Stem, base_channels, build_resnet, scaled_norm

StemKind = Literal["7x7x7", "v1c"]

NUM_BLOCKS = (2, 2, 2, 2)


class BasicBlock3D(nn.Module):
    """Two 3 x 3 x 3 convolutions, the first strided in the plane; plus the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, (3, 3, 3), stride, norm=norm)
        self.conv2 = ConvNorm(channels, channels, (3, 3, 3), norm=norm)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = ConvNorm(in_channels, channels, (1, 1, 1), stride, norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], z: AlongZ) -> Float[Tensor, "_ o h2 w2"]:
        y = self.conv2(F.relu(self.conv1(x, z), inplace=True), z)
        return F.relu(z.add(x if self.shortcut is None else self.shortcut(x, z), y), inplace=True)


def build_stem(kind: StemKind, out_channels: int, norm: Norm) -> Stem:
    """From one channel to ``out_channels``; both stems halve rows and columns before the pool."""
    match kind:
        case "7x7x7":
            return Stem([ConvNorm(1, out_channels, (7, 7, 7), 2, norm=norm)])
        case "v1c":
            half = out_channels // 2
            return Stem(
                [
                    ConvNorm(1, half, (3, 3, 3), 2, norm=norm),
                    ConvNorm(half, half, (3, 3, 3), norm=norm),
                    ConvNorm(half, out_channels, (3, 3, 3), norm=norm),
                ]
            )


def build_resnet3d18(stem: StemKind = "7x7x7", width: float = 1.0, norm: NormKind = "slice_gn") -> FoldedResNet:
    """ResNet3D-18 for one input channel.

    Args:
        width: factor on every channel count.

    Raises:
        ConfigError: a width that leaves no channel.
    """
    base, scaled = base_channels(width), scaled_norm(norm, width)

    def block(index: int, in_channels: int, channels: int, stride: int) -> nn.Module:
        return BasicBlock3D(in_channels, channels, stride, scaled)

    backbone = build_resnet(build_stem(stem, base, scaled), NUM_BLOCKS, base, 1, block)
    for module in backbone.modules():
        if isinstance(module, Conv):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone
