"""A disposable worker of :mod:`mp3d.data.decode`: ``python -m mp3d.data.decode_worker SOCKET MEMORY LIMITS``.

It takes one request after the other until the other end closes the channel, or until a limit or a fault ends it.
"""

import json
import math
import mmap
import os
import resource
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mp3d.data.decode import SHARED_BYTES, Limits, Task, receive, receive_bytes, send
from mp3d.data.dicom.isolated import TASKS as DICOM_TASKS
from mp3d.errors import Refusal


def _read_structure_set(source: Path | bytes, **arguments: Any) -> tuple[Any, np.ndarray | None]:
    from mp3d.data.rtstruct import structure_set_task  # scipy, for masks; most workers see no contour

    return structure_set_task(source, **arguments)


def _read_segmentation(source: Path | bytes, **arguments: Any) -> tuple[Any, np.ndarray | None]:
    from mp3d.data.segmentation import segmentation_task

    return segmentation_task(source, **arguments)


TASKS: dict[str, Task] = DICOM_TASKS | {
    "read_structure_set": _read_structure_set,
    "read_segmentation": _read_segmentation,
}
"""All that a worker can be asked to do."""


def main(argv: list[str], tasks: dict[str, Task] = TASKS) -> None:
    channel = socket.socket(fileno=int(argv[0]))
    shared = np.frombuffer(mmap.mmap(int(argv[1]), SHARED_BYTES), np.uint8)
    os.close(int(argv[1]))
    limits = Limits(**json.loads(argv[2]))
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    send(channel, b"ready")
    while True:
        try:
            task, path, num_bytes, arguments = json.loads(receive(channel))
            source = bytes(receive_bytes(channel, num_bytes)) if path is None else Path(path)
        except (EOFError, OSError):
            return
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + limits.cpu_s)
        send(channel, json.dumps(answer(tasks[task], source, arguments, shared)).encode())


def answer(task: Task, source: Path | bytes, arguments: dict[str, Any], shared: np.ndarray) -> dict[str, Any]:
    """The answer to one request, as JSON has it; an array is left in ``shared``."""
    try:
        value, array = task(source, **arguments)
    except Refusal as refusal:
        return {"refusal": [refusal.reason, refusal.detail]}
    except BaseException as error:  # the one boundary: the panics of some decoders are no Exception
        return {"error": type(error).__name__}
    if array is None:
        return {"value": value}
    if array.nbytes > len(shared):
        return {"error": "MemoryError"}
    np.copyto(shared[: array.nbytes].view(array.dtype).reshape(array.shape), array)
    return {"value": value, "array": {"dtype": array.dtype.str, "shape": array.shape}}


def _limit(kind: int, value: int) -> None:
    """The hard limit stays, so that the next file's limit of processor time can be higher."""
    _, hard = resource.getrlimit(kind)
    try:
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    except (ValueError, OSError):  # macOS cannot limit address space
        return


if __name__ == "__main__":
    main(sys.argv[1:])
