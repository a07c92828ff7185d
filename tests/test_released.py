from typing import get_args

import pytest
import torch

from mp3d.config import BackboneName, ModelConfig
from mp3d.errors import CheckpointError
from mp3d.models.backbone import KeySliceFPN, build_backbone
from mp3d.models.released import authors_name, authors_shapes, from_authors, match_backbone, our_name, to_authors
from mp3d.models.released_file import recognise, split_parts

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
    ("resnet3d50", "stage3.5.conv3.norm.bias", "layer3.5.bn3.bias"),
    ("resnet2d34", "stage3.5.conv2.conv.weight", "layer3.5.conv2.weight"),
    ("p3d63", "stage3.5.expand.conv.weight", "layer3.5.conv4.weight"),
]


def our_state(backbone: str, to_2d: str = "group", group_norm: bool = False) -> dict[str, torch.Tensor]:
    """A backbone with what the authors count to it, without memory for the weights."""
    norm = "gn3d" if group_norm or not backbone.startswith("resnet") else "bn"
    with torch.device("meta"):
        model = ModelConfig(backbone=backbone, norm=norm)
        if not backbone.startswith("mp3d"):
            return build_backbone(model).state_dict()
        neck = KeySliceFPN(build_backbone(model), taps=9, fpn_channels=1, to_2d=to_2d)
    conversion = {f"group_transforms.{key}": value for key, value in neck.group_transforms.state_dict().items()}
    return neck.backbone.state_dict() | conversion


@pytest.mark.parametrize(("backbone", "ours", "theirs"), SOME_NAMES)
def test_names(backbone, ours, theirs):
    assert authors_name(backbone, ours) == theirs
    assert our_name(backbone, theirs) == ours
    assert ours in our_state(backbone)


@pytest.mark.parametrize(
    ("backbone", "count"),
    [
        ("mp3d63", 211), ("mp3d18ba", 112), ("mp3d34ba", 208), ("mp3d18", 115), ("mp3d131", 415),
        ("p3d63", 207), ("p3d18ba", 108), ("p3d34ba", 204), ("p3d18", 111), ("p3d131", 411),
        ("resnet3d18", 120), ("resnet3d18_v1c", 132), ("resnet3d50", 318),
    ],
)  # fmt: skip
def test_every_tensor_has_its_own_name(backbone, count):
    ours = our_state(backbone)
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


@pytest.mark.parametrize(
    ("backbone", "count", "name"),
    [
        ("resnet3d18", 60, "gn1.weight"),
        ("resnet3d18_v1c", 66, "stem.0.gn.bias"),
        ("resnet3d50", 159, "layer1.0.gn3.bias"),
    ],
)
def test_group_norms_of_the_resnets(backbone, count, name):
    ours = our_state(backbone, group_norm=True)
    theirs = to_authors(backbone, ours, group_norm=True)
    assert name in theirs
    assert len(theirs) == count
    assert not any("bn" in key for key in theirs)
    assert set(from_authors(backbone, theirs)) == set(ours)
    with pytest.raises(CheckpointError, match=r"has no tensor 'bn1.weight'"):
        match_backbone(backbone, {key: tuple(value.shape) for key, value in theirs.items()} | {"bn1.weight": (64,)})


def test_dense_transforms_have_the_authors_names_and_number_of_weights():
    theirs = to_authors("mp3d63", our_state("mp3d63", to_2d="dense"))
    assert theirs["conv3d_all_4.weight"].shape == (2048, 2048, 9, 1, 1)
    assert len(theirs) == 211
    assert sum(value.numel() for value in theirs.values()) == 77_416_768


@pytest.mark.parametrize("backbone", [name for name in get_args(BackboneName) if not name.startswith("p3d")])
@pytest.mark.parametrize("group_norm", [False, True])
def test_every_backbone_is_recognised_by_its_names_and_shapes(backbone, group_norm):
    assert recognise(authors_shapes(backbone, group_norm)) == backbone


def test_other_networks_are_not_recognised():
    with pytest.raises(
        CheckpointError, match="not the weights of any backbone of ours; their keys begin with features.0"
    ):
        recognise({"features.0.weight": (64, 3, 3, 3), "features.0.bias": (64,)})


def test_a_counter_that_old_files_lack_is_not_missed():
    shapes = {key: shape for key, shape in authors_shapes("resnet3d18", False).items() if "num_batches" not in key}
    assert len(match_backbone("resnet3d18", shapes)) == 100


def test_parts_are_told_apart_behind_their_prefixes():
    names = ["module.backbone.conv1.weight", "module.backbone.layer1.0.conv1.weight", "module.neck.x", "module.fc.bias"]
    assert split_parts(names) == (
        {"conv1.weight": names[0], "layer1.0.conv1.weight": names[1]},
        {"neck.x": names[2], "fc.bias": names[3]},
    )
    assert split_parts(["conv1.weight", "head.fc.weight"]) == (
        {"conv1.weight": "conv1.weight"},
        {"head.fc.weight": "head.fc.weight"},
    )
    with pytest.raises(CheckpointError, match="'teacher.conv1.weight' belongs neither to a backbone nor to fc, head"):
        split_parts(["backbone.conv1.weight", "teacher.conv1.weight"])
