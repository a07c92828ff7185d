"""What the tables say of the machine, and of its processes."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

TICK = os.sysconf("SC_CLK_TCK")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def device_name(device: torch.device, threads: int) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} thread(s) of {cpu_model()}"


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of the processor, which other processes disturb less than the clock; with a GPU, of the clock."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def cpu_s(root: int, without: set[int]) -> float:
    """Of a process and all below it, those that have ended included, except some."""
    times, children = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        times[int(stat.parent.name)] = sum(map(int, fields[11:15]))
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    below, total = [root], 0
    while below:
        pid = below.pop()
        if pid not in without:
            total += times[pid]
            below += children.get(pid, [])
    return total / TICK
