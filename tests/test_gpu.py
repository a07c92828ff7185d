"""What only a GPU can show: the same numbers as a CPU's, half precision, training and going on. Skipped without one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mp3d.checkpoint import open_checkpoint
from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.data.series import Volume
from mp3d.device import checked_precision, compile_layers, pick_device, ready_for_inference, resolve_precision
from mp3d.models import LesionDetector, build_model
from mp3d.models.backbone import build_backbone
from mp3d.models.stream import stream_backbone
from mp3d.predict import Predictor, SeriesMode
from mp3d.run_folder import claim, read_metrics, resume_point
from mp3d.session import PlainSession
from mp3d.train import train
from tests.tiny import ct_shards, detector_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
HEAD = DetectionHead(fpn_channels=16, box_features=32, rpn_pre_nms=(200, 200), rpn_post_nms=(100, 50))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 is float32: PyTorch rounds what a GPU's convolutions read to ten bits unless it is told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def small(backbone: str = "mp3d18ba", **fields: object) -> ModelConfig:
    return ModelConfig(backbone=backbone, width=0.25, head=HEAD).override(fields)


def detector(**fields: object) -> LesionDetector:
    torch.manual_seed(0)
    model = build_model(small(**fields), ClipConfig(image_size=96))
    assert isinstance(model, LesionDetector)
    with torch.no_grad():  # scores of fresh weights are all alike
        model.roi_heads.box_predictor.cls_score.weight.mul_(20)
    return model.eval()


def worst(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("backbone", ["mp3d18ba", "mp3d63", "p3d63", "resnet3d18", "resnet3d50_v1c"])
@pytest.mark.parametrize("norm", ["slice_gn", "gn3d", "bn"])
def test_features_and_gradients_are_those_of_a_cpu(backbone: str, norm: str):
    torch.manual_seed(0)
    ours = build_backbone(small(backbone, norm=norm)).double()
    theirs = build_backbone(small(backbone, norm=norm)).double().to(GPU)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 1, 9, 64, 64, dtype=torch.float64)
    mine, other = ours(x), theirs(x.to(GPU))
    for maps in (mine, other):
        torch.stack([each.square().mean() for each in maps]).sum().backward()
    assert all(worst(theirs, ours) < 1e-9 for ours, theirs in zip(mine, other, strict=True))
    for (name, parameter), known in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert worst(known.grad, parameter.grad) < 1e-7, name


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_stream_is_one_pass_over_the_stack(padding: str, chunk: int):
    torch.manual_seed(0)
    backbone = build_backbone(small(z_padding=padding)).to(GPU).eval()
    x = torch.randn(1, 1, 40, 64, 64, device=GPU)
    with torch.inference_mode():
        whole = backbone(x)
        parts = list(stream_backbone(backbone, x.split(chunk, dim=2)))
    for level, features in enumerate(whole):
        streamed = torch.cat([part[level] for part in parts])
        assert worst(streamed, features[0].transpose(0, 1)) < 1e-5


@pytest.mark.parametrize("mode", ["window", "slab", "stream"])
def test_findings_are_those_of_a_cpu(mode: SeriesMode):
    hu = np.random.default_rng(0).integers(-1000, 1000, (30, 96, 96)).astype(np.int16)
    volume = Volume(hu, np.diag([0.8, 0.8, 2.0, 1.0]))  # its slices are no grid slices
    model = detector()
    predictor = Predictor(model, model.transform.config, 0.5, CPU, None, mode)
    theirs = predictor.find_lesions(volume, 0.3)
    ours = replace(predictor, model=model.to(GPU), device=GPU).find_lesions(volume, 0.3)
    assert len(theirs) > 50
    # a box that is kept for the last digit of an overlap may differ
    near = [
        any(
            one.slice_index == other.slice_index
            and abs(one.score - other.score) < 1e-3
            and np.allclose(one.box_px, other.box_px, atol=0.1)
            for other in ours
        )
        for one in theirs
    ]
    assert np.mean(near) > 0.99
    assert abs(len(ours) - len(theirs)) <= 0.01 * len(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["slice_gn", "gn3d", "frozen_bn"])
def test_half_precision_passes_the_check_at_the_real_shape(dtype: torch.dtype, norm: str):
    torch.manual_seed(0)
    model = build_model(ModelConfig(norm=norm), ClipConfig()).to(GPU).eval()
    assert checked_precision(model, ClipConfig(), dtype) is dtype
    assert pick_device("auto").type == "cuda"


class Interrupted(PlainSession):
    """Ends behind the second epoch."""

    def report(self, epoch: int, *rest: Any) -> None:
        super().report(epoch, *rest)
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["fp32", "auto", "fp16"])
def test_a_detector_learns_and_goes_on(precision: str, tmp_path: Path):
    config = detector_config(ct_shards(tmp_path / "shards"), tmp_path, loop__precision=precision, loop__epochs=4)
    run = claim(tmp_path / config.name, config)
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupted(run, keep=4, device=GPU))
    train(config, PlainSession(run, keep=4, device=GPU))
    assert resume_point(run).epoch == 4
    losses = [line["loss_classifier"] for line in read_metrics(run)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    best = open_checkpoint(run)
    predictor = Predictor.open(best, "gpu", mode="window")
    expected = {"fp32": None, "auto": torch.bfloat16, "fp16": torch.float16}[precision]
    assert predictor.autocast_dtype is expected
    assert resolve_precision(precision, GPU) is expected
    assert Predictor.open(best, "cpu", mode="window").device.type == "cpu"


@pytest.mark.acceptance
def test_compiled_layers_give_the_same_features():
    model = detector(norm="slice_gn").to(GPU)
    x = torch.randn(1, 1, 9, 96, 96, device=GPU)
    with torch.inference_mode():
        plain = model.backbone(x, [(4,)])
        ready_for_inference(model, model.transform.config, "fp32", GPU)
        compile_layers(model)
        compiled = model.backbone(x, [(4,)])
    assert all(worst(compiled[level], features) < 1e-4 for level, features in plain.items())
