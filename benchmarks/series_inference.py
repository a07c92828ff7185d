"""A whole series by window, slab and stream, beside the published style and a 2D detector: CPU time and memory.

    python benchmarks/series_inference.py [--size 512] [--slices 64] [--rounds 5] [--proposals 1000] [--peak]

MP3D-63 with random weights on noise, whose answers cost as much as any. Every row takes its turn in every round; the
tables hold medians of CPU seconds per slice of the z grid, which other processes disturb less than the clock. Windows
and slabs are timed on a sample of the series, streams on all of it, their slow start and end included. ``--peak``
also runs series of 64 and of 256 slices in processes of their own and reports their peak memory.

At 512 x 512 on one core a round takes about two minutes and ``--peak`` fifteen.
"""

import argparse
import copy
import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int16
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.data.clips import series_grid
from mp3d.device import autocast, pick_device, resolve_precision
from mp3d.models import LesionDetector
from mp3d.models.folded import NormKind
from mp3d.models.stream import stream_pyramids
from mp3d.predict import AT_ONCE, DETECTED_AT_ONCE, Predictor, SeriesMode
from mp3d.sample import Clip

CPU = pick_device("cpu")
MODES: tuple[SeriesMode, ...] = ("window", "slab", "stream")
SAMPLE: dict[SeriesMode, int] = {"window": 4, "slab": 9}
"""Grid slices on which a mode is timed; a stream is timed on all."""
PICTURES = 8
"""Three-slice pictures in a batch of the 2D detector."""
MB = 2**20


@dataclass(frozen=True)
class Row:
    """Something that is timed: ``run`` computes some grid slices and returns how many."""

    name: str
    part: str
    precision: str
    run: Callable[[], int]


def noise(num_slices: int, size: int) -> Int16[np.ndarray, "n h w"]:
    return np.random.default_rng(0).integers(-1024, 1050, (num_slices, size, size)).astype(np.int16)


def build(size: int, proposals: int, norm: NormKind) -> LesionDetector:
    torch.manual_seed(0)
    head = DetectionHead(rpn_post_nms=(1000, proposals))
    return LesionDetector(ModelConfig(norm=norm, head=head), ClipConfig(image_size=size)).eval()


def whole(model: LesionDetector, mode: SeriesMode, dtype: torch.dtype | None, hu: np.ndarray) -> Callable[[], int]:
    """Everything from the slices in HU to boxes."""
    clip = model.transform.config
    hu = hu[: SAMPLE.get(mode)]
    predictor = Predictor(model, clip, 0.5, CPU, dtype, mode)
    grid = series_grid(len(hu), 2.5, clip)
    return lambda: sum(len(predictions) for predictions in predictor.answers(hu, grid))


def backbone(model: LesionDetector, mode: SeriesMode, dtype: torch.dtype | None, hu: np.ndarray) -> Callable[[], int]:
    """From normalised slices to the maps of the group transforms."""
    neck = copy.copy(model.backbone)
    neck._modules = {**neck._modules, "fpn": nn.Identity()}
    keys = SAMPLE.get(mode, len(hu))
    clip = Clip(torch.from_numpy(np.resize(hu, (keys + 8, *hu.shape[1:]))), ())
    x = model.transform([clip])[0].tensors

    def run() -> int:
        with torch.inference_mode(), autocast(CPU, dtype):
            if mode == "window":
                neck(torch.cat([x[:, :, key : key + 9] for key in range(keys)]), [(4,)] * keys)
            elif mode == "slab":
                neck(x, [range(4, 4 + keys)])
            else:
                for _ in stream_pyramids(neck, x.split(AT_ONCE["stream"], dim=2), DETECTED_AT_ONCE):
                    pass
        return keys

    return run


def flat(size: int, proposals: int, dtype: torch.dtype | None) -> Callable[[], int]:
    """torchvision's Faster R-CNN with ResNet-50, its colours three neighbouring slices."""
    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=2,
        min_size=size,
        max_size=size,
        rpn_post_nms_top_n_test=proposals,
        box_score_thresh=0.0,
    ).eval()
    pictures = list(torch.rand(PICTURES, 3, size, size))

    def run() -> int:
        with torch.inference_mode(), autocast(CPU, dtype):
            return len(model(pictures))

    return run


def rows_of(size: int, num_slices: int, proposals: int) -> list[Row]:
    hu = noise(num_slices, size)
    default, published = build(size, proposals, "slice_gn"), build(size, proposals, "gn3d")
    precisions = {"fp32": None, "bf16": torch.bfloat16}
    if resolve_precision("auto", CPU) is None:
        del precisions["bf16"]
    rows = []
    for part, make in (("backbone", backbone), ("detector", whole)):
        rows.append(Row("window, published norm (gn3d)", part, "fp32", make(published, "window", None, hu)))
        for precision, dtype in precisions.items():
            for mode in MODES:
                rows.append(Row(mode, part, precision, make(default, mode, dtype, hu)))
    for precision, dtype in precisions.items():
        rows.append(Row("torchvision 2D, 3 slices", "detector", precision, flat(size, proposals, dtype)))
    return rows


def time_rows(rows: list[Row], rounds: int) -> list[float]:
    """Median CPU seconds per grid slice, after one round to warm up."""
    seconds: list[list[float]] = [[] for _ in rows]
    for done in range(rounds + 1):
        for row, times in zip(rows, seconds, strict=True):
            gc.collect()
            start = time.process_time()
            count = row.run()
            times.append((time.process_time() - start) / count)
        print(f"round {done}/{rounds}", file=sys.stderr, flush=True)
    return [statistics.median(times[1:]) for times in seconds]


def print_table(rows: list[Row], medians: list[float]) -> None:
    of = {(row.part, row.name, row.precision): median for row, median in zip(rows, medians, strict=True)}
    print("| what | part | precision | CPU s per slice | window of the same precision over it | published over it |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row, median in zip(rows, medians, strict=True):
        window = of["detector" if "2D" in row.name else row.part, "window", row.precision]
        published = next(value for (part, name, _), value in of.items() if part == row.part and "published" in name)
        print(
            f"| {row.name} | {row.part} | {row.precision} | {median:.4f} | {window / median:.2f} | "
            f"{published / median:.2f} |"
        )
    for precision in sorted({row.precision for row in rows}):
        ratio = of["detector", "stream", precision] / of["detector", "torchvision 2D, 3 slices", precision]
        print(f"\nnine slices streamed over torchvision's three, {precision}: {ratio:.2f}")


def peak(size: int, mode: SeriesMode, num_slices: int, proposals: int, precision: str) -> None:
    """Run one series and print the peak of this process before and after, in bytes."""
    hu = noise(num_slices, size)
    model = build(size, proposals, "slice_gn")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    whole(model, mode, torch.bfloat16 if precision == "bf16" else None, hu)()
    print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def print_peaks(size: int, proposals: int, precision: str) -> None:
    print(
        f"\n| mode, {precision} | slices | peak of the process, MB | of it before the first slice (weights, volume) |"
    )
    print("| --- | --- | --- | --- |")
    series: list[tuple[SeriesMode, int]] = [("window", 64), ("slab", 64), ("stream", 64), ("stream", 256)]
    for mode, num_slices in series:
        options = [str(size), mode, str(num_slices), str(proposals), precision]
        done = subprocess.run(
            [sys.executable, __file__, "--one-peak", *options], capture_output=True, text=True, check=True
        )
        before, after = map(int, done.stdout.split())
        print(f"| {mode} | {num_slices} | {after / MB:.0f} | {before / MB:.0f} |", flush=True)


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="rows and columns")
    parser.add_argument("--slices", type=int, default=64, help="slices of the streamed series")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--proposals", type=int, default=1000, help="per key slice, for ours and torchvision's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", action="store_true", help="also peak memory of 64 and 256 slices")
    parser.add_argument("--one-peak", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_peak:
        size, mode, num_slices, proposals, precision = args.one_peak
        return peak(int(size), mode, int(num_slices), int(proposals), precision)

    precision = "fp32" if resolve_precision("auto", CPU) is None else "bf16"
    print(f"{args.threads} thread(s) of {cpu_model()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    print(f"{args.slices} slices of {args.size} x {args.size}, {args.proposals} proposals, {args.rounds} rounds\n")
    rows = rows_of(args.size, args.slices, args.proposals)
    print_table(rows, time_rows(rows, args.rounds))
    if args.peak:
        print_peaks(args.size, args.proposals, precision)
    return None


if __name__ == "__main__":
    main()
