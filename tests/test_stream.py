"""Chunk by chunk gives what one pass over the stack gives."""

import pytest
import torch
from torch import Tensor, nn

from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.errors import ConfigError
from mp3d.models import LesionDetector
from mp3d.models.backbone import build_backbone
from mp3d.models.folded import unfold
from mp3d.models.resnet import FoldedResNet
from mp3d.models.stream import SeriesStream, stream_backbone, stream_predictions
from mp3d.sample import Clip, Prediction

BACKBONES = ["mp3d18ba", "mp3d63", "resnet3d18", "resnet3d18_v1c", "resnet3d50"]
HEAD = DetectionHead(fpn_channels=16, box_features=32, rpn_post_nms=(50, 30), max_detections=20)


def backbone(name: str, norm: str = "slice_gn", z_padding: str = "zeros") -> FoldedResNet:
    """With norms that do something."""
    torch.manual_seed(0)
    built = build_backbone(ModelConfig(backbone=name, width=0.125, norm=norm, z_padding=z_padding)).eval()
    for key, tensor in built.state_dict().items():
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, *((-0.2, 0.2) if key.endswith(("mean", "bias")) else (0.5, 1.5)))
    return built


def stack(depth: int, size: int = 32) -> Tensor:
    return torch.randn(1, 1, depth, size, size, generator=torch.Generator().manual_seed(1))


def streamed(network: FoldedResNet, x: Tensor, chunk: int) -> list[Tensor]:
    stages = zip(*stream_backbone(network, x.split(chunk, dim=2)), strict=True)
    return [unfold(torch.cat(parts), x.shape[2]) for parts in stages]


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of any slice, relative to the largest value of that slice."""
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs().amax((0, 1, 3, 4)) / theirs.abs().amax((0, 1, 3, 4))).max())


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_chunk_size_equals_one_pass_over_the_stack(name: str, padding: str):
    """In 37 slices there are inner ones that no padding reaches, and both ends."""
    network, x = backbone(name, z_padding=padding), stack(37)
    with torch.inference_mode():
        expected = network(x)
        for chunk in range(1, 33):
            for ours, theirs in zip(streamed(network, x, chunk), expected, strict=True):
                assert worst(ours, theirs) <= 1e-5


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("depth", [1, 2, 3, 8, 9, 17])
def test_series_shorter_than_the_reach_of_the_network(name: str, depth: int, padding: str):
    network, x = backbone(name, z_padding=padding), stack(depth)
    with torch.inference_mode():
        expected = network(x)
        for chunk in (1, 2, 5, 40):
            for ours, theirs in zip(streamed(network, x, chunk), expected, strict=True):
                assert worst(ours, theirs) <= 1e-5


def test_chunks_may_differ_in_length():
    network, x = backbone("mp3d18ba"), stack(30)
    with torch.inference_mode():
        parts = zip(*stream_backbone(network, x.split([1, 12, 2, 2, 13], dim=2)), strict=True)
        for ours, theirs in zip(parts, network(x), strict=True):
            assert worst(unfold(torch.cat(ours), 30), theirs) <= 1e-5


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
@pytest.mark.parametrize("name", BACKBONES)
def test_batch_norm_with_its_stored_statistics_streams(name: str, norm: str):
    network, x = backbone(name, norm), stack(25)
    with torch.inference_mode():
        for chunk in (1, 7, 16):
            for ours, theirs in zip(streamed(network, x, chunk), network(x), strict=True):
                assert worst(ours, theirs) <= 1e-5


def test_bfloat16_streams_what_it_computes_in_one_pass():
    network, x = backbone("mp3d18ba"), stack(25, size=64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(streamed(network, x, 8), network(x), strict=True):
            assert ours.dtype == torch.bfloat16
            assert worst(ours.float(), theirs.float()) <= 2e-2


def test_statistics_over_the_clip_cannot_be_streamed():
    with torch.inference_mode(), pytest.raises(ConfigError, match="model.norm is gn3d"):
        list(stream_backbone(backbone("mp3d18ba", "gn3d"), [stack(9)]))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_slice_comes_out_as_soon_as_nothing_more_can_change_it(name: str):
    """Slices per stage after the first 30 of a series that goes on: those that the 31st does not reach."""
    network, x = backbone(name), stack(31)
    changed = x.clone()
    changed[:, :, 30] += 1
    with torch.inference_mode():
        there = [len(features) for features in next(stream_backbone(network, [x[:, :, :30], x[:, :, 30:]]))]
        for count, one, other in zip(there, network(x), network(changed), strict=True):
            same = (one == other).all(dim=1).flatten(2).all(2).flatten()
            assert count == int(same.sum())


def test_what_is_kept_between_chunks_does_not_grow():
    network, z = backbone("mp3d63"), SeriesStream()
    kept = []
    with torch.inference_mode():
        for start in range(0, 80, 8):
            z.next_pass(is_first=start == 0, is_last=False)
            network.run(torch.randn(8, 1, 32, 32), z)
            kept.append(sum(tensor.untyped_storage().nbytes() for tensor in z._held))
    assert len(set(kept[3:])) == 1


def test_outputs_stay_channels_last():
    with torch.inference_mode():
        for chunk in stream_backbone(backbone("mp3d63"), stack(40).split(8, dim=2)):
            for features in chunk:
                assert len(features) == 0 or features.is_contiguous(memory_format=torch.channels_last)


def detector(**changes) -> LesionDetector:
    torch.manual_seed(0)
    model = ModelConfig(backbone="mp3d18ba", width=0.125, head=HEAD).override(changes)
    return LesionDetector(model, ClipConfig(image_size=64)).eval()


def series(depth: int) -> Tensor:
    noise = torch.randint(-1000, 1000, (depth, 40, 48), generator=torch.Generator().manual_seed(2))
    noise[:, 10:25, 12:30] += 500 * torch.arange(depth)[:, None, None] // depth
    return noise.short()


def assert_same(ours: list[Prediction], theirs: list[Prediction]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["mp3d18ba", "resnet3d18"])
@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("depth", [9, 10, 29])
def test_a_streamed_detector_equals_one_clip_of_all_slices(backbone: str, depth: int, padding: str):
    model, slices = detector(backbone=backbone, z_padding=padding), series(depth)
    with torch.inference_mode():
        expected = model([Clip(slices, tuple(range(4, depth - 4)))])
        assert all(len(prediction["scores"]) > 0 for prediction in expected)
        for chunk in (1, 4, 16, 64):
            parts = list(stream_predictions(model, slices.split(chunk), at_once=3))
            assert all(1 <= len(part) <= 3 for part in parts)
            assert_same([prediction for part in parts for prediction in part], expected)
