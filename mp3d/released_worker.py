"""A disposable worker that reads released checkpoints: ``python -m mp3d.released_worker SOCKET MEMORY LIMITS``.

Like the decoders' (:mod:`mp3d.data.decode_worker`), but with torch: the authors' files are pickles, the only ones that
are ever opened, and only here, restricted to tensors and plain values (``weights_only``).
"""

import re
import sys
from collections.abc import Mapping
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

WRAPPERS = ("state_dict", "model")
"""Keys under which training programs keep the weights."""

COUNTERS = (torch.int64, torch.int32)
"""What is no weight, such as the number of batches that a batch norm has seen."""


@lru_cache(maxsize=1)
def tensors_of(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file.

    Raises:
        Refusal: the file holds anything but tensors and plain values, or no state dict.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        what = f"{named[1]} beside tensors" if named else "no weights, or damaged ones"
        raise Refusal("DECODE_FAILED", f"it holds {what}, which is not opened; save its state dict alone") from None
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise Refusal("DECODE_FAILED", "it holds no state dict, a table of tensors by their names")
    for name, tensor in content.items():
        is_plain = tensor.layout == torch.strided and tensor.nbytes <= tensor.untyped_storage().nbytes()
        if not is_plain or not (tensor.is_floating_point() or tensor.dtype in COUNTERS):
            raise Refusal("DECODE_FAILED", f"its tensor {str(name)[:100]!r} is no plain array of numbers")
    return content


def list_tensors(source: Path) -> tuple[Any, None]:
    """Every tensor's name and shape."""
    return [[str(name), list(tensor.shape)] for name, tensor in tensors_of(source).items()], None


def read_values(source: Path, name: str, first: int, count: int) -> tuple[None, np.ndarray]:
    """Some values of a tensor in C order, as float32 or int64.

    Raises:
        Refusal: some are not finite.
    """
    tensor = tensors_of(source)[name].detach()
    values = (tensor.float() if tensor.is_floating_point() else tensor.long()).contiguous().view(-1)
    if not bool(values[first : first + count].isfinite().all()):
        raise Refusal("DECODE_FAILED", f"its tensor {name[:100]!r} has values that are not finite")
    return None, values[first : first + count].numpy()


TASKS: dict[str, Task] = {"list_tensors": list_tensors, "read_values": read_values}

if __name__ == "__main__":
    main(sys.argv[1:], TASKS)
