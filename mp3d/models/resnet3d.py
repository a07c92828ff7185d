"""ResNet3D-18: a 3D ResNet that keeps z (VDT paper; authors' ``mmcls`` file ``resnet3d.py``, ``depth_stride=False``).

Two stems. The published weights have one 7 x 7 x 7 convolution; on the three planes of a picture its first and last z
plane only ever see padding and get no gradient (6,272 of 21,952 weights). V1c, three 3 x 3 x 3 ones, has none such.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mp3d.models.folded import Conv, ConvNorm, NormKind
from mp3d.models.resnet import STAGE_WIDTHS, FoldedResNet, Stem, base_channels

StemKind = Literal["7x7x7", "v1c"]

NUM_BLOCKS = (2, 2, 2, 2)


class BasicBlock3D(nn.Module):
    """Two 3 x 3 x 3 convolutions, the first strided in the plane; plus the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: NormKind) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, (3, 3, 3), stride, norm=norm)
        self.conv2 = ConvNorm(channels, channels, (3, 3, 3), norm=norm)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = ConvNorm(in_channels, channels, (1, 1, 1), stride, norm=norm)

    def forward(self, x: Float[Tensor, "nd c h w"], depth: int) -> Float[Tensor, "nd o h2 w2"]:
        y = self.conv2(F.relu(self.conv1(x, depth), inplace=True), depth)
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x, depth)), inplace=True)


def build_stem(kind: StemKind, out_channels: int, norm: NormKind) -> Stem:
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
        ConfigError: a width that leaves no channels.
    """
    in_channels = base_channels(width)
    first = build_stem(stem, in_channels, norm)
    stages, out_channels = [], []
    for stage, num_blocks in enumerate(NUM_BLOCKS):
        channels = base_channels(width) * STAGE_WIDTHS[stage] // STAGE_WIDTHS[0]
        blocks = []
        for position in range(num_blocks):
            stride = 2 if stage > 0 and position == 0 else 1
            blocks.append(BasicBlock3D(in_channels, channels, stride, norm))
            in_channels = channels
        stages.append(blocks)
        out_channels.append(channels)
    backbone = FoldedResNet(first, stages, out_channels)
    for module in backbone.modules():
        if isinstance(module, Conv):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone
