"""Backbones by their names, and what may be chosen about them."""

from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mp3d.config import BackboneName, ClassificationHead, ClipConfig, ModelConfig, StrideConfig
from mp3d.errors import ConfigError
from mp3d.models import build_model
from mp3d.models.backbone import KeySliceFPN, build_backbone, build_neck
from mp3d.models.folded import GroupNorm
from mp3d.models.stream import stream_backbone, stream_pyramids
from tests.test_mp3d import clip

CLASSES = ClassificationHead(num_classes=2)


@pytest.mark.parametrize("name", get_args(BackboneName))
def test_every_name_detects(name: BackboneName):
    """Four maps of the promised strides and channels, and a pyramid for every key slice."""
    taps = 3 if name.startswith("resnet2d") else 9
    neck = build_neck(ModelConfig(backbone=name, width=0.0625), taps, fpn_channels=8)
    x = torch.randn(2, 1, taps, 32, 64)
    outputs = neck.backbone(x)
    deep = name.endswith(("18", "63", "131", "50", "50_v1c")) and not name.startswith(("resnet3d18", "resnet2d18"))
    assert neck.backbone.out_channels == [width * (4 if deep else 1) for width in (4, 8, 16, 32)]
    for output, channels, stride in zip(outputs, neck.backbone.out_channels, (4, 8, 16, 32), strict=True):
        assert output.shape[:2] == (2, channels)
        assert output.shape[3:] == (32 // stride, 64 // stride)
        assert (output.shape[2] == taps) == neck.backbone.keeps_z
    maps = neck(x, [(taps // 2,)] * 2)
    assert [tuple(level.shape) for level in maps.values()] == [
        (2, 8, -(-32 // stride), -(-64 // stride)) for stride in (4, 8, 16, 32, 64)
    ]


@pytest.mark.parametrize("name", ["p3d18ba", "resnet2d50", "resnet3d18"])
def test_the_config_knows_whether_z_is_kept(name: BackboneName):
    for isotropic in (False, True) if name == "resnet3d18" else (False,):
        model = ModelConfig(backbone=name, width=0.0625, strides=StrideConfig(isotropic=isotropic), head=CLASSES)
        assert build_backbone(model).keeps_z == model.keeps_z == (name == "resnet3d18" and not isotropic)


def pyramids(to_2d: str | None, transform_taps: int | None = None) -> tuple[KeySliceFPN, Tensor]:
    model = ModelConfig(backbone="mp3d18ba", width=0.125, to_2d=to_2d, transform_taps=transform_taps)
    neck = build_neck(model, taps=5, fpn_channels=8)
    return neck.double().eval(), clip(1, 1, 14, 32, 32)


@pytest.mark.parametrize(
    ("to_2d", "transform_taps"), [("group", None), ("group", 3), ("dense", None), ("dense", 1), ("centre", None)]
)
def test_a_stream_gives_the_maps_of_the_whole_stack(to_2d: str, transform_taps: int | None):
    neck, x = pyramids(to_2d, transform_taps)
    with torch.no_grad():
        slab = neck(x, [range(2, 12)])
        streamed = list(stream_pyramids(neck, x.split(4, dim=2), at_once=3))
    for level, maps in slab.items():
        torch.testing.assert_close(torch.cat([part[level] for part in streamed]), maps)


def test_what_makes_features_2d_is_a_choice():
    counts = {
        to_2d: sum(p.numel() for p in pyramids(to_2d)[0].group_transforms.parameters())
        for to_2d in ("group", "dense", "centre")
    }
    widths = [8, 16, 32, 64]
    assert counts == {"group": 5 * sum(widths), "dense": 5 * sum(width**2 for width in widths), "centre": 0}
    assert isinstance(pyramids(None)[0], KeySliceFPN)


def test_fewer_taps_are_all_of_them_with_zeros_outside():
    few, x = pyramids("group", 3)
    all_of_them, _ = pyramids("group")
    state = few.state_dict()
    for level in range(4):
        name = f"group_transforms.{level}.weight"
        state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, 0, 1, 1))
    all_of_them.load_state_dict(state)
    with torch.no_grad():
        for maps, wanted in zip(few(x, [(4, 6)]).values(), all_of_them(x, [(4, 6)]).values(), strict=True):
            torch.testing.assert_close(maps, wanted)
    with pytest.raises(ValueError, match="key slice 1 of clip 0 needs 2 slices on each side"):
        few(x, [(1,)])


@pytest.mark.parametrize("shape", [(6, 64, 20, 24), (3, 16, 30, 30), (2, 64, 9, 100)])
def test_the_group_norm_of_a_gpu_is_that_of_a_cpu(shape: tuple[int, ...]):
    torch.manual_seed(0)
    norm = GroupNorm(8, shape[1])
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(shape) + 20).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(norm.by_channels(x), norm(x), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(norm.double().by_channels(x.double()), norm(x.double()))
        norm.float()
        x = x.bfloat16().float()
        rounded = norm.by_channels(x.bfloat16())
        assert rounded.dtype is torch.bfloat16
        assert rounded.is_contiguous(memory_format=torch.channels_last)
        assert (rounded - norm(x)).norm() < 0.003 * norm(x).norm(), "no more than the result was rounded"


def test_isotropic_strides_cannot_be_streamed():
    model = ModelConfig(backbone="resnet3d18", width=0.0625, strides=StrideConfig(isotropic=True), head=CLASSES)
    with pytest.raises(ConfigError, match=r"does not keep z \(a P3D, a 2D one, isotropic strides\)"):
        next(stream_backbone(build_backbone(model), [torch.randn(1, 1, 9, 32, 32)]))


def test_an_isotropic_classifier_learns():
    """From a cube every layer gets a gradient."""
    model = ModelConfig(
        backbone="resnet3d18_v1c", width=0.0625, norm="bn", strides=StrideConfig(isotropic=True), head=CLASSES
    )
    backbone = build_model(model, ClipConfig(num_slices=47)).backbone
    backbone(torch.randn(1, 1, 47, 48, 48))[-1].square().mean().backward()
    assert all(bool(parameter.grad.any()) for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "mp3d63", "strides": {"isotropic": True}}, "mp3d63 has the strides of its paper"),
        ({"backbone": "p3d63", "strides": {"pool": "none"}}, "p3d63 has a pool of its own"),
        (
            {"backbone": "resnet3d18", "strides": {"stem": 1}},
            "a detector needs strides of 4, 8, 16, 32 and every slice",
        ),
        ({"backbone": "resnet3d18", "strides": {"isotropic": True}}, "a detector needs strides of 4, 8, 16, 32"),
        ({"backbone": "resnet2d50", "to_2d": "dense"}, "resnet2d50 leaves no slices to weight"),
        ({"backbone": "p3d63", "z_padding": "replicate"}, "z_padding replicate is for networks that keep z, not p3d63"),
        ({"transform_taps": 3, "head": CLASSES}, "a classification head has no transform"),
        ({"transform_taps": 4}, "transform_taps is 4; it must be odd"),
        ({"transform_taps": 3, "to_2d": "centre"}, "nothing to weight; set transform_taps to None"),
        ({"transform_taps": 3, "backbone": "p3d63"}, "nothing to weight; set transform_taps to None"),
        ({"strides": {"isotropic": True, "pool": "1x3x3"}}, "isotropic strides halve z in the pool too"),
    ],
)
def test_what_cannot_be_chosen_is_refused(changes: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**changes)


def test_no_more_slices_are_weighted_than_a_window_has():
    with pytest.raises(ConfigError, match="transform_taps is 5, above clip.num_slices, which is 3"):
        build_model(ModelConfig(transform_taps=5), ClipConfig(num_slices=3))


def test_the_2d_network_reads_three_slices():
    model = ModelConfig(backbone="resnet2d50", width=0.0625)
    with pytest.raises(ConfigError, match="clip.num_slices is 9: resnet2d50 reads 3 slices as colours"):
        build_model(model, ClipConfig())
