"""The fast 3 x 3 convolution against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d

from mp3d import recipes
from mp3d.device import ready_for_inference
from mp3d.models import LesionDetector, build_model
from mp3d.models.winograd import WinogradConv2d, use_winograd

CPU = torch.device("cpu")


def plain_conv(channels: int, out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, bias=bias)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_it_is_the_convolution_at_every_size(n: int, channels: int, out: int, height: int, width: int, bias: bool):
    conv = plain_conv(channels, out, bias).double()
    x = torch.randn(n, channels, height, width, dtype=torch.float64).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(WinogradConv2d(conv)(x), conv(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 64, 64), (2, 100, 90), (40, 8, 8)], ids=str)
def test_float32_is_right_to_two_hundred_thousandths_and_many_tiles_join(size: tuple[int, int, int]):
    n, height, width = size
    torch.manual_seed(0)
    conv = plain_conv(128, 128)
    x = torch.randn(n, 128, height, width).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        y = WinogradConv2d(conv)(x)
        assert conv.bias is not None
        exact = conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_only_plain_wide_convolutions_are_replaced():
    kept = [
        plain_conv(64, 128),
        nn.Conv2d(128, 128, 3, stride=2, padding=1),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 3),
    ]
    model = nn.Sequential(*kept, nn.Sequential(plain_conv(128, 128)))
    use_winograd(model)
    assert [type(layer) for layer in model] == [nn.Conv2d] * len(kept) + [nn.Sequential]
    assert isinstance(model[-1][0], WinogradConv2d)


@pytest.mark.parametrize(("capability", "count"), [("AVX2", 5), ("AVX512", 0), ("DEFAULT", 0)])
def test_a_detector_has_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, capability: str, count: int):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = recipes.deeplesion_mp3d63().override({"model.width": 8, "clip.image_size": 64})
    model = build_model(config.model, config.clip)
    assert isinstance(model, LesionDetector)
    assert ready_for_inference(model, config.clip, "fp32", CPU) is None
    assert sum(isinstance(module, WinogradConv2d) for module in model.modules()) == count
