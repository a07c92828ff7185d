"""A disposable worker that reads released checkpoints: ``python -m mp3d.released_worker SOCKET MEMORY LIMITS``.

Like the decoders' (:mod:`mp3d.data.decode_worker`), but with torch, for the one kind of pickle that is ever opened.
"""

import re
import sys
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mp3d.data.decode import Task
from mp3d.data.decode_worker import main
from mp3d.errors import Refusal
from mp3d.models.released_file import load_tensors


@lru_cache(maxsize=1)
def tensors_of(path: Path) -> dict[str, Tensor]:
    """Raises: Refusal where the file holds anything but tensors and plain values, or no state dict."""
    try:
        tensors = load_tensors(path)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        what = f"a {named[1]}" if named else "what is no plain value"
        raise Refusal(
            "DECODE_FAILED", f"it holds {what} beside tensors, which is not opened; save the state dict alone"
        ) from None
    except ValueError as error:
        raise Refusal("DECODE_FAILED", f"it holds {error}") from None
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise Refusal("DECODE_FAILED", f"its tensor {name[:100]!r} is no plain array of numbers")
    return tensors


def list_tensors(source: Path) -> tuple[Any, None]:
    """Every tensor's name and shape."""
    return [[name, list(tensor.shape)] for name, tensor in tensors_of(source).items()], None


def read_values(source: Path, name: str, first: int, count: int) -> tuple[None, np.ndarray]:
    """Some values of a tensor in C order, as float32 or int64."""
    tensor = tensors_of(source)[name]
    values = tensor.float() if tensor.is_floating_point() else tensor.long()
    return None, values.contiguous().view(-1)[first : first + count].numpy()


TASKS: dict[str, Task] = {"list_tensors": list_tensors, "read_values": read_values}

if __name__ == "__main__":
    main(sys.argv[1:], TASKS)
