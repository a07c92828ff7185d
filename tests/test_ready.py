"""From a trained model to one that answers: fused, checked, compiled."""

import copy
import logging
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mp3d.config import BackboneName, ClassificationHead, ClipConfig, DetectionHead, ModelConfig, SegmentationHead
from mp3d.device import autocast, checked_precision, compile_layers, ready_for_inference
from mp3d.models import build_model, folded
from mp3d.models.backbone import build_backbone
from mp3d.models.folded import ConvNorm, fold, fuse_batch_norms
from mp3d.models.stream import stream_backbone
from mp3d.sample import Clip
from tests import formula

CLIP = ClipConfig(num_slices=3, slice_spacing_mm=None, image_size=64)
CPU = torch.device("cpu")


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
@pytest.mark.parametrize("name", ["mp3d18ba", "mp3d63", "resnet3d18_v1c", "resnet3d50", "p3d18ba"])
def test_fused_batch_norms_give_the_same_features(name: BackboneName, norm: folded.NormKind):
    model = ModelConfig(backbone=name, width=0.125, norm=norm)
    backbone = build_backbone(model).double().eval()
    formula.fill(backbone, str)
    x = torch.randn(2, 1, 9, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = backbone(x)
        fuse_batch_norms(backbone)
        for ours, theirs in zip(backbone(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
        if backbone.keeps_z:  # the padding at the ends of a series is of the input, not of what was fused
            chunks = [x[:1, :, start : start + 4] for start in range(0, 9, 4)]
            levels = zip(*stream_backbone(backbone, chunks), strict=True)
            for level, theirs in zip(levels, expected, strict=True):
                torch.testing.assert_close(torch.cat(level), fold(theirs[:1]))


def test_group_norms_are_left_alone():
    layer = ConvNorm(2, 8, (1, 1, 1), norm=folded.Norm("slice_gn", 4))
    before = copy.deepcopy(layer.state_dict())
    layer.fuse()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_model_is_ready_once_it_is_fused_and_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    model = build_model(
        ModelConfig(backbone="resnet3d18", width=0.125, norm="bn", head=ClassificationHead(num_classes=2)), CLIP
    )
    formula.fill(model, str)
    clip = Clip(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), (1,))
    with torch.no_grad():
        expected = model.eval()([clip])[0]["logits"]
        for precision, dtype, tolerance in (("fp32", None, 1e-4), ("bf16", torch.bfloat16, 0.03)):
            ready = copy.deepcopy(model).train()
            assert ready_for_inference(ready, CLIP, precision, CPU) == dtype
            assert not ready.training
            with autocast(CPU, dtype):
                found = ready([clip])[0]["logits"]
            torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", ["slice_gn", "bn"])
@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_the_model_and_the_generators_alone(norm: folded.NormKind, training: bool):
    model = build_model(ModelConfig(backbone="mp3d18ba", width=0.125, norm=norm), CLIP).train(training)
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    assert checked_precision(model, CLIP, torch.bfloat16) == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training == training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fault", ["wrong", "infinite"])
def test_wrong_kernels_of_half_precision_are_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As of a library that pads where it should not, or of numbers beyond float16."""
    convolve = F.conv2d

    def broken(x: Tensor, *args, **kwargs) -> Tensor:
        y = convolve(x, *args, **kwargs)
        if y.dtype == torch.float32:
            return y
        return y.flip(0) if fault == "wrong" else y * torch.inf

    model = build_model(ModelConfig(backbone="mp3d18ba", width=0.125), CLIP)
    monkeypatch.setattr(folded.F, "conv2d", broken)
    with caplog.at_level(logging.WARNING):
        assert checked_precision(model, CLIP, torch.bfloat16) is None
    assert "bfloat16 on cpu gives other features than float32: stage 1 of the backbone is off by" in caplog.text
    assert "float32 is used instead" in caplog.text
    assert checked_precision(model, CLIP, None) is None


def dead_slice(y: Tensor) -> Tensor:
    return torch.cat([y[:-1], torch.zeros_like(y[-1:])])


def turned_channel(y: Tensor) -> Tensor:
    return torch.cat([-y[:, :1], y[:, 1:]], dim=1)


@pytest.mark.parametrize(
    ("layer", "fault", "named"),
    [
        ("backbone.backbone.stem.layers.0.conv", dead_slice, "stage 1 of the backbone"),
        ("backbone.backbone.stage2.1.unit2.conv_t", turned_channel, "stage 2 of the backbone"),
        ("backbone.fpn.layer_blocks.0", torch.zeros_like, "map 0 of the feature pyramid"),
        ("rpn.head.conv", lambda y: y * torch.nan, "the region proposals on map 0"),
    ],
    ids=["dead slice", "turned channel", "dead pyramid", "nan proposals"],
)
def test_a_fault_in_a_part_is_found(layer: str, fault: Callable, named: str, caplog: pytest.LogCaptureFixture):
    clip = ClipConfig(image_size=64)
    model = build_model(ModelConfig(backbone="mp3d18ba", width=0.125), clip).eval()

    def spoil(_module: nn.Module, _inputs: tuple, y: Tensor) -> Tensor | None:
        return fault(y) if torch.is_autocast_enabled("cpu") else None

    model.get_submodule(layer).register_forward_hook(spoil)
    with caplog.at_level(logging.WARNING):
        assert checked_precision(model, clip, torch.bfloat16) is None
    assert f"{named} is off by" in caplog.text


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (DetectionHead(), ["FoldedResNet", "FoldedResNet.with_stem", "PixelwiseFPN", "Float32RPNHead"]),
        (SegmentationHead(channels=4), ["FoldedResNet", "FoldedResNet.with_stem"]),
    ],
)
def test_layers_of_known_shapes_are_compiled(
    head: DetectionHead | SegmentationHead, expected: list[str], monkeypatch: pytest.MonkeyPatch
):
    compiled = []

    def record(function, **options):
        name = function.__func__.__qualname__.replace("Module._call_impl", type(function.__self__).__name__)
        compiled.append(name)
        return function

    monkeypatch.setattr(torch, "compile", record)
    compile_layers(build_model(ModelConfig(backbone="mp3d18ba", width=0.125, head=head), CLIP))
    assert compiled == expected


@pytest.mark.acceptance
@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_compiled_layers_compute_the_same(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Graphs are captured whole; what inductor makes of them is its own affair."""
    compiled = Counter()

    def eager(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        compiled["graphs"] += 1
        return graph.forward

    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain_compile(f, backend=eager, **options))
    head = DetectionHead() if kind == "detection" else SegmentationHead(channels=4)
    model = build_model(ModelConfig(backbone="mp3d18ba", width=0.125, head=head), CLIP).eval()
    keys = list(model.state_dict())
    clip = Clip(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), (1,))
    name = "boxes" if kind == "detection" else "mask_logits"
    with torch.no_grad():
        expected = model([clip])[0][name]
        compile_layers(model)
        found = model([clip])[0][name]
        first = compiled["graphs"]
        model([clip])
    torch.testing.assert_close(found, expected)
    assert list(model.state_dict()) == keys
    assert first > 0
    assert compiled["graphs"] == first, "nothing is compiled twice"


@pytest.mark.acceptance
def test_what_inductor_makes_computes_the_same():
    model = build_model(ModelConfig(backbone="mp3d18ba", width=0.125), CLIP).eval()
    clip = Clip(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), (1,))
    with torch.no_grad():
        expected = model([clip])[0]
        compile_layers(model)
        found = model([clip])[0]
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-4)
