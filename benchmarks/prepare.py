"""Preparing made CT series: ours on Ray beside bare process pools that only decode and write; ratios within one run.

    python benchmarks/prepare.py [--series 20] [--slices 200] [--rounds 5]

``prepare`` lists the folder, checks headers, geometry and pixels, reads each series in a Ray task, writes shards with
their checksums, and commits the manifest; Ray is up, its workers have started. The pools have two processes too. One
reads with pydicom (``pixel_array`` and rescale), one with SimpleITK's series reader; neither checks anything, and both
write the same Parquet of nothing but pixels at the same compression level. All take turns. CPU seconds are those of all
processes of a method, Ray's daemons included; the clock is told for the gain of a second worker. Writes about 0.5 MB a
slice into a temporary folder (``TMPDIR``). 20 series of 200 slices take about ten minutes on two cores.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import SimpleITK as sitk
from machine import cpu_model, cpu_s
from pydicom.pixels.processing import apply_rescale

from mp3d.data.dicom_folder import read_dicom
from mp3d.data.prepare import prepare
from mp3d.data.series import Volume
from mp3d.data.synthetic.dicom_files import write_ct_series
from mp3d.launch import connect_ray

SIDE, SLICES_PER_GROUP = 512, 8


def made_volume(seed: int, depth: int) -> Volume:
    """An ellipse of soft tissue with round organs, and noise of 15 HU: compresses like a real scan."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) - SIDE / 2
    inside = (x / 230) ** 2 + (y / 160) ** 2 < 1
    slice_ = np.where(inside, 40, -1000).astype(np.float32)
    for _ in range(30):
        column, row, radius = rng.uniform((-150, -100, 5), (150, 100, 40))
        slice_[inside & ((x - column) ** 2 + (y - row) ** 2 < radius**2)] = rng.uniform(-900, 400)
    noise = rng.normal(0, 15, 3 * SIDE * SIDE).astype(np.float32)
    hu = np.empty((depth, SIDE, SIDE), np.int16)
    for z, start in enumerate(rng.integers(0, 2 * SIDE * SIDE, depth).tolist()):
        hu[z] = np.rint(np.roll(slice_, z // 8, 1) + noise[start : start + SIDE * SIDE].reshape(SIDE, SIDE))
    return Volume(hu, np.diag([0.7, 0.7, 1.25, 1.0]))


def pydicom_series(folder: Path) -> list[np.ndarray]:
    slices = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda slice_: slice_.ImagePositionPatient[2])
    return [apply_rescale(slice_.pixel_array, slice_).astype(np.int16) for slice_ in slices]


def simpleitk_series(folder: Path) -> list[np.ndarray]:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return list(sitk.GetArrayFromImage(reader.Execute()).astype(np.int16, copy=False))


def decode_and_write(folder: Path, read: Callable[[Path], list[np.ndarray]], out: Path) -> None:
    slices = read(folder)
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(
        out / f"{folder.name}.parquet", schema, compression="zstd", compression_level=1, use_dictionary=False,
        write_statistics=False,
    ) as writer:  # fmt: skip
        for start in range(0, len(slices), SLICES_PER_GROUP):
            images = [slice_.tobytes() for slice_ in slices[start : start + SLICES_PER_GROUP]]
            writer.write_table(pa.table({"image": pa.array(images, pa.binary())}))


def run_pool(pool: Pool, read: Callable[[Path], list[np.ndarray]], folders: Sequence[Path], out: Path) -> None:
    out.mkdir()
    pool.map(partial(decode_and_write, read=read, out=out), folders, chunksize=1)


def run_prepare(root: Path, out: Path, cpus: float) -> None:
    from ray.data import DataContext, ExecutionResources

    limits = ExecutionResources.for_limits(cpu=cpus)
    DataContext.get_current().execution_options.resource_limits = limits
    prepare(read_dicom(root), out, id_key=b"benchmark", runner="ray")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("series", 20), ("slices", 200), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="mp3d-benchmark-") as temporary,
        multiprocessing.get_context("spawn").Pool(2) as pool,
    ):
        root, out = Path(temporary, "dicom"), Path(temporary, "out")
        folders = [root / f"{index:03d}" for index in range(asked.series)]
        for index, folder in enumerate(folders):
            write_ct_series(folder, made_volume(index, asked.slices), f"P{index}", f"benchmark {index}")
        pool_pids = {child.pid for child in multiprocessing.active_children() if child.pid}
        connect_ray(num_cpus=2)
        methods: dict[str, tuple[Callable[[], None], bool]] = {
            "prepare, 2 workers": (partial(run_prepare, root, out, 2), True),
            "prepare, 1 worker": (partial(run_prepare, root, out, 1), True),
            "pool, pydicom": (partial(run_pool, pool, pydicom_series, folders, out), False),
            "pool, SimpleITK": (partial(run_pool, pool, simpleitk_series, folders, out), False),
        }
        costs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in methods}
        for number in range(asked.rounds + 1):  # the first warms up
            for name, (method, on_ray) in methods.items():
                without = pool_pids if on_ray else all_children() - pool_pids
                cpu, clock = cpu_s(os.getpid(), without), time.perf_counter()
                method()
                clock, cpu = time.perf_counter() - clock, cpu_s(os.getpid(), without) - cpu
                size = sum(path.stat().st_size for path in out.glob("*.parquet"))
                costs[name] += [(cpu, clock, size)] if number else []
                shutil.rmtree(out)
    report(costs, asked)


def all_children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def report(costs: dict[str, list[tuple[float, float, int]]], asked: argparse.Namespace) -> None:
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in costs.items()}
    ours, seconds = next(iter(medians.values()))[:2]
    print(f"\n{asked.series} made series of {asked.slices} slices of {SIDE} x {SIDE}, uncompressed DICOM")
    print(f"two cores of {cpu_model()}; medians of {asked.rounds} rounds\n")
    print(
        "| method | CPU s per series | prepare's speed beside it, by CPU | series/s | ... by the clock | MB written |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (cpu, clock, size) in medians.items():
        rate = asked.series / clock
        shown = f"{cpu / asked.series:.3f} | {cpu / ours:.2f} | {rate:.2f} | {clock / seconds:.2f} | {size / 1e6:.0f}"
        print(f"| {name} | {shown} |")


if __name__ == "__main__":
    main()
