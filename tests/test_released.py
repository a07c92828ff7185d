from typing import get_args

import pytest
import torch

from mp3d.config import BackboneName, ModelConfig
from mp3d.models.backbone import KeySliceFPN, build_backbone
from mp3d.models.released import authors_name, our_name

SOME_NAMES = [
    ("mp3d63", "stem.layers.0.conv.weight", "conv1_custom.weight"),
    ("mp3d63", "stem.layers.0.norm.bias", "norm1.bias"),
    ("mp3d63", "stage1.0.shortcut.conv.weight", "layer1.0.downsample.0.weight"),
    ("mp3d63", "stage3.5.reduce.norm.weight", "layer3.5.norm_1.weight"),
    ("mp3d63", "stage3.5.unit.conv_s.conv.weight", "layer3.5.conv2.weight"),
    ("mp3d63", "stage3.5.unit.conv_t.conv.weight", "layer3.5.conv3.weight"),
    ("mp3d63", "stage3.5.expand.conv.weight", "layer3.5.conv4.weight"),
    ("mp3d63", "group_transforms.3.weight", "groupconv_4.weight"),
    ("mp3d18ba", "stage4.1.unit1.conv_t.norm.weight", "layer4.1.norm_2.weight"),
    ("mp3d18ba", "stage4.1.unit2.conv_s.conv.weight", "layer4.1.conv3.weight"),
    ("resnet3d18", "stem.layers.0.norm.running_mean", "bn1.running_mean"),
    ("resnet3d18", "stage2.0.conv2.norm.num_batches_tracked", "layer2.0.bn2.num_batches_tracked"),
    ("resnet3d18_v1c", "stem.layers.2.norm.weight", "stem.2.bn.weight"),
    ("resnet3d18_v1c", "stage2.0.shortcut.norm.weight", "layer2.0.downsample.1.weight"),
]


def our_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    norm = "gn3d" if backbone.startswith("mp3d") else "bn"
    with torch.device("meta"):
        neck = KeySliceFPN(build_backbone(ModelConfig(backbone=backbone, norm=norm)), taps=9, fpn_channels=1)
    shapes = {key: tuple(value.shape) for key, value in neck.backbone.state_dict().items()}
    if backbone.startswith("mp3d"):
        shapes |= {f"group_transforms.{k}": tuple(v.shape) for k, v in neck.group_transforms.state_dict().items()}
    return shapes


@pytest.mark.parametrize(("backbone", "ours", "theirs"), SOME_NAMES)
def test_names(backbone, ours, theirs):
    assert authors_name(backbone, ours) == theirs
    assert our_name(backbone, theirs) == ours
    assert ours in our_shapes(backbone)


@pytest.mark.parametrize(
    ("backbone", "count"), [("mp3d63", 211), ("mp3d18ba", 112), ("resnet3d18", 120), ("resnet3d18_v1c", 132)]
)
def test_every_tensor_has_its_own_name(backbone, count):
    ours = our_shapes(backbone)
    theirs = {authors_name(backbone, key) for key in ours}
    assert len(theirs) == len(ours) == count
    assert {our_name(backbone, key) for key in theirs} == set(ours)


@pytest.mark.parametrize("backbone", get_args(BackboneName))
@pytest.mark.parametrize("key", ["fc.weight", "stage5.0.conv1.conv.weight", "stage1.0.conv9.conv.weight", ""])
def test_unknown_keys_are_refused(backbone, key):
    with pytest.raises(ValueError, match="has no tensor"):
        authors_name(backbone, key)
    with pytest.raises(ValueError, match="has no tensor"):
        our_name(backbone, key)
