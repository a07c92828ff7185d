"""Where a model computes, and in which number format."""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from mp3d.errors import ConfigError, ResourceError

DeviceName = Literal["auto", "cpu", "gpu"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

CPU_BF16_FEATURES = ("avx512_bf16", "amx_bf16")
"""Instruction sets that multiply bfloat16 in hardware; everything else emulates it, slower than float32."""


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
    """A model answers in the precision that it was trained in, except that float16 becomes float32 on a CPU."""
    return resolve_precision("fp32" if trained_in == "fp16" and device.type == "cpu" else trained_in, device)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to what :func:`resolve_precision` returned; does nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases of PyTorch cannot say; float32 is right everywhere.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(feature, False) for feature in CPU_BF16_FEATURES)
