"""From a clip to 2D feature pyramids of its key slices: backbone, 3D features to 2D, feature pyramid network."""

import re
from collections import OrderedDict
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mp3d.config import ModelConfig
from mp3d.models.folded import conv_pixels
from mp3d.models.group_transform import CentreSlice, DenseTransform, GroupTransform, KeySlices, check_key_slices
from mp3d.models.mp3d import build_mp3d
from mp3d.models.p3d import build_p3d
from mp3d.models.resnet import FoldedResNet
from mp3d.models.resnet3d import build_resnet2d, build_resnet3d


def build_backbone(config: ModelConfig) -> FoldedResNet:
    """The backbone of a model, its first stages frozen as configured."""
    family, variant = re.split(r"(?<=[23]d)", config.backbone)
    depth: Any
    stem: Any
    depth, _, stem = variant.partition("_")
    match family:
        case "mp3d":
            backbone = build_mp3d(depth, config.width, config.norm, config.strides)
        case "p3d":
            backbone = build_p3d(depth, config.width, config.norm)
        case "resnet2d":
            backbone = build_resnet2d(depth, config.width, config.norm)
        case _:
            backbone = build_resnet3d(depth, stem or "7x7x7", config.width, config.norm, config.strides)
    backbone.z_padding = config.z_padding
    backbone.freeze(config.frozen_stages)
    return backbone


class KeySliceFPN(nn.Module):
    """Five 2D maps per key slice, ``"0"`` to ``"3"`` and ``"pool"``, strides 4 to 64 (authors' ``mp3d_groupconv.py``).

    Args:
        backbone: yields four 3D maps of every slice.
        taps: slices that a key slice is judged by.
        fpn_channels: channels of every map.
        to_2d: what makes one map of them.
        transform_taps: how many of them the transform weights, those in the middle; None: all.
    """

    def __init__(
        self,
        backbone: FoldedResNet,
        taps: int,
        fpn_channels: int,
        to_2d: Literal["group", "dense", "centre"] = "group",
        transform_taps: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.taps = backbone, taps
        weighted = transform_taps or taps
        match to_2d:
            case "group":
                transforms = [GroupTransform(channels, weighted) for channels in backbone.out_channels]
            case "dense":
                transforms = [DenseTransform(channels, weighted) for channels in backbone.out_channels]
            case "centre":
                transforms = [CentreSlice(taps) for _ in backbone.out_channels]
        self.group_transforms = nn.ModuleList(transforms)
        self.fpn = build_fpn(backbone, fpn_channels)
        self.out_channels = fpn_channels

    def forward(
        self, x: Float[Tensor, "n 1 d h w"], key_slices: KeySlices
    ) -> OrderedDict[str, Float[Tensor, "k c _ _"]]:
        """Maps of all key slices, in clip order; ``key_slices`` lists them for each clip.

        Raises:
            ValueError: a key slice with fewer than ``taps // 2`` slices on a side.
        """
        check_key_slices(key_slices, self.taps, depth=x.shape[2])
        maps = OrderedDict()
        for level, (transform, features) in enumerate(zip(self.group_transforms, self.backbone(x), strict=True)):
            maps[str(level)] = transform(features, key_slices)
        return self.fpn(maps)


class WindowFPN(nn.Module):
    """The same maps, of a backbone that answers for the middle slice of a window only; arguments as above."""

    def __init__(self, backbone: FoldedResNet, taps: int, fpn_channels: int) -> None:
        super().__init__()
        self.backbone, self.taps = backbone, taps
        self.fpn = build_fpn(backbone, fpn_channels)
        self.out_channels = fpn_channels

    def forward(
        self, x: Float[Tensor, "n 1 d h w"], key_slices: KeySlices
    ) -> OrderedDict[str, Float[Tensor, "k c _ _"]]:
        """Maps of all key slices, in clip order, each from a window of its own."""
        maps = OrderedDict()
        for level, features in enumerate(self.middle_slices(x, key_slices)):
            maps[str(level)] = features
        return self.fpn(maps)

    def middle_slices(self, x: Float[Tensor, "n 1 d h w"], key_slices: KeySlices) -> list[Float[Tensor, "k _ _ _"]]:
        """The four 2D maps of every key slice.

        Raises:
            ValueError: a key slice with fewer than ``taps // 2`` slices on a side.
        """
        check_key_slices(key_slices, self.taps, depth=x.shape[2])
        radius = self.taps // 2
        windows = [x[clip, :, key - radius : key + radius + 1] for clip, keys in enumerate(key_slices) for key in keys]
        return [features[:, :, features.shape[2] // 2] for features in self.backbone(torch.stack(windows))]


class PixelwiseFPN(FeaturePyramidNetwork):
    """torchvision's, with its 1 x 1 convolutions on the faster path."""

    def get_result_from_inner_blocks(self, x: Tensor, idx: int) -> Tensor:
        blocks: Any = self.inner_blocks
        conv = blocks[idx][0]
        return conv_pixels(x, conv.weight, conv.bias)


def build_fpn(backbone: FoldedResNet, channels: int) -> FeaturePyramidNetwork:
    return PixelwiseFPN(backbone.out_channels, channels, extra_blocks=LastLevelMaxPool())


def build_neck(config: ModelConfig, taps: int, fpn_channels: int) -> KeySliceFPN | WindowFPN:
    """Backbone and feature pyramids of a detector.

    Args:
        taps: slices that a key slice is judged by.
    """
    backbone = build_backbone(config)
    if backbone.keeps_z:
        return KeySliceFPN(backbone, taps, fpn_channels, config.to_2d or "group", config.transform_taps)
    return WindowFPN(backbone, taps, fpn_channels)
