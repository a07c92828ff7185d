"""From a clip to 2D feature pyramids of its key slices: 3D backbone, group transforms, feature pyramid network."""

from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mp3d.config import ModelConfig
from mp3d.models.group_transform import GroupTransform
from mp3d.models.mp3d import build_mp3d
from mp3d.models.resnet import FoldedResNet
from mp3d.models.resnet3d import build_resnet3d18


def build_backbone(config: ModelConfig) -> FoldedResNet:
    """The 3D backbone of a model, its first stages frozen as configured."""
    match config.backbone:
        case "mp3d63":
            backbone = build_mp3d("63", config.width, config.norm)
        case "mp3d18ba":
            backbone = build_mp3d("18ba", config.width, config.norm)
        case "resnet3d18":
            backbone = build_resnet3d18("7x7x7", config.width, config.norm)
        case "resnet3d18_v1c":
            backbone = build_resnet3d18("v1c", config.width, config.norm)
    backbone.freeze(config.frozen_stages)
    return backbone


class KeySliceFPN(nn.Module):
    """Five 2D maps per key slice, ``"0"`` to ``"3"`` and ``"pool"``, strides 4 to 64 (authors' ``mp3d_groupconv.py``).

    Args:
        backbone: yields four 3D maps.
        taps: slices that a group transform weights around a key slice.
        fpn_channels: channels of every map.
    """

    def __init__(self, backbone: FoldedResNet, taps: int, fpn_channels: int) -> None:
        super().__init__()
        self.backbone, self.taps = backbone, taps
        self.group_transforms = nn.ModuleList(GroupTransform(channels, taps) for channels in backbone.out_channels)
        self.fpn = FeaturePyramidNetwork(backbone.out_channels, fpn_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = fpn_channels

    def forward(
        self, x: Float[Tensor, "n 1 d h w"], key_slices: Sequence[Sequence[int]]
    ) -> OrderedDict[str, Float[Tensor, "k c _ _"]]:
        """Maps of all key slices, in clip order; ``key_slices`` lists them for each clip."""
        maps = OrderedDict()
        for level, (transform, features) in enumerate(zip(self.group_transforms, self.backbone(x), strict=True)):
            maps[str(level)] = transform(features, key_slices)
        return self.fpn(maps)
