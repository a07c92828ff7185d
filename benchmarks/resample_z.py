"""Linear interpolation along z: ours beside scipy, SimpleITK and torch, one thread, ratios within one run.

    python benchmarks/resample_z.py

24 slices of 512 x 512 int16 HU become 60 at the same source positions in every library, the ends included, and int16
again. The methods take turns; the table holds medians of CPU time, which other processes disturb less than the clock.
The slices are those of the LIDC series in ``../shared/data`` (or ``MP3D_SHARED_DATA``), mirrored behind the last one,
or made noise where it is absent. The truth is the interpolation in float64, unrounded. Takes half a minute.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.ndimage
import SimpleITK as sitk
import torch
from jaxtyping import Float, Int16
from machine import cpu_model

from mp3d.data.clips import resample_z
from mp3d.data.dicom import group_series, load_volume

SHARED = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
NUM_SOURCE, NUM_OUTPUT, SIDE = 24, 60, 512
ROUNDS = 7
POSITIONS = np.linspace(0, NUM_SOURCE - 1, NUM_OUTPUT)

Stack = Int16[np.ndarray, "d h w"]


def ours(slices: Stack) -> Stack:
    return resample_z(slices, POSITIONS)


def torch_interpolate(slices: Stack) -> Stack:
    volume = torch.from_numpy(slices).float()[None, None]
    size = (NUM_OUTPUT, SIDE, SIDE)
    resampled = torch.nn.functional.interpolate(volume, size, mode="trilinear", align_corners=True)
    return resampled[0, 0].round_().to(torch.int16).numpy()


def simpleitk_resample(slices: Stack) -> Stack:
    image = sitk.GetImageFromArray(slices)
    resample = sitk.ResampleImageFilter()
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetSize((SIDE, SIDE, NUM_OUTPUT))
    resample.SetOutputSpacing((1, 1, POSITIONS[1]))
    resample.SetUseNearestNeighborExtrapolator(True)  # the last position may lie a rounding beyond the last slice
    return sitk.GetArrayFromImage(resample.Execute(image))


def scipy_zoom(slices: Stack) -> Stack:
    return np.asarray(scipy.ndimage.zoom(slices, (NUM_OUTPUT / NUM_SOURCE, 1, 1), order=1))


METHODS: dict[str, Callable[[Stack], Stack]] = {
    "mp3d.data.clips.resample_z": ours,
    "torch interpolate, trilinear": torch_interpolate,
    "SimpleITK Resample, linear": simpleitk_resample,
    "scipy.ndimage.zoom, order 1": scipy_zoom,
}


def truth(slices: Stack) -> Float[np.ndarray, "d h w"]:
    lower = np.minimum(POSITIONS.astype(int), NUM_SOURCE - 2)
    weights = (POSITIONS - lower)[:, None, None]
    return (1 - weights) * slices[lower] + weights * slices[lower + 1]


def stack() -> tuple[Stack, str]:
    """The slices and what they are."""
    found = group_series(SHARED / "lidc").series if (SHARED / "lidc").is_dir() else []
    if not found:
        return np.random.default_rng(0).integers(-1024, 2000, (NUM_SOURCE, SIDE, SIDE)).astype(np.int16), "made noise"
    hu = load_volume(max(found, key=lambda series: len(series.slices)))[0].hu
    hu = hu[:NUM_SOURCE]
    padded = np.pad(hu, ((0, NUM_SOURCE - len(hu)), (0, 0), (0, 0)), mode="symmetric")
    return padded, f"{len(hu)} slices of LIDC-IDRI, mirrored at the end"


def main() -> None:
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    slices, source = stack()
    exact = truth(slices)
    worst = {name: float(np.abs(method(slices) - exact).max()) for name, method in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(ROUNDS):
        for name, method in METHODS.items():
            start = time.process_time()
            method(slices)
            seconds[name].append((time.process_time() - start) / NUM_OUTPUT)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = medians[next(iter(METHODS))]

    print(f"{NUM_SOURCE} -> {NUM_OUTPUT} slices of {SIDE} x {SIDE}, int16: {source}")
    print(f"one thread of {cpu_model()}; medians of {ROUNDS} rounds\n")
    print("| method | CPU ms per output slice | times ours | max difference to float64, HU |")
    print("| --- | --- | --- | --- |")
    for name, median in medians.items():
        print(f"| {name} | {1e3 * median:.3f} | {median / fastest:.1f} | {worst[name]:.2f} |")


if __name__ == "__main__":
    main()
