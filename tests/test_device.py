"""Which device and number format are chosen, whatever this machine is."""

import copy
import platform
import subprocess
import sys

import pytest
import torch

from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.device import autocast, inference_dtype, pick_device, resolve_precision, round_weights, use_channels_last
from mp3d.errors import ConfigError, ResourceError
from mp3d.models import build_model
from mp3d.sample import Clip

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("name", "has_gpu", "chosen"), [("auto", False, CPU), ("auto", True, GPU), ("cpu", True, CPU)])
def test_device(monkeypatch: pytest.MonkeyPatch, name, has_gpu: bool, chosen: torch.device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert pick_device(name) == chosen


def test_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="nvidia-smi"):
        pick_device("gpu")


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [("fp32", GPU, None), ("bf16", CPU, torch.bfloat16), ("fp16", GPU, torch.float16)],
)
def test_named_precision_is_taken(precision, device: torch.device, dtype: torch.dtype | None):
    assert resolve_precision(precision, device) is dtype


def test_fp16_on_a_cpu_is_refused_for_training_and_replaced_for_inference():
    with pytest.raises(ConfigError, match="bf16 or fp32"):
        resolve_precision("fp16", CPU)
    assert inference_dtype("fp16", CPU) is None
    assert inference_dtype("fp16", GPU) is torch.float16


def test_inference_in_bf16_needs_hardware_for_it(monkeypatch: pytest.MonkeyPatch):
    """Emulated it is several times slower than float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert inference_dtype("bf16", CPU) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert inference_dtype("bf16", CPU) is None


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, None),
        ({}, None),
    ],
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch, capabilities: dict, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) is dtype


def test_auto_is_fp32_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", CPU) is None


def test_autocast_computes_in_the_dtype():
    x = torch.ones(4, 4)
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
    with autocast(CPU, None):
        assert (x @ x).dtype is torch.float32


@pytest.mark.parametrize(("backbone", "norm"), [("mp3d18ba", "slice_gn"), ("resnet3d18", "gn3d"), ("p3d63", "bn")])
def test_rounded_weights_are_what_autocast_makes_of_them(backbone: str, norm: str):
    """In the layout of a GPU too."""
    torch.manual_seed(0)
    head = DetectionHead(fpn_channels=8, box_features=16, rpn_post_nms=(50, 50))
    model = build_model(ModelConfig(backbone=backbone, norm=norm, width=0.125, head=head), ClipConfig(image_size=32))
    rounded = copy.deepcopy(model)
    round_weights(rounded, torch.bfloat16)
    use_channels_last(rounded)
    clip = Clip(torch.randint(-1000, 1000, (9, 32, 32), dtype=torch.int16), (4,))
    with torch.inference_mode(), autocast(CPU, torch.bfloat16):
        expected, found = (each.eval()([clip])[0] for each in (model, rounded))
    assert len(found["scores"]) > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_for_the_next_tensor():
    """Page faults of ten tensors of 64 MB, after the first ten, in a thread of a process of its own."""
    code = """
import resource, threading, torch
from mp3d.device import pick_device
pick_device("cpu")
faults = []
def work():
    for _ in range(21):
        torch.zeros(2**24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults[-1] - faults[10])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000, "each tensor has 16384 pages"
