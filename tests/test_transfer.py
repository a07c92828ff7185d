import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from mp3d.config import ClassificationHead, ClipConfig, DetectionHead, ModelConfig, StrideConfig
from mp3d.errors import CheckpointError
from mp3d.models import build_model
from mp3d.models.backbone import build_backbone
from mp3d.models.released import authors_name
from mp3d.models.resnet3d import build_resnet3d
from mp3d.models.transfer import (
    InflationRule,
    Reinitialised,
    TransferReport,
    check_source,
    inflate,
    initialise_backbone,
)

DETECTION = DetectionHead(fpn_channels=8, box_features=8)


def model(head=DETECTION, num_slices: int = 9, seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    config = ModelConfig(backbone="mp3d18ba", width=0.125, head=head).override(changes)
    return build_model(config, ClipConfig(num_slices=num_slices))


def classifier(**changes) -> nn.Module:
    return model(ClassificationHead(num_classes=5), num_slices=3, seed=1, **changes)


def test_a_classifier_starts_a_detector():
    source, detector = classifier(), model()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    report = initialise_backbone(detector, source.state_dict())
    after = detector.state_dict()
    for key, value in source.backbone.state_dict().items():
        assert torch.equal(after[f"backbone.backbone.{key}"], value)
    assert set(report.moved) == {key for key in after if key.startswith("backbone.backbone.")}
    for item in report.reinitialised:
        assert torch.equal(after[item.key], before[item.key])
    assert report.unused == ("fc.weight", "fc.bias")


def test_every_tensor_of_both_sides_is_accounted_for():
    source, detector = classifier(), model()
    report = initialise_backbone(detector, source.state_dict())
    fresh = [item.key for item in report.reinitialised]
    assert sorted([*report.moved, *fresh]) == sorted(detector.state_dict())
    assert len(report.moved) + len(report.unused) == len(source.state_dict())


def test_a_detector_only_lends_its_backbone():
    """Group transforms of another number of slices are named with both shapes."""
    source, detector = model(num_slices=3, seed=1), model()
    report = initialise_backbone(detector, source.state_dict())
    assert Reinitialised("backbone.group_transforms.0.weight", (8, 9, 1, 1), (8, 3, 1, 1)) in report.reinitialised
    assert any(item.key == "rpn.head.cls_logits.weight" for item in report.reinitialised)
    assert report.unused == ()


def test_a_detector_starts_a_classifier_and_a_bare_backbone_a_detector():
    target = classifier()
    report = initialise_backbone(target, model().state_dict())
    assert {item.key for item in report.reinitialised} == {"fc.weight", "fc.bias"}
    bare = build_backbone(ModelConfig(backbone="mp3d18ba", width=0.125))
    report = initialise_backbone(model(), bare.state_dict())
    assert len(report.moved) == len(bare.state_dict())


def test_batch_norm_weights_start_a_group_norm_network():
    source = classifier(norm="bn")
    detector = model()
    report = initialise_backbone(detector, source.state_dict())
    assert len(report.moved) == len(detector.backbone.backbone.state_dict())
    assert (
        sum(key.endswith("running_mean") for key in report.unused) == 36
    )  # the stem, four in each of eight blocks, three shortcuts


def test_another_stem_is_the_only_thing_left_behind():
    source = classifier(backbone="resnet3d18")
    target = model(ClassificationHead(num_classes=2), num_slices=3, backbone="resnet3d18_v1c")
    report = initialise_backbone(target, source.state_dict())
    fresh = {item.key.rsplit(".", 4)[0] for item in report.reinitialised if item.key.startswith("backbone")}
    assert fresh == {"backbone.stem"}
    assert Reinitialised("backbone.stem.layers.0.conv.weight", (4, 1, 3, 3, 3), (8, 1, 7, 7, 7)) in report.reinitialised


@pytest.mark.parametrize("changes", [{"width": 0.25}, {"backbone": "mp3d63"}, {"backbone": "resnet3d18"}])
def test_another_network_is_refused_and_nothing_is_changed(changes):
    detector = model()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(CheckpointError, match="backbone weights have a counterpart in the source, first missing: "):
        initialise_backbone(detector, classifier(**changes).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"backbone": "mp3d63"}, {"backbone": "mp3d18"}),
        ({"backbone": "mp3d18"}, {"backbone": "mp3d63"}),
        ({"backbone": "mp3d34ba"}, {"backbone": "mp3d18ba"}),
        ({"backbone": "resnet3d50"}, {"backbone": "resnet3d34"}),
        ({"width": 0.5}, {"width": 0.25}),
        ({"norm": "slice_gn"}, {"norm": "frozen_bn"}),
    ],
)
def test_weights_that_would_mean_something_else_are_refused(source: dict, target: dict):
    """Most of these have all the keys and shapes of the target."""
    with pytest.raises(CheckpointError, match=r"model.(backbone|width|norm)"):
        check_source(ModelConfig(**source), ModelConfig(**target))


def test_the_same_layers_may_have_another_name_stem_or_norm():
    assert check_source(ModelConfig(backbone="mp3d63"), ModelConfig(backbone="p3d63")) == ()
    assert check_source(ModelConfig(backbone="resnet3d18_v1c"), ModelConfig(backbone="resnet3d18")) == ()
    assert check_source(ModelConfig(norm="bn"), ModelConfig(norm="frozen_bn")) == ()


def test_other_ends_of_clips_are_told():
    (warning,) = check_source(ModelConfig(), ModelConfig(z_padding="replicate"))
    assert "learnt with model.z_padding zeros, and this model goes on with replicate" in warning
    assert check_source(ModelConfig(z_padding="replicate"), ModelConfig(z_padding="replicate")) == ()


def test_another_pool_is_told():
    planar = ModelConfig(strides=StrideConfig(pool="1x3x3"))
    (warning,) = check_source(planar, ModelConfig())
    assert "--model.strides.pool 1x3x3 keeps them the same" in warning
    report = replace(initialise_backbone(model(), model(seed=1).state_dict()), warnings=(warning,))
    assert report.summary().startswith(f"warning: {warning}")


def test_a_source_without_a_backbone_is_refused():
    with pytest.raises(CheckpointError, match="0 keys ending in stem.layers.0.conv.weight.* begin with weight, bias"):
        initialise_backbone(model(), nn.Linear(2, 2).state_dict())


def test_summary_names_every_key_once():
    report = TransferReport(
        moved=("backbone.stem.layers.0.conv.weight", "backbone.stem.layers.0.norm.weight"),
        reinitialised=(
            Reinitialised("fc.weight", (5, 8), (3, 8)),
            Reinitialised("fc.bias", (5,), None),
        ),
        unused=("rpn.weight",),
        inflated=("backbone.stage1.0.conv1.conv.weight",),
    )
    assert report.summary().splitlines() == [
        "moved 2 tensors, inflated 1, re-initialised 2, unused 1 of the source",
        "moved:",
        "  backbone.stem.layers.0.conv: weight",
        "  backbone.stem.layers.0.norm: weight",
        "inflated:",
        "  backbone.stage1.0.conv1.conv: weight",
        "re-initialised (shape here, in the source):",
        "  fc: weight (5, 8), (3, 8); bias (5,), none",
        "unused (only in the source):",
        "  rpn: weight",
    ]
    assert json.loads(json.dumps(report.as_dict()))["reinitialised"][0] == {
        "key": "fc.weight",
        "shape": [5, 8],
        "source_shape": [3, 8],
    }


def planar(depth: str) -> nn.Module:
    """torchvision's 2D ResNet with norms that do something."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for key, tensor in network.state_dict().items():
        if key.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, std=0.1)
        elif key.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 1.5)
    return network


def inflated(depth: str, network: nn.Module, rule: InflationRule, pool: str = "1x3x3") -> nn.Module:
    backbone = build_resnet3d(depth, norm="bn", strides=StrideConfig(pool=pool)).eval()
    source = network.state_dict()
    for key, tensor in backbone.state_dict().items():
        value = source[authors_name(f"resnet3d{depth}", key)]
        tensor.copy_(inflate(value, tensor.shape, rule) if tensor.ndim == 5 else value)
    return backbone


def stages_of(network: nn.Module, slices: torch.Tensor) -> list[torch.Tensor]:
    """Of grey slices ``(n, h, w)``, as pictures of three equal colours."""
    body = IntermediateLayerGetter(network, {f"layer{number}": str(number) for number in range(1, 5)})
    return list(body(slices[:, None].expand(-1, 3, -1, -1)).values())


@pytest.mark.parametrize("depth", ["18", "50"])
def test_inflated_by_the_centre_rule_it_is_the_2d_network_on_every_slice(depth):
    network = planar(depth)
    clip = torch.randn(1, 1, 5, 64, 64)
    with torch.no_grad():
        ours = inflated(depth, network, "centre")(clip)
        for a, b in zip(ours, stages_of(network, clip[0, 0]), strict=True):
            assert ((a[0].transpose(0, 1) - b).abs().max() / b.abs().max()).item() < 1e-5


def test_inflated_by_the_mean_rule_it_is_the_2d_network_on_equal_slices_away_from_the_ends():
    network = planar("18")
    reach = 3 + 1 + 16  # the stem, the pool, two convolutions in each of eight blocks
    picture = torch.randn(1, 32, 32)
    with torch.no_grad():
        ours = inflated("18", network, "mean", pool="3x3x3")(picture.expand(1, 1, 2 * reach + 3, -1, -1))
        for a, b in zip(ours, stages_of(network, picture), strict=True):
            difference = (a[0].transpose(0, 1) - b).abs().amax(dim=(1, 2, 3)) / b.abs().max()
            assert bool((difference[reach:-reach] < 1e-5).all())
            assert difference[0] > 1e-3
            assert difference[-1] > 1e-3


def test_inflated_by_the_sum_rule_a_kernel_answers_with_the_sum_over_its_slices():
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 6, 6, dtype=torch.float64)
    ours = F.conv3d(x, inflate(weight, (4, 2, 3, 3, 3), "sum"))
    expected = [F.conv2d(x[:, :, z : z + 3].sum(2), weight) for z in range(3)]
    torch.testing.assert_close(ours, torch.stack(expected, dim=2))
    torch.testing.assert_close(inflate(weight, (4, 2, 3, 3, 3), "mean") * 3, inflate(weight, (4, 2, 3, 3, 3), "sum"))


@pytest.mark.parametrize(("out_channels", "parts"), [(6, (2, 2, 2)), (7, (3, 2, 2)), (8, (3, 3, 2))])
def test_inflated_by_the_acs_rule_a_third_of_the_kernels_lies_in_each_plane(out_channels, parts):
    """As ACSConv splits and turns them."""
    weight = torch.randn(out_channels, 2, 3, 3, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 6, 7, dtype=torch.float64)
    axial, coronal, sagittal = weight.split(parts)
    expected = [
        F.conv3d(x, axial.unsqueeze(2), padding=(0, 1, 1)),
        F.conv3d(x, coronal.unsqueeze(3), padding=(1, 0, 1)),
        F.conv3d(x, sagittal.unsqueeze(4), padding=(1, 1, 0)),
    ]
    ours = F.conv3d(x, inflate(weight, (out_channels, 2, 3, 3, 3), "acs"), padding=1)
    torch.testing.assert_close(ours, torch.cat(expected, dim=1))
    with pytest.raises(ValueError, match="is no cube"):
        inflate(weight, (out_channels, 2, 1, 3, 3), "acs")


def test_colours_become_grey():
    weight = torch.randn(4, 3, 7, 7)
    grey = torch.randn(1, 1, 9, 9)
    kernel = inflate(weight, (4, 1, 7, 7, 7), "centre")
    torch.testing.assert_close(F.conv2d(grey, kernel[:, :, 3]), F.conv2d(grey.expand(-1, 3, -1, -1), weight))
    torch.testing.assert_close(inflate(weight, (4, 1, 7, 7, 7), "centre", "mean") * 3, kernel)
    with pytest.raises(ValueError, match=r"of shape \(4, 3, 7, 7\) cannot become a 3D one of \(4, 1, 3, 3, 3\)"):
        inflate(weight, (4, 1, 3, 3, 3), "centre")
