from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models._utils import IntermediateLayerGetter

from mp3d.config import ClassificationHead, ModelConfig, StrideConfig
from mp3d.models.backbone import build_backbone
from mp3d.models.folded import Norm, WholeClips, fold, unfold
from mp3d.models.released import authors_name, match_backbone, to_authors
from mp3d.models.resnet3d import BasicBlock3D, build_resnet2d, build_resnet3d, build_stem
from tests import formula, plain_resnet
from tests.formula import Figures
from tests.test_mp3d import clip, num_parameters, randomised, reference

V1C = Figures(
    (1, 512, 3, 2, 2), 0.364355996053822, 0.424826550549, 1.371794097063,
    (0.001620402149, 0.002419268599, 0.004315094113, 0.005155462089, 0.001945902423),
    (0.115307962069, 0.110456203665, 0.106385272799, 0.107623277858, 0.127103815273),
)  # fmt: skip
"""Output of the authors' code on the formula picture of 3 x 64 x 64."""


@pytest.mark.parametrize(
    ("depth", "stem", "expected"),
    [("18", "7x7x7", 33_160_000), ("18", "v1c", 33_221_984), ("50", "7x7x7", 46_155_072)],
)
def test_parameter_counts_of_the_authors(depth, stem, expected):
    with torch.device("meta"):
        assert num_parameters(build_resnet3d(depth, stem)) == expected


STRIDES = {
    "pre-training and detection": StrideConfig(),
    "nodule classification": StrideConfig(isotropic=True),
    "nodule segmentation": StrideConfig(stem=1, pool="none", stages=(1, 2, 1, 2), isotropic=True),
    "liver segmentation": StrideConfig(stem=1, isotropic=True),
    "slices kept apart in the pool": StrideConfig(pool="1x3x3"),
    "no pool, z kept": StrideConfig(pool="none", stages=(2, 1, 2, 1)),
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("name", ["resnet3d18", "resnet3d34_v1c", "resnet3d50", "resnet3d50_v1c"])
def test_networks_equal_plain_functions_of_the_authors_state(name, strides):
    model = ModelConfig(backbone=name, width=0.0625, norm="bn", strides=strides, head=ClassificationHead(num_classes=2))
    backbone = build_backbone(model).double().eval()
    formula.fill(backbone, partial(authors_name, name))
    x = clip(2, 1, 7, 24, 40)
    with torch.no_grad():
        ours = backbone(x)
        theirs = plain_resnet.resnet3d(to_authors(name, backbone.state_dict()), x, strides, v1c="v1c" in name)
    for a, b, stride in zip(ours, theirs, backbone.strides, strict=True):
        torch.testing.assert_close(a, b)
        assert a.shape[3:] == (-(-24 // stride), -(-40 // stride))


@pytest.mark.parametrize(
    ("strides", "size", "expected"),
    [
        ("nodule classification", (48, 48, 48), [(12,) * 3, (6,) * 3, (3,) * 3, (2,) * 3]),
        ("nodule segmentation", (48, 48, 48), [(48,) * 3, (24,) * 3, (24,) * 3, (12,) * 3]),
        ("liver segmentation", (32, 256, 256), [(16, 128, 128), (8, 64, 64), (4, 32, 32), (2, 16, 16)]),
    ],
)
def test_shapes_of_the_authors_nodule_and_liver_networks(strides, size, expected):
    with torch.device("meta"):
        outputs = build_resnet3d("18", width=0.0625, strides=STRIDES[strides])(torch.empty(1, 1, *size))
    assert [tuple(output.shape[2:]) for output in outputs] == expected


@pytest.mark.parametrize("depth", ["18", "50"])
def test_the_2d_network_is_torchvisions(depth):
    """On three slices as colours, with its weights as they are."""
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).double().eval()
    ours = build_resnet2d(depth, norm="bn").double().eval()
    names = match_backbone(
        f"resnet2d{depth}", {k: tuple(v.shape) for k, v in theirs.state_dict().items() if "fc" not in k}
    )
    for key, tensor in ours.state_dict().items():
        tensor.copy_(theirs.state_dict()[names[key]].reshape(tensor.shape))
    x = clip(2, 1, 3, 32, 64)
    body = IntermediateLayerGetter(theirs, {f"layer{i}": str(i) for i in range(1, 5)})
    with torch.no_grad():
        for a, b in zip(ours(x), body(x[:, 0]).values(), strict=True):
            torch.testing.assert_close(a[:, :, 0], b)


def test_output_equals_the_authors_on_the_formula_picture():
    backbone = build_resnet3d("18", "v1c", norm="bn").double().eval()
    formula.fill(backbone, partial(authors_name, "resnet3d18_v1c"))
    with torch.no_grad():
        formula.check(backbone(formula.picture(1, 1, 3, 64, 64))[-1], V1C)


@pytest.mark.parametrize(("in_channels", "stride"), [(4, 2), (8, 1)])
def test_group_norm_block_equals_the_formula(in_channels, stride):
    block = randomised(BasicBlock3D(in_channels, 8, stride, Norm("gn3d", 4)))
    x = clip(2, in_channels, 5, 8, 6)
    shortcut = x if block.shortcut is None else reference(block.shortcut, x)
    expected = F.relu(reference(block.conv2, F.relu(reference(block.conv1, x))) + shortcut)
    torch.testing.assert_close(unfold(block(fold(x), WholeClips(2)), 5), expected)


@pytest.mark.parametrize("norm", ["slice_gn", "gn3d", "bn", "frozen_bn"])
@pytest.mark.parametrize("stem", ["7x7x7", "v1c"])
def test_z_is_never_shrunk(stem, norm):
    backbone = build_resnet3d("18", stem, width=0.125, norm=norm)
    outputs = backbone(torch.randn(1, 1, 3, 64, 96))
    assert [tuple(output.shape) for output in outputs] == [
        (1, 8, 3, 16, 24),
        (1, 16, 3, 8, 12),
        (1, 32, 3, 4, 6),
        (1, 64, 3, 2, 3),
    ]


def test_outer_planes_of_the_large_stem_learn_nothing_from_three_planes():
    stem = build_stem("7x7x7", 64, Norm("bn"))
    stem(fold(torch.randn(2, 1, 3, 32, 32)), WholeClips(2)).square().sum().backward()
    gradient = stem.layers[0].conv.weight.grad
    assert [bool(plane.any()) for plane in gradient.unbind(2)] == [False, True, True, True, True, True, False]
    assert int((gradient == 0).sum()) == 6_272


def test_every_weight_of_v1c_learns_from_three_planes():
    stem = build_stem("v1c", 64, Norm("bn"))
    stem(fold(torch.randn(2, 1, 3, 32, 32)), WholeClips(2)).square().sum().backward()
    for layer in stem.layers:
        assert bool(layer.conv.weight.grad.all())
