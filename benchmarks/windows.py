"""Reading nine-slice windows: our shards and our cache beside a tensor column in Parquet; ratios within one run.

    python benchmarks/windows.py

Every window is read as training reads one that it has not seen lately, and copied into memory that stands ready:
nothing decoded is kept between windows, files are open and in the page cache, one thread. Shards and cache are read
with their checksums, the others without any. The tensor column is the type in which Ray Data stores arrays: with as
many rows in a row group as ours, by our codec and by that of Ray Data's defaults; and as Ray Data writes it unasked,
the whole block in one row group. The slices are those of the LIDC series in ``../shared/data`` (or
``MP3D_SHARED_DATA``), mirrored until there are enough, or made noise where they are absent; file sizes are told against
raw int16. All windows are compared first; methods take turns; medians of CPU time. Takes a minute.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int16
from machine import cpu_model
from ray.data.extensions import ArrowTensorArray

from mp3d.data.dicom import group_series, load_volume
from mp3d.data.prepare import prepare
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.shard import ShardSet, cached, open_shards
from mp3d.data.shard import cache as cache_module
from mp3d.data.shard import part_file as part_file_module
from mp3d.data.source import Item, Source

SHARED = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
DEPTH, NUM_SLICES, SIDE = 9, 96, 512
ROUNDS, WINDOWS = 7, 12

Stack = Int16[np.ndarray, "d h w"]
Read = Callable[[int], Stack]


def stack() -> tuple[Stack, str]:
    """The slices and what they are."""
    found = group_series(SHARED / "lidc").series if (SHARED / "lidc").is_dir() else []
    if not found:
        return np.random.default_rng(0).normal(0, 15, (NUM_SLICES, SIDE, SIDE)).astype(np.int16), "made noise"
    hu = np.concatenate([load_volume(series)[0].hu for series in found])
    mirrored = np.pad(hu, ((0, NUM_SLICES - len(hu)), (0, 0), (0, 0)), mode="symmetric")
    return mirrored, f"{len(hu)} slices of LIDC-IDRI, mirrored to {NUM_SLICES}"


def as_series(hu: Stack) -> CTSeries:
    return CTSeries("patient", "study", "series", Volume(hu, np.diag([0.7, 0.7, 2.5, 1])), (Truth(),) * len(hu))


def write_column(path: Path, images: pa.Array, rows: int, compression: str, **options: Any) -> Path:
    level = 1 if compression == "zstd" else None
    table = pa.table({"image": images})
    pq.write_table(table, path, row_group_size=rows, compression=compression, compression_level=level, **options)
    return path


def from_shards(shards: ShardSet, start: int) -> Stack:
    part_file_module.read_row_group.cache_clear()
    return shards.read_slices(shards.entries[0], start, start + DEPTH)[1]


def from_cache(shards: ShardSet, start: int) -> Stack:
    return shards.read_slices(shards.entries[0], start, start + DEPTH)[1]


def from_unread_cache(path: Path, start: int) -> Stack:
    series = cache_module._open_series.__wrapped__(path)
    series.verify(start, start + DEPTH)
    return series.hu[start : start + DEPTH]


def from_column(file: pq.ParquetFile, rows: int, start: int) -> Stack:
    first, last = start // rows, (start + DEPTH - 1) // rows
    groups = [file.read_row_group(group, use_threads=False)["image"] for group in range(first, last + 1)]
    images = pa.chunked_array([chunk for group in groups for chunk in group.chunks])
    window = images.slice(start - first * rows, DEPTH)
    if pa.types.is_binary(images.type):
        return np.stack([np.frombuffer(image.as_buffer(), "<i2").reshape(SIDE, SIDE) for image in window])
    return np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in window.chunks])


def main() -> None:
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    hu, what = stack()
    with tempfile.TemporaryDirectory(prefix="mp3d-benchmark-") as temporary:
        folder = Path(temporary)
        item = Item("series", "patient", "train", partial(as_series, hu))
        prepare(Source("made", "made/1", ("lesion",), (item,)), folder / "shards", id_key=b"made", runner="local")
        shards = open_shards(folder / "shards")
        through = cached(shards, folder / "cache", 10)
        through.read_rows(shards.entries[0], 0, 1)
        (in_cache,) = (folder / "cache").glob("v*/*.hu")
        rows = shards.entries[0].rows_per_group
        plain = pa.array([slice_.tobytes() for slice_ in hu], pa.binary())
        tensor = ArrowTensorArray.from_numpy(hu)
        bare = {"use_dictionary": False, "write_statistics": False}
        files = {
            "binary column, zstd, nothing checked": write_column(folder / "plain", plain, rows, "zstd", **bare),
            "tensor column, zstd": write_column(folder / "zstd", tensor, rows, "zstd", **bare),
            "tensor column, snappy": write_column(folder / "snappy", tensor, rows, "snappy"),
            "tensor column, as Ray Data writes it": write_column(folder / "ray", tensor, NUM_SLICES, "snappy"),
        }
        methods: dict[str, Read] = {
            "shards": partial(from_shards, shards),
            "cache": partial(from_cache, through),
            "cache, slices not read before": partial(from_unread_cache, in_cache),
        }
        for name, path in files.items():
            file = pq.ParquetFile(path)
            methods[name] = partial(from_column, file, file.metadata.row_group(0).num_rows)
        files |= {"shards": folder / "shards" / shards.entries[0].file, "cache": in_cache}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        report(measured(methods, hu), sizes, hu.nbytes, what)


def measured(methods: dict[str, Read], hu: Stack) -> dict[str, float]:
    """Median CPU seconds of a window."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    window = np.empty((DEPTH, SIDE, SIDE), np.int16)
    for number in range(ROUNDS + 1):  # the first warms up and compares
        starts = random.Random(number).choices(range(NUM_SLICES - DEPTH + 1), k=WINDOWS)
        for name, method in methods.items():
            for start in starts if number else range(NUM_SLICES - DEPTH + 1):
                begun = time.process_time()
                np.copyto(window, method(start))
                took = time.process_time() - begun
                if number:
                    seconds[name].append(took)
                elif not np.array_equal(window, hu[start : start + DEPTH]):
                    raise ValueError(f"{name} gives another window at {start}")
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(medians: dict[str, float], sizes: dict[str, int], raw: int, what: str) -> None:
    print(f"windows of {DEPTH} slices of {SIDE} x {SIDE}, int16: {what}")
    print(f"one thread of {cpu_model()}; medians of {ROUNDS} rounds of {WINDOWS} windows\n")
    print("| method | windows/s | CPU ms per window | times the shards' | bytes on disk, of raw int16 |")
    print("| --- | --- | --- | --- | --- |")
    for name, median in medians.items():
        size = f"{sizes[name] / raw:.2f}" if name in sizes else ""
        print(f"| {name} | {1 / median:.0f} | {1e3 * median:.2f} | {median / medians['shards']:.2f} | {size} |")


if __name__ == "__main__":
    main()
