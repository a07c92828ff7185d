"""What stops training and is no defect, told as an error of ours: full memory, a full disk, a lost reading process."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mp3d.data.shard import is_disk_full, is_not_writable
from mp3d.errors import ResourceError, TrainingStopped

_NO_MEMORY = "can't allocate memory"
"""PyTorch's words where a CPU has none left; of a GPU it has an error."""
_LOST_READER = re.compile(r"DataLoader worker \(pid")


@contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """
    Raises:
        ResourceError: memory or disk is full, or the folder of the run takes nothing any more.
        TrainingStopped: a process of ``launch.loader_workers`` was killed.
    """
    try:
        yield
    except OSError as error:
        if not (is_disk_full(error) or is_not_writable(error)):
            raise
        raise ResourceError(
            f"{error.filename or run_dir} cannot be written ({error.strerror or error}); make room; the same command "
            "goes on from the last epoch"
        ) from error
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY in text:
            raise ResourceError(
                f"no memory is left for a step ({text.splitlines()[0]}); lower loop.batch_size, and raise "
                "loop.accumulate as much to keep the batch, under a new --name"
            ) from error
        if _LOST_READER.search(text):
            raise TrainingStopped(
                f"a process that reads clips was lost ({text.splitlines()[0]}); out of memory? With a lower "
                "launch.loader_workers the same command goes on from the last whole epoch"
            ) from error
        raise
