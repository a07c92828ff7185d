"""A worker of mp3d.data.decode whose tasks do what a decoder does to hostile bytes."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mp3d.data import decode_worker
from mp3d.errors import Refusal

Source = Path | bytes


class Panic(BaseException):
    """As the Rust decoders raise it: no Exception."""


def echo(source: Source, **arguments: Any) -> tuple[Any, np.ndarray]:
    content = source if isinstance(source, bytes) else source.read_bytes()
    return arguments | {"pid": os.getpid()}, np.frombuffer(content, np.uint8).reshape(1, -1)


def count(_: Source, number: int) -> Any:
    return {"number": number, "pid": os.getpid()}, None


def die(_: Source, number: int) -> Any:
    os.kill(os.getpid(), number)
    time.sleep(60)


def spin(_: Source) -> Any:
    while True:
        pass


def stand_still(_: Source) -> Any:
    time.sleep(60)


def fill_memory(_: Source) -> Any:
    return None, np.ones(3 * 2**30, np.uint8)


def answer_too_much(_: Source) -> Any:
    return None, np.ones(2**27, np.uint8)


def panic(_: Source) -> Any:
    raise Panic("CANARY")


def refuse(_: Source) -> Any:
    raise Refusal("NOT_CT", "as the task says")


def write_file(_: Source, path: str) -> Any:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    Path(path).write_bytes(b"x")


def look_around(_: Source) -> Any:
    return {"modules": sorted(sys.modules), "environment": dict(os.environ)}, None


decode_worker.TASKS |= {
    task.__name__: task
    for task in (
        echo,
        count,
        die,
        spin,
        stand_still,
        fill_memory,
        answer_too_much,
        panic,
        refuse,
        write_file,
        look_around,
    )
}

if __name__ == "__main__":
    decode_worker.main(sys.argv[1:])
