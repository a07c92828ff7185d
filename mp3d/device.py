"""Where a model computes, in which number format, and whether that gives the right numbers."""

import ctypes
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mp3d.config import ClipConfig
from mp3d.errors import ConfigError, ResourceError
from mp3d.models.detector import LesionDetector
from mp3d.models.folded import Conv, fuse_batch_norms
from mp3d.models.group_transform import GroupTransform
from mp3d.models.resnet import FoldedResNet
from mp3d.models.winograd import use_winograd

DeviceName = Literal["auto", "cpu", "gpu"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

logger = logging.getLogger(__name__)

CPU_BF16_FEATURES = ("avx512_bf16", "amx_bf16")
"""Instruction sets that multiply bfloat16 in hardware; everything else emulates it, slower than float32."""


MAX_DIFFERENCE = 0.25
"""Of features in half precision from those in float32, on the worst slice, row, column or channel, relative to the norm
of an average one. Rounding makes a few hundredths of MP3D-63, a tenth of its worst channels; a wrong kernel makes one.
"""

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of ``mallopt`` in GNU's ``malloc.h``."""


def pick_device(name: DeviceName = "auto") -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU, for which memory is kept (:func:`keep_memory`).

    Raises:
        ResourceError: ``gpu`` was asked for and there is none.
    """
    if name == "gpu" and not torch.cuda.is_available():
        raise ResourceError(
            "a gpu was asked for, but PyTorch sees none here; use auto or cpu, or check the driver with nvidia-smi"
        )
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    keep_memory()
    return torch.device("cpu")


def keep_memory() -> None:
    """Have this process keep what it frees, for the next tensor, instead of giving it back to the system.

    The GNU allocator gives back every block above 32 MB at once, and the system clears the pages of each new one: a
    quarter to a third of the CPU time of a network at 512 x 512. Other allocators are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)  # the arenas that threads would have of their own hold no block above 64 MB


def resolve_precision(precision: PrecisionName, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None is plain float32.

    Args:
        precision: ``auto`` is bfloat16 where the device multiplies it in hardware, else float32.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    match precision:
        case "fp32":
            return None
        case "bf16":
            return torch.bfloat16
        case "fp16":
            if device.type == "cpu":
                raise ConfigError("precision is fp16, which no CPU trains in; use auto, bf16 or fp32")
            return torch.float16
        case "auto":
            return torch.bfloat16 if _computes_in_bf16(device) else None


def inference_dtype(trained_in: PrecisionName, device: torch.device) -> torch.dtype | None:
    """A model answers in the precision that it was trained in, or in float32 where the device has no such hardware."""
    no_fp16 = trained_in == "fp16" and device.type == "cpu"
    no_bf16 = trained_in == "bf16" and not _computes_in_bf16(device)
    return None if no_fp16 or no_bf16 else resolve_precision(trained_in, device)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to what :func:`resolve_precision` returned; does nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def put_on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves a model in place; on a GPU its kernels get the memory layout that cuDNN's fast convolutions read, and would
    else bring them to in every pass.
    """
    model.to(device)
    if device.type == "cuda":
        use_channels_last(model)
    return model


def use_channels_last(model: nn.Module) -> None:
    """Kernels in the memory layout of the features, in place."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the weights of convolutions and products in half precision, in place: what autocast makes of them in every
    pass.
    """
    for module in model.modules():
        if isinstance(module, Conv | nn.Conv2d | nn.Conv3d | nn.Linear | GroupTransform):
            module.to(dtype)


def ready_for_inference(
    model: nn.Module, clip: ClipConfig, trained_in: PrecisionName, device: torch.device, *, compiled: bool = False
) -> torch.dtype | None:
    """Puts a trained model on its device, in evaluation mode, its batch norms fused, and checks its precision. In half
    precision it is good for inference under :func:`autocast` only, and not to be given here again.

    On a CPU without AVX-512, float32 takes fast kernels for 3 x 3 convolutions (:mod:`mp3d.models.winograd`).

    Args:
        compiled: compile it too (:func:`compile_layers`).

    Returns:
        What it is to compute in, for :func:`autocast`.
    """
    put_on_device(model, device).eval()
    fuse_batch_norms(model)
    dtype = checked_precision(model, clip, inference_dtype(trained_in, device))
    if dtype is not None:
        round_weights(model, dtype)
    if compiled:
        compile_layers(model)
    elif device.type == "cpu" and dtype is None and torch.backends.cpu.get_cpu_capability() == "AVX2":
        use_winograd(model)
    return dtype


def compile_layers(model: nn.Module) -> None:
    """Have ``torch.compile`` make kernels, at the first call, of the layers whose shapes are known: the backbone on
    whole clips, the feature pyramid, the head of the region proposal network. It takes minutes, again for every new
    shape. A series that is streamed has the latter two only.
    """
    for name, module in model.named_modules():
        if isinstance(module, FoldedResNet) or name.endswith((".fpn", "rpn.head")):
            module.compile(dynamic=False)
        if isinstance(module, FoldedResNet):
            module.with_stem = torch.compile(module.with_stem, dynamic=False)


def checked_precision(model: nn.Module, clip: ClipConfig, dtype: torch.dtype | None) -> torch.dtype | None:
    """``dtype`` where the model's layers give the same features in it as in float32, on a made clip of the real shape:
    the stages of the 3D backbone, and of a detector the feature pyramid and the region proposals. Else None, which is
    float32, with a warning. Kernels for half precision were wrong on some devices before. In training mode it is the
    kernels of training that are checked, forward.

    The model is left as it was, its batch statistics too.
    """
    if dtype is None:
        return None
    device = next(model.parameters()).device
    x = torch.randn(1, 1, clip.depth, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = _features(model, x.to(device))
    with torch.set_grad_enabled(model.training), autocast(device, dtype):
        rounded = _features(model, x.to(device))
    for name, features in exact.items():
        difference = _worst_difference(features, rounded[name])
        if not difference <= MAX_DIFFERENCE:
            logger.warning(
                "%s on %s gives other features than float32: %s is off by %.3g (at most %g is rounding); float32 is "
                "used instead",
                str(dtype).removeprefix("torch."), device, name, difference, MAX_DIFFERENCE,
            )  # fmt: skip
            return None
    return dtype


def _features(model: nn.Module, x: Float[Tensor, "1 1 d h w"]) -> dict[str, Tensor]:
    """What the layers of known shapes give, by name, in float32."""
    (backbone,) = (module for module in model.modules() if isinstance(module, FoldedResNet))
    found: dict[str, Tensor] = {}

    def keep_stages(_module: nn.Module, _inputs: Any, stages: list[Tensor]) -> None:
        found.update({f"stage {number} of the backbone": stage for number, stage in enumerate(stages, start=1)})

    hook = backbone.register_forward_hook(keep_stages)
    try:
        neck = model.backbone if isinstance(model, LesionDetector) else backbone
        buffers = {name: buffer.clone() for name, buffer in neck.named_buffers()}
        if isinstance(model, LesionDetector):
            maps = functional_call(neck, buffers, (x, [(x.shape[2] // 2,)]))
            logits, deltas = model.rpn.head(list(maps.values()))
            for level, pyramid, *proposals in zip(maps, maps.values(), logits, deltas, strict=True):
                found[f"map {level} of the feature pyramid"] = pyramid
                found[f"the region proposals on map {level}"] = torch.cat(proposals, 1)
        else:
            functional_call(neck, buffers, (x,))
    finally:
        hook.remove()
    return {name: each.detach().float() for name, each in found.items()}


def _worst_difference(exact: Tensor, rounded: Tensor) -> float:
    """Relative, of the worst part along any axis: a fault in one slice or channel is lost in the mean of all."""
    worst = []
    for axis in range(exact.dim()):
        others = [other for other in range(exact.dim()) if other != axis]
        differences = (exact - rounded).pow(2).mean(others).sqrt()
        worst.append(differences.max() / exact.pow(2).mean().sqrt())
    return torch.stack(worst).max().item()


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases of PyTorch cannot say; float32 is right everywhere.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(feature, False) for feature in CPU_BF16_FEATURES)
