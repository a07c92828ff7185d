"""A whole series by window, slab and stream, beside the published style and a 2D detector: time and memory.

    python benchmarks/series_inference.py [--device auto] [--size 512] [--slices 64] [--series 1] [--rounds 5]
                                          [--proposals 300] [--rows PATTERN] [--peak]

MP3D-63 with random weights on noise, whose answers cost as much as any. All rows take turns, round after round; the
table holds milliseconds per slice of the z grid: of the processor, which other processes disturb less than the clock,
or, with a GPU, of the clock. Windows and slabs are timed on a sample in every round, and their median counts. A stream
goes on in each round where it stopped in the last, and its whole series counts, slow start and end included; with
``--series 5`` five series are streamed so, and the median of their totals counts. ``--peak`` also runs series of 64 and
of 256 slices in processes of their own and reports their peak memory.

At 512 x 512 on one core a series with its five rounds takes about ten minutes and ``--peak`` as long.
"""

import argparse
import copy
import gc
import math
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int16
from machine import device_name, seconds_of
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.data.clips import series_grid
from mp3d.device import (
    DeviceName,
    PrecisionName,
    autocast,
    pick_device,
    put_on_device,
    ready_for_inference,
    resolve_precision,
)
from mp3d.models import LesionDetector
from mp3d.models.folded import NormKind
from mp3d.models.stream import stream_pyramids
from mp3d.predict import AT_ONCE, AT_ONCE_ON_GPU, DETECTED_AT_ONCE, Predictor, SeriesMode
from mp3d.sample import Clip

MODES: tuple[SeriesMode, ...] = ("window", "slab", "stream")
SAMPLE: dict[SeriesMode, int] = {"window": 2, "slab": 9}
"""Grid slices on which a CPU is timed in a round; a GPU on those that it reads at once. A stream is timed on all of the
series.
"""
PICTURES = 16
"""Three-slice pictures in a batch of the 2D detector."""
PUBLISHED = "window, published norm (gn3d)"
FLAT = "torchvision 2D, 3 slices"
DEVICES = {"cpu": "cpu", "cuda": "gpu"}
MB = 2**20


@dataclass
class Row:
    """Something that is timed.

    Attributes:
        start: begins a series, or a sample of one, and yields after each piece the number of slices that it answered.
        is_stream: a piece is no whole.
        seconds: per slice, of each sample or each streamed series.
    """

    name: str
    part: str
    precision: str
    start: Callable[[], Iterator[int]]
    is_stream: bool = False
    seconds: list[float] = field(default_factory=list)


def noise(num_slices: int, size: int) -> Int16[np.ndarray, "n h w"]:
    return np.random.default_rng(0).integers(-1024, 1050, (num_slices, size, size), np.int16)


def sample(mode: SeriesMode, device: torch.device) -> int | None:
    """Grid slices on which a mode is timed; None: all of the series."""
    if mode == "stream":
        return None
    return SAMPLE[mode] if device.type == "cpu" else AT_ONCE_ON_GPU[mode]


def detected_at_once(device: torch.device) -> int:
    """Of a stream, as the predictor does it."""
    return DETECTED_AT_ONCE if device.type == "cpu" else AT_ONCE_ON_GPU["stream"]


def build(size: int, proposals: int, norm: NormKind, precision: PrecisionName, device: torch.device) -> LesionDetector:
    torch.manual_seed(0)
    head = DetectionHead(rpn_post_nms=(1000, proposals))
    model = LesionDetector(ModelConfig(norm=norm, head=head), ClipConfig(image_size=size))
    ready_for_inference(model, model.transform.config, precision, device)
    return model


def whole(model: LesionDetector, mode: SeriesMode, dtype: torch.dtype | None, hu: np.ndarray) -> Iterator[int]:
    """Everything from the slices in HU to boxes."""
    clip = model.transform.config
    device = next(model.parameters()).device
    hu = hu[: sample(mode, device)]
    grid = series_grid(len(hu), 2.5, clip)
    for predictions in Predictor(model, clip, 0.5, device, dtype, mode).answers(hu, grid):
        yield len(predictions)


def backbone(model: LesionDetector, mode: SeriesMode, dtype: torch.dtype | None, hu: np.ndarray) -> Iterator[int]:
    """From normalised slices to the maps of the group transforms."""
    neck: Any = copy.copy(model.backbone)
    neck._modules = {**neck._modules, "fpn": nn.Identity()}
    device = next(model.parameters()).device
    keys = sample(mode, device) or len(hu)
    at_once = (AT_ONCE if device.type == "cpu" else AT_ONCE_ON_GPU)["stream"]
    x = torch.from_numpy(np.resize(hu, (keys + 8, *hu.shape[1:]))).to(device)
    batches = (model.transform([Clip(part, ())])[0].tensors for part in x.split(at_once))
    answers: Iterator[int]
    match mode:
        case "stream":
            answers = (len(maps["0"]) for maps in stream_pyramids(neck, batches, detected_at_once(device)))
        case "slab":
            stack = torch.cat(list(batches), 2)
            slabs = torch.cat([stack[:, :, first : first + 17] for first in range(0, keys, 9)])
            answers = (len(neck(x, [range(4, 13)] * len(x))["0"]) for x in [slabs])
        case "window":
            stack = torch.cat(list(batches), 2)
            windows = torch.cat([stack[:, :, key : key + 9] for key in range(keys)])
            answers = (len(neck(x, [(4,)] * keys)["0"]) for x in [windows])
    while True:
        with torch.inference_mode(), autocast(device, dtype):
            done = next(answers, None)
        if done is None:
            return
        yield done


def flat(size: int, proposals: int, dtype: torch.dtype | None, device: torch.device) -> Callable[[], Iterator[int]]:
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
    )
    put_on_device(model, device).eval()
    pictures = list(torch.rand(PICTURES, 3, size, size, device=device))

    def run() -> Iterator[int]:
        with torch.inference_mode(), autocast(device, dtype):
            done = len(model(pictures))
        yield done

    return run


def rows_of(size: int, num_slices: int, proposals: int, device: torch.device) -> list[Row]:
    hu = noise(num_slices, size)
    published = build(size, proposals, "gn3d", "fp32", device)
    precisions: dict[PrecisionName, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
    if resolve_precision("auto", device) is None:
        del precisions["bf16"]
    ours = {name: build(size, proposals, "slice_gn", name, device) for name in precisions}
    rows = []
    for part, make in (("backbone", backbone), ("detector", whole)):
        rows.append(Row(PUBLISHED, part, "fp32", partial(make, published, "window", None, hu)))
        for precision, dtype in precisions.items():
            for mode in MODES:
                run = partial(make, ours[precision], mode, dtype, hu)
                rows.append(Row(mode, part, precision, run, mode == "stream"))
    for precision, dtype in precisions.items():
        rows.append(Row(FLAT, "detector", precision, flat(size, proposals, dtype, device)))
    return rows


def exhaust(pieces: Iterator[int], count: int | None) -> None:
    """The next pieces, or all that are left."""
    for _ in islice(pieces, count):
        pass


def time_rows(rows: list[Row], num_series: int, rounds: int, num_slices: int, device: torch.device) -> None:
    """Fill the rows' seconds, after a piece of each to warm up; on a GPU the whole, whose memory it then has."""
    for row in rows:
        sum(row.start()) if device.type == "cuda" else next(row.start())
    for series in range(num_series):
        going = {row.name + row.part + row.precision: row.start() for row in rows if row.is_stream}
        spent = dict.fromkeys(going, 0.0)
        for done in range(1, rounds + 1):
            for row in rows:
                gc.collect()
                name = row.name + row.part + row.precision
                if row.is_stream:
                    share = None if done == rounds else -(-num_slices // rounds // detected_at_once(device))
                    spent[name] += seconds_of(partial(exhaust, going[name], share), device)
                    if done == rounds:
                        row.seconds.append(spent[name] / num_slices)
                else:
                    answered: list[int] = []
                    seconds = seconds_of(lambda row=row, answered=answered: answered.extend(row.start()), device)
                    row.seconds.append(seconds / sum(answered))
            print(f"series {series + 1}/{num_series}, round {done}/{rounds}", file=sys.stderr, flush=True)


def print_table(rows: list[Row]) -> None:
    medians = {(row.part, row.name, row.precision): statistics.median(row.seconds) for row in rows}
    print("| what | part | precision | ms per slice | window of the same precision over it | published over it |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (part, name, precision), median in medians.items():
        window = medians.get((part, "window", precision), math.nan)
        published = medians.get((part, PUBLISHED, "fp32"), math.nan)
        ratios = f"{window / median:.2f} | {published / median:.2f}"
        print(f"| {name} | {part} | {precision} | {1000 * median:.2f} | {ratios} |")
    for precision in sorted({row.precision for row in rows}):
        flat_median = medians.get(("detector", FLAT, precision), math.nan)
        ratio = medians.get(("detector", "stream", precision), math.nan) / flat_median
        print(f"\nnine slices streamed over torchvision's three, {precision}: {ratio:.2f}")


def peak(
    size: int, mode: SeriesMode, num_slices: int, proposals: int, precision: PrecisionName, device: torch.device
) -> None:
    """Run one series and print the peak of this process before and after, in bytes; of a GPU that of its tensors."""
    hu = noise(num_slices, size)
    model = build(size, proposals, "slice_gn", precision, device)
    if device.type == "cuda":
        before = torch.cuda.max_memory_allocated()
        sum(whole(model, mode, torch.bfloat16 if precision == "bf16" else None, hu))
        print(before, torch.cuda.max_memory_allocated())
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sum(whole(model, mode, torch.bfloat16 if precision == "bf16" else None, hu))
    print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def print_peaks(size: int, proposals: int, precision: PrecisionName, device: torch.device) -> None:
    print(
        f"\n| mode, {precision} | slices | peak of the process, MB | of it before the first slice (weights, volume) |"
    )
    print("| --- | --- | --- | --- |")
    series: list[tuple[SeriesMode, int]] = [("stream", 64), ("stream", 256), ("slab", 64), ("window", 64)]
    for mode, num_slices in series:
        options = [str(size), mode, str(num_slices), str(proposals), precision]
        done = subprocess.run(
            [sys.executable, __file__, "--device", DEVICES[device.type], "--one-peak", *options],
            capture_output=True,
            text=True,
            check=True,
        )
        before, after = map(int, done.stdout.split())
        print(f"| {mode} | {num_slices} | {after / MB:.0f} | {before / MB:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--size", type=int, default=512, help="rows and columns")
    parser.add_argument("--slices", type=int, default=64, help="slices of the streamed series")
    parser.add_argument("--series", type=int, default=1, help="how many are streamed")
    parser.add_argument("--rounds", type=int, default=5, help="turns that a streamed series is cut into")
    parser.add_argument("--proposals", type=int, default=300, help="per key slice, for ours and torchvision's")
    parser.add_argument(
        "--rows", default="", help="only rows whose name, part and precision match, e.g. '^(window|stream)'"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", action="store_true", help="also peak memory of 64 and 256 slices")
    parser.add_argument("--one-peak", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    choice: DeviceName = args.device
    device = pick_device(choice)
    if args.one_peak:
        size, mode, num_slices, proposals, precision = args.one_peak
        return peak(int(size), mode, int(num_slices), int(proposals), precision, device)

    precision = "fp32" if resolve_precision("auto", device) is None else "bf16"
    print(f"{device_name(device, args.threads)}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    print(f"{args.series} series of {args.slices} slices of {args.size} x {args.size}, {args.proposals} proposals\n")
    rows = rows_of(args.size, args.slices, args.proposals, device)
    rows = [row for row in rows if re.search(args.rows, f"{row.name}, {row.part}, {row.precision}")]
    time_rows(rows, args.series, args.rounds, args.slices, device)
    print_table(rows)
    if args.peak:
        print_peaks(args.size, args.proposals, precision, device)
    return None


if __name__ == "__main__":
    main()
