from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mp3d.config import ModelConfig
from mp3d.errors import ConfigError
from mp3d.models.backbone import KeySliceFPN, build_backbone
from mp3d.models.folded import (
    Conv,
    ConvNorm,
    Norm,
    WholeClips,
    fold,
    from_columns,
    max_pool,
    max_pool_z,
    to_columns,
    unfold,
)
from mp3d.models.mp3d import BasicBlock, Bottleneck, UnitA, UnitB, UnitC, build_mp3d
from mp3d.models.released import authors_name
from mp3d.models.resnet import FoldedResNet
from tests import formula
from tests.formula import Figures

MP3D63 = (
    Figures(
        (1, 256, 16, 16), 0.020684983704652, 2.931887066356, 25.655785848264,
        (2.332781983478, 2.156330117937, 2.527663270176, 2.462069626088, 2.368848446639),
        (0.815704773275, 1.072274134530, 1.268535696923, 1.316893862253, 1.514284512031),
    ),
    Figures(
        (1, 512, 8, 8), -0.018855315971026, 2.356092835188, 10.940232189124,
        (-3.294795346309, -3.440411761416, -3.215308394820, -3.194854780521, -3.277125328281),
        (0, 0, 0, -0.309362876863, -0.831621258706),
    ),
    Figures(
        (1, 1024, 4, 4), 0.001358687084417, 2.935158441123, 13.324381404906,
        (0.324752570364, 0.549438322888, 0.575575655922, 0.783014150091, 0.653277926094),
        (1.116241108614, 1.344569639047, 1.182818754827, 1.097658050317, 0.685626735279),
    ),
    Figures(
        (1, 2048, 2, 2), -0.000351518371134, 2.303759410007, 7.907394099367,
        (0.684752457101, 0.831680184967, 0.638936859250, 0.653930258443, -1.719740199486),
        (-0.255271682581, -0.357246054097, -0.611536912688, -0.219694451773, 3.303814800006),
    ),
)  # fmt: skip
"""Output of the authors' code after the group transforms, on the formula picture of 9 x 64 x 64."""


def clip(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("63", 27_281_728), ("18ba", 15_257_536), ("34ba", 28_346_816), ("18", 16_032_704), ("131", 49_624_896)],
)
def test_parameter_counts_of_the_authors(name, expected):
    with torch.device("meta"):
        assert num_parameters(build_mp3d(name)) == expected


@pytest.mark.parametrize(("name", "expected"), [("mp3d63", 27_316_288), ("mp3d18ba", 15_266_176)])
def test_parameter_counts_with_group_transforms(name, expected):
    with torch.device("meta"):
        neck = KeySliceFPN(build_backbone(ModelConfig(backbone=name)), taps=9, fpn_channels=256)
    assert num_parameters(neck) - num_parameters(neck.fpn) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("63", ("ABC", "ABCA", "BCABCA", "BCA")), ("18ba", ("AB", "CA", "BC", "AB"))]
)
def test_kinds_of_blocks_run_over_the_whole_network(name, expected):
    letters = {UnitA: "A", UnitB: "B", UnitC: "C"}
    with torch.device("meta"):
        stages = build_mp3d(name).stages
    kinds = [[letters[type(block.unit if name == "63" else block.unit1)] for block in stage] for stage in stages]
    assert tuple("".join(kind) for kind in kinds) == expected


def test_outputs_equal_the_authors_on_the_formula_picture():
    neck = KeySliceFPN(build_backbone(ModelConfig(norm="gn3d")), taps=9, fpn_channels=8).double().eval()
    formula.fill(neck.backbone, partial(authors_name, "mp3d63"))
    formula.fill(neck.group_transforms, lambda key: authors_name("mp3d63", f"group_transforms.{key}"))
    with torch.no_grad():
        features = neck.backbone(formula.picture(1, 1, 9, 64, 64))
        for transform, feature, figures in zip(neck.group_transforms, features, MP3D63, strict=True):
            formula.check(transform(feature, [(4,)]), figures)


def test_folding_and_columns_are_views_of_channels_last_memory():
    x = clip(2, 6, 5, 4, 3).contiguous(memory_format=torch.channels_last_3d)
    folded = fold(x)
    columns = to_columns(folded, depth=5)
    assert folded.data_ptr() == columns.data_ptr() == x.data_ptr()
    assert torch.equal(folded[5 + 2], x[1, :, 2])
    assert torch.equal(columns, x.flatten(3))
    assert torch.equal(from_columns(columns, 4, 3), folded)
    assert torch.equal(unfold(folded, 5), x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (1, 7, 7), (3, 1, 1), (3, 3, 3), (7, 7, 7)])
def test_folded_convolution_equals_conv3d(kernel, stride):
    x = clip(2, 4, 5, 9, 6).requires_grad_()
    conv = Conv(4, 6, kernel, stride).double()
    ours = unfold(conv(fold(x), WholeClips(2)), depth=5)
    padding = tuple(k // 2 for k in kernel)
    theirs = F.conv3d(x, conv.weight, stride=(1, stride, stride), padding=padding)
    torch.testing.assert_close(ours, theirs)
    upstream = clip(*theirs.shape, seed=1)
    for a, b in zip(
        torch.autograd.grad(ours, (x, conv.weight), upstream),
        torch.autograd.grad(theirs, (x, conv.weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3), (7, 7, 7)])
def test_the_last_slice_is_replicated_beyond_the_ends_of_every_clip(kernel, depth):
    x = clip(2, 4, depth, 9, 6).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    conv = Conv(4, 6, kernel).double()
    ours = unfold(conv(fold(x), WholeClips(2, "replicate")), depth)
    reach, height, width = (k // 2 for k in kernel)
    padded = F.pad(x, (0, 0, 0, 0, reach, reach), mode="replicate")
    theirs = F.conv3d(padded, conv.weight, padding=(0, height, width))
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (x, conv.weight)),
        torch.autograd.grad(theirs.square().sum(), (x, conv.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backbone", ["mp3d18ba", "mp3d63", "resnet3d18"])
def test_a_clip_of_equal_slices_has_equal_features_where_its_ends_are_replicated(backbone):
    torch.manual_seed(0)
    x = torch.randn(1, 1, 1, 32, 32).expand(-1, -1, 9, -1, -1)
    spread = {}
    for padding in ("zeros", "replicate"):
        network = build_backbone(ModelConfig(backbone=backbone, width=0.125, z_padding=padding)).eval()
        with torch.no_grad():
            features = network(x)[-1]
        spread[padding] = float((features - features[:, :, 4:5]).abs().max())
    assert spread["replicate"] < 1e-5 < 1e-2 < spread["zeros"]


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_folded_pool_equals_max_pool3d(depth):
    x = clip(2, 3, depth, 9, 6)
    expected = F.max_pool3d(x, kernel_size=3, stride=(1, 2, 2), padding=1)
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            pooled = max_pool(fold(x), WholeClips(2))
        assert torch.equal(unfold(pooled, depth), expected)
        assert depth == 1 or pooled.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_pools_over_z_of_the_p3d_equal_max_pool3d(with_gradient):
    x = clip(2, 3, 9, 4, 5)
    with torch.set_grad_enabled(with_gradient):
        strided = max_pool_z(fold(x), WholeClips(2), stride=2)
        bare = max_pool_z(fold(x), WholeClips(2), padded=False)
    assert torch.equal(unfold(strided, 5), F.max_pool3d(x, (3, 1, 1), (2, 1, 1), (1, 0, 0)))
    assert torch.equal(unfold(bare, 7), F.max_pool3d(x, (3, 1, 1), 1))


def reference(layer: ConvNorm, x: Tensor) -> Tensor:
    """Convolution and 3D group norm in plain 5D torch."""
    kernel = layer.conv.weight.shape[2:]
    stride = (1, layer.conv.stride, layer.conv.stride)
    x = F.conv3d(x, layer.conv.weight, stride=stride, padding=tuple(k // 2 for k in kernel))
    return F.group_norm(x, layer.norm.num_groups, layer.norm.weight, layer.norm.bias)


def reference_unit(unit: nn.Module, x: Tensor) -> Tensor:
    """The three joins of S and T as the paper writes them."""
    s = F.relu(reference(unit.conv_s, x))
    if isinstance(unit, UnitA):
        return F.relu(reference(unit.conv_t, s))
    if isinstance(unit, UnitB):
        return s + F.relu(reference(unit.conv_t, x))
    return s + F.relu(reference(unit.conv_t, s))


def randomised(module: nn.Module) -> nn.Module:
    """Norms that do something, in float64."""
    for index, parameter in enumerate(module.double().parameters()):
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(index))
    return module


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(("in_channels", "stride"), [(8, 2), (32, 1)])
def test_bottleneck_equals_the_formula(kind, in_channels, stride):
    block = randomised(Bottleneck(kind, in_channels, 8, stride, Norm("gn3d", 4)))
    x = clip(2, in_channels, 5, 8, 6)
    y = reference_unit(block.unit, F.relu(reference(block.reduce, x)))
    shortcut = x if block.shortcut is None else reference(block.shortcut, x)
    expected = F.relu(reference(block.expand, y) + shortcut)
    torch.testing.assert_close(unfold(block(fold(x), WholeClips(2)), 5), expected)
    assert (block.shortcut is None) == (in_channels == 32)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(("in_channels", "stride"), [(4, 2), (8, 1)])
def test_basic_block_equals_the_formula(kind, in_channels, stride):
    block = randomised(BasicBlock(kind, in_channels, 8, stride, Norm("gn3d", 4)))
    x = clip(2, in_channels, 5, 8, 6)
    shortcut = x if block.shortcut is None else reference(block.shortcut, x)
    expected = F.relu(reference_unit(block.unit2, reference_unit(block.unit1, x)) + shortcut)
    torch.testing.assert_close(unfold(block(fold(x), WholeClips(2)), 5), expected)


def test_blocks_leave_their_input_alone():
    x = fold(clip(1, 16, 3, 4, 4))
    before = x.clone()
    for kind in range(3):
        BasicBlock(kind, 16, 16, 1, Norm("slice_gn", 4)).double()(x, WholeClips(1))
        Bottleneck(kind, 16, 4, 1, Norm("slice_gn", 4)).double()(x, WholeClips(1))
    assert torch.equal(x, before)


def test_slice_gn_is_2d_group_norm_of_every_slice():
    layer = randomised(ConvNorm(2, 16, (1, 1, 1), norm=Norm("slice_gn", 8)))
    x = clip(2, 2, 3, 4, 5)
    ours = unfold(layer(fold(x), WholeClips(2)), 3)
    convolved = F.conv3d(x, layer.conv.weight)
    for z in range(3):
        expected = F.group_norm(convolved[:, :, z], 8, layer.norm.weight, layer.norm.bias)
        torch.testing.assert_close(ours[:, :, z], expected)


def channels_per_group(backbone: FoldedResNet) -> list[int]:
    """Of the last norm of the stem and of every stage."""
    parts = (backbone.stem, *backbone.stages)
    norms = [[module for module in part.modules() if isinstance(module, nn.GroupNorm)][-1] for part in parts]
    return [norm.num_channels // norm.num_groups for norm in norms]


@pytest.mark.parametrize("width", [1.0, 0.25, 0.125])
def test_a_group_has_as_many_channels_as_published_at_any_width(width):
    with torch.device("meta"):
        assert channels_per_group(build_mp3d("18ba", width)) == [2, 2, 4, 8, 16]
        assert channels_per_group(build_mp3d("63", width)) == [2, 8, 16, 32, 64]


@pytest.mark.parametrize("width", [1.0, 0.25, 0.1, 0.06])
def test_no_group_is_a_single_channel(width):
    with torch.device("meta"):
        modules = build_backbone(ModelConfig(backbone="resnet3d18_v1c", width=width)).modules()
        assert all(m.num_channels > m.num_groups for m in modules if isinstance(m, nn.GroupNorm))


@pytest.mark.parametrize("norm", ["slice_gn", "gn3d", "bn", "frozen_bn"])
@pytest.mark.parametrize("name", ["mp3d18ba", "mp3d63"])
def test_z_is_never_shrunk(name, norm):
    backbone = build_backbone(ModelConfig(backbone=name, width=0.125, norm=norm))
    for depth in (1, 3, 5):
        outputs = backbone(torch.randn(1, 1, depth, 64, 96))
        assert [tuple(output.shape) for output in outputs] == [
            (1, channels, depth, 64 // stride, 96 // stride)
            for channels, stride in zip(backbone.out_channels, backbone.strides, strict=True)
        ]


def test_outputs_stay_channels_last():
    backbone = build_mp3d("63", width=0.125)
    clips = torch.randn(2, 1, 3, 64, 64)
    assert backbone.stem.layers[0](fold(clips), WholeClips(2)).is_contiguous(memory_format=torch.channels_last)
    for output in backbone(clips):
        assert output.is_contiguous(memory_format=torch.channels_last_3d)


def test_slices_only_see_their_neighbours_with_slice_gn():
    backbone = build_mp3d("18ba", width=0.125).eval()
    x = torch.randn(1, 1, 17, 32, 32)
    changed = x.clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        difference = (backbone(x)[0] - backbone(changed)[0]).abs().amax(dim=(0, 1, 3, 4))
    reach = 1 + 4  # the pool, then two units in each of the two blocks of stage 1
    assert bool((difference[: reach + 1] > 0).all())
    assert bool((difference[reach + 1 :] == 0).all())


@pytest.mark.parametrize(
    ("frozen", "parts"), [(-1, []), (0, ["stem"]), (2, ["stem", "stage1", "stage2"]), (4, list("s1234"))]
)
def test_frozen_parts_do_not_learn(frozen, parts):
    backbone = build_backbone(ModelConfig(backbone="mp3d18ba", width=0.125, norm="bn", frozen_stages=frozen))
    backbone.train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    outputs = backbone(torch.randn(2, 1, 3, 32, 32))
    if frozen < 4:
        sum(output.square().mean() for output in outputs if output.requires_grad).backward()
    learning = {key.split(".")[0] for key, parameter in backbone.named_parameters() if parameter.grad is not None}
    counted = {
        key.split(".")[0]
        for key, value in backbone.state_dict().items()
        if key.endswith("running_mean") and not torch.equal(value, before[key])
    }
    everything = ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert learning == counted == set(everything[len(parts) :])


def test_frozen_batch_norm_never_trains():
    layer = ConvNorm(2, 4, (1, 1, 1), norm=Norm("frozen_bn")).train()
    layer(torch.randn(3, 2, 4, 4), WholeClips(1)).sum().backward()
    assert layer.norm.weight.grad is None
    assert layer.conv.weight.grad is not None
    assert torch.equal(layer.norm.running_mean, torch.zeros(4))


def test_too_narrow_a_width_is_refused():
    with pytest.raises(ConfigError, match="model.width is 0.01: the stem would have no channel"):
        build_mp3d("63", width=0.01)


def test_bfloat16_stays_close_to_float32():
    torch.manual_seed(0)
    backbone = build_mp3d("18ba", width=0.125).eval()
    x = torch.randn(1, 1, 5, 64, 64)
    with torch.no_grad():
        exact = backbone(x)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = backbone(x)[-1]
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.99


def test_the_frame_counts_its_stages():
    backbone = build_mp3d("18ba", width=0.125)
    assert isinstance(backbone, FoldedResNet)
    assert [name for name, _ in backbone.named_children()] == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert backbone.out_channels == [8, 16, 32, 64]
    assert backbone.strides == (4, 8, 16, 32)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(8, 16), (16, 32), (4, 8)])
def test_strided_shortcuts_equal_the_strided_convolution(in_channels: int, out_channels: int):
    """Few input channels: there oneDNN's own strided 1 x 1 kernel corrupts memory, so it must not be reached."""
    torch.manual_seed(0)
    conv = Conv(in_channels, out_channels, (1, 1, 1), stride=2)
    x = torch.randn(6, in_channels, 15, 16).contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv3d(
        x.contiguous().unflatten(0, (2, 3)).transpose(1, 2), conv.weight, stride=(1, 2, 2)
    )
    for _ in range(30):
        y = conv(x, WholeClips(2))
        y.square().mean().backward()
    torch.testing.assert_close(y.unflatten(0, (2, 3)).transpose(1, 2), expected)
