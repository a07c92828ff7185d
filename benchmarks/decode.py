"""CT slices from file to Hounsfield units: ours beside pydicom with its plug-ins and SimpleITK, ratios within one run.

    python benchmarks/decode.py

The slices of LIDC-IDRI-0001 in ``../shared/data`` (or ``MP3D_SHARED_DATA``), or made ones where it is absent, are
written in every transfer syntax that is read here, each in a folder of its own. Lossy syntaxes, which need not be
lossy, hold lossless frames too, but for JPEG Extended, which holds 12 bits. All readers read the same files, header
included, from the page cache, on one thread, and take turns; ours with its worker process. The table holds medians of
CPU time, which other processes disturb less than the clock. Values are compared first: what differs from ours is no
time but a mark. pydicom's plug-ins are those found. Takes two minutes.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import gdcm
import imagecodecs
import numpy as np
import SimpleITK as sitk
from jaxtyping import Int16
from machine import cpu_model
from openjpeg.utils import decode_pixel_data
from pydicom import Dataset, FileMetaDataset, dcmread, dcmwrite, uid
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import get_decoder

from mp3d.data.dicom import group_series, load_volume
from mp3d.data.dicom.decoders import COMPRESSED, JPEG_2000, JPEG_EXTENDED
from mp3d.data.dicom.pixels import NATIVE, SUPPORTED

SHARED = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
NUM_SLICES, SIDE = 16, 512
BY_GDCM = {
    uid.RLELossless: gdcm.TransferSyntax.RLELossless,
    uid.JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    uid.JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    uid.JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    uid.JPEGLSNearLossless: gdcm.TransferSyntax.JPEGLSNearLossless,
    uid.JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
    uid.JPEG2000: gdcm.TransferSyntax.JPEG2000,
}
"""gdcm writes these, imagecodecs the others, so that few frames are read by the library that wrote them."""

Stack = Int16[np.ndarray, "d h w"]
Reader = Callable[[list[Path]], np.ndarray]


def ours(paths: list[Path]) -> np.ndarray:
    """As `prepare` reads a folder: listed, grouped and checked, with the worker process and its pipes."""
    (series,) = group_series(paths[0].parent).series
    return load_volume(series)[0].hu


def cpu_s() -> float:
    """Processor time of this process and of its workers, whichever thread started them."""
    children = [child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()]
    nanoseconds = sum(int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) for child in children)
    return time.process_time() + nanoseconds / 1e9


def with_pydicom(plugin: str) -> Reader:
    def read(paths: list[Path]) -> np.ndarray:
        return np.stack([_read(path) for path in paths])

    def _read(path: Path) -> np.ndarray:
        ds = dcmread(path)
        ds.pixel_array_options(decoding_plugin=plugin)
        return _rescaled(ds.pixel_array, ds)

    return read


def with_openjpeg(paths: list[Path]) -> np.ndarray:
    """As pydicom calls its plug-in pylibjpeg-openjpeg, whose framework need not be there."""
    return np.stack([_read_openjpeg(path) for path in paths])


def _read_openjpeg(path: Path) -> np.ndarray:
    ds = dcmread(path)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    stored = np.frombuffer(decode_pixel_data(frame, version=2), "<i2" if ds.PixelRepresentation else "<u2")
    return _rescaled(stored.reshape(ds.Rows, ds.Columns), ds)


def _rescaled(stored: np.ndarray, ds: Dataset) -> np.ndarray:
    return (stored * np.float32(ds.RescaleSlope) + np.float32(ds.RescaleIntercept)).astype(np.int16)


def with_simpleitk(paths: list[Path]) -> np.ndarray:
    """The names are given in order: looking for them would cost it more."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in paths])
    return sitk.GetArrayFromImage(reader.Execute())


def readers(syntax: uid.UID) -> dict[str, Reader]:
    """Those that can be had for a transfer syntax, ours first."""
    plugins = get_decoder(syntax).available_plugins if syntax.is_encapsulated else ()
    found: dict[str, Reader] = {"mp3d": ours, "pydicom": with_pydicom("")}
    found |= {f"+ {plugin}": with_pydicom(plugin) for plugin in plugins if plugin != "pydicom"}
    if syntax in JPEG_2000:
        found["+ openjpeg"] = with_openjpeg
    return found | {"SimpleITK": with_simpleitk}


def slices() -> tuple[Sequence[Dataset], str]:
    """Uncompressed slices in order, and what they are."""
    folder = SHARED / "lidc" / "LIDC-IDRI-0001"
    if folder.is_dir():
        found = [dcmread(path) for path in sorted(folder.rglob("*.dcm"))]
        found = sorted((ds for ds in found if ds.Modality == "CT"), key=lambda ds: float(ds.ImagePositionPatient[2]))
        return found[:NUM_SLICES], "LIDC-IDRI-0001"
    return [made_slice(z) for z in range(NUM_SLICES)], "made: an ellipse of tissue in air, with noise"


def made_slice(z: int) -> Dataset:
    rng = np.random.default_rng(z)
    y, x = (np.mgrid[:SIDE, :SIDE] / SIDE - 0.5) * 2
    inside = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    hu = np.where(inside, 40 + 60 * np.sin(9 * x + z), -1000) + rng.normal(0, 12, inside.shape)
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = uid.CTImageStorage, f"1.2.3.{z + 1}", "CT"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = "1.2.3", "1.2.3.0", z + 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SamplesPerPixel, ds.PhotometricInterpretation = [1, 1], 1, "MONOCHROME2"
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = SIDE, SIDE, 16, 16, 15
    ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept = 1, 1, -1024
    ds.PixelData = (np.rint(hu) + 1024).clip(-1024, 3071).astype("<i2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = uid.UID(ds.SOPInstanceUID)
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return ds


def write(ds: Dataset, syntax: uid.UID, path: Path) -> None:
    """The slice as a file of that transfer syntax."""
    ds = deepcopy(ds)
    stored = np.frombuffer(ds.PixelData, "<i2" if ds.PixelRepresentation else "<u2").reshape(ds.Rows, ds.Columns)
    if syntax in BY_GDCM:
        dcmwrite(path, ds, enforce_file_format=True)
        _transcode(path, BY_GDCM[syntax])
        return
    if syntax in COMPRESSED:
        if syntax in JPEG_EXTENDED:
            hu = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
            ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
            ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
            frame = imagecodecs.jpeg8_encode((hu + 1024).clip(0, 4095).astype(np.uint16), 95, bitspersample=12)
        else:
            frame = imagecodecs.htj2k_encode(stored, reversible=True)
        ds.PixelData = encapsulate([bytes(frame)])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    elif syntax == uid.ExplicitVRBigEndian:
        ds.PixelData = stored.astype(">i2").tobytes()
    for element in [element for element in ds if element.VR == "US or SS"]:  # such as Pixel Padding Value
        element.VR = "SS" if ds.PixelRepresentation else "US"
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == uid.ExplicitVRBigEndian:
        ds.preamble = bytes(128)
        dcmwrite(path, ds, implicit_vr=False, little_endian=False)
    else:
        dcmwrite(path, ds, enforce_file_format=True)


def _transcode(path: Path, syntax: int) -> None:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    done = reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    done = done and change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    if not (done and writer.Write()):
        raise RuntimeError(f"gdcm cannot write {syntax}")


def medians(paths: list[Path], methods: dict[str, Reader], rounds: int) -> dict[str, float | str]:
    """CPU milliseconds per slice, or why there are none."""
    results: dict[str, float | str] = {}
    expected = ours(paths)
    for name, method in methods.items():
        try:
            results[name] = float(np.abs(method(paths).astype(int) - expected).max())
        except Exception:
            results[name] = "cannot"
    timed = {name: methods[name] for name, difference in results.items() if difference != "cannot"}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, method in timed.items():
            start = cpu_s()
            method(paths)
            seconds[name].append((cpu_s() - start) / len(paths))
    for name, values in seconds.items():
        right = results[name] == 0
        results[name] = 1e3 * statistics.median(values) if right else f"wrong by {results[name]:g} HU"
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sources, what = slices()
    rows: dict[str, dict[str, float | str]] = {}
    for syntax in sorted(SUPPORTED, key=lambda syntax: (syntax not in NATIVE, str(syntax))):
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{number:03d}.dcm") for number in range(len(sources))]
            for ds, path in zip(sources, paths, strict=True):
                write(ds, syntax, path)
            rows[syntax.name] = medians(paths, readers(syntax), rounds)
    print(f"{len(sources)} slices of {sources[0].Rows} x {sources[0].Columns}, file to HU: {what}")
    print(f"one thread of {cpu_model()}; medians of {rounds} rounds, CPU ms per slice\n")
    print_table(rows)


def print_table(rows: dict[str, dict[str, float | str]]) -> None:
    found = {name for results in rows.values() for name in results}
    names = ["mp3d", "pydicom", *sorted(found - {"mp3d", "pydicom", "SimpleITK"}), "SimpleITK"]
    print(f"| transfer syntax | {' | '.join(names)} | best of others / mp3d | SimpleITK / mp3d |")
    print("| --- " * (len(names) + 3) + "|")
    for syntax, results in rows.items():
        numbers = {name: value for name, value in results.items() if isinstance(value, float)}
        best = min((value for name, value in numbers.items() if name != "mp3d"), default=float("nan"))
        ratios = [best / numbers["mp3d"], numbers.get("SimpleITK", float("nan")) / numbers["mp3d"]]
        cells = [*(results.get(name, "") for name in names), *ratios]
        texts = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
        print(f"| {syntax} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
