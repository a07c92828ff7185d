from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mp3d.models.folded import Norm, WholeClips, fold, unfold
from mp3d.models.released import authors_name
from mp3d.models.resnet3d import BasicBlock3D, build_resnet3d18, build_stem
from tests import formula
from tests.formula import Figures
from tests.test_mp3d import clip, num_parameters, randomised, reference

V1C = Figures(
    (1, 512, 3, 2, 2), 0.364355996053822, 0.424826550549, 1.371794097063,
    (0.001620402149, 0.002419268599, 0.004315094113, 0.005155462089, 0.001945902423),
    (0.115307962069, 0.110456203665, 0.106385272799, 0.107623277858, 0.127103815273),
)  # fmt: skip
"""Output of the authors' code on the formula picture of 3 x 64 x 64."""


@pytest.mark.parametrize(("stem", "expected"), [("7x7x7", 33_160_000), ("v1c", 33_221_984)])
def test_parameter_counts_of_the_authors(stem, expected):
    with torch.device("meta"):
        assert num_parameters(build_resnet3d18(stem)) == expected


def test_output_equals_the_authors_on_the_formula_picture():
    backbone = build_resnet3d18("v1c", norm="bn").double().eval()
    formula.fill(backbone, partial(authors_name, "resnet3d18_v1c"))
    with torch.no_grad():
        formula.check(backbone(formula.picture(1, 1, 3, 64, 64))[-1], V1C)


@pytest.mark.parametrize(("in_channels", "stride"), [(4, 2), (8, 1)])
def test_block_equals_the_formula(in_channels, stride):
    block = randomised(BasicBlock3D(in_channels, 8, stride, Norm("gn3d", 4)))
    x = clip(2, in_channels, 5, 8, 6)
    shortcut = x if block.shortcut is None else reference(block.shortcut, x)
    expected = F.relu(reference(block.conv2, F.relu(reference(block.conv1, x))) + shortcut)
    torch.testing.assert_close(unfold(block(fold(x), WholeClips(5)), 5), expected)


@pytest.mark.parametrize("norm", ["slice_gn", "gn3d", "bn", "frozen_bn"])
@pytest.mark.parametrize("stem", ["7x7x7", "v1c"])
def test_z_is_never_shrunk(stem, norm):
    backbone = build_resnet3d18(stem, width=0.125, norm=norm)
    outputs = backbone(torch.randn(1, 1, 3, 64, 96))
    assert [tuple(output.shape) for output in outputs] == [
        (1, 8, 3, 16, 24),
        (1, 16, 3, 8, 12),
        (1, 32, 3, 4, 6),
        (1, 64, 3, 2, 3),
    ]


def test_outer_planes_of_the_large_stem_learn_nothing_from_three_planes():
    stem = build_stem("7x7x7", 64, Norm("bn"))
    stem(fold(torch.randn(2, 1, 3, 32, 32)), WholeClips(3)).square().sum().backward()
    gradient = stem.layers[0].conv.weight.grad
    assert [bool(plane.any()) for plane in gradient.unbind(2)] == [False, True, True, True, True, True, False]
    assert int((gradient == 0).sum()) == 6_272


def test_every_weight_of_v1c_learns_from_three_planes():
    stem = build_stem("v1c", 64, Norm("bn"))
    stem(fold(torch.randn(2, 1, 3, 32, 32)), WholeClips(3)).square().sum().backward()
    for layer in stem.layers:
        assert bool(layer.conv.weight.grad.all())
