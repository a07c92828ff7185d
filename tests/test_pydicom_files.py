"""All test files that pydicom ships, and mutations of some: each ends as pixels or as a reason code.

The verdicts are a table, ``tests/pydicom_verdicts.csv``; a change of it is a change of what is accepted. Made by
``python -m tests.test_pydicom_files > tests/pydicom_verdicts.csv``.
"""

import csv
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK

from mp3d.data.decode import Limits, Pool
from mp3d.data.dicom import group_series, isolated, load_volume
from mp3d.data.reasons import REASONS
from mp3d.errors import Refusal
from tests.worker_memory import peak_worker_bytes

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
TABLE = Path(__file__).with_name("pydicom_verdicts.csv")
MUTATED = (
    "CT_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "image_dfl.dcm",
    "MR_small_RLE.dcm",
    "JPGExtended.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "JPEGLSNearLossless_16.dcm",
    "MR_small_jp2klossless.dcm",
    "J2K_pixelrep_mismatch.dcm",
    "693_J2KI.dcm",
    "nested_priv_SQ.dcm",
)
"""Transfer syntaxes of every kind, and nested sequences; 693_J2KI makes several decoders abort."""
MAX_SECONDS = 5
MAX_BYTES = 2**30


def files() -> list[str]:
    return sorted(path.relative_to(FILES).as_posix() for path in FILES.rglob("*") if path.is_file())


def series_verdict(name: str, pool: Pool) -> str:
    """What a folder with this one file comes to: series, other objects, or the reason code."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(FILES / name, Path(folder, Path(name).name))
        listing = group_series(Path(folder), pool=pool)
    if listing.refused:
        return listing.refused[0][1].reason
    if not listing.series:
        return "object" if listing.objects else "passed over"
    try:
        load_volume(listing.series[0], pool=pool)
    except Refusal as refusal:
        return refusal.reason
    return "series"


def pixels_verdict(source: Path | bytes, pool: Pool) -> tuple[str, list[np.ndarray]]:
    """What its images come to, be they CT or not, and their stored values: a missing slope is taken for 1."""
    try:
        ((_, found),) = isolated.image_headers([("", source)], pool)
        if isinstance(found, Refusal):
            return found.reason, []
        headers = [replace(header, rescale_slope=1.0, rescale_intercept=0.0, rescale_type="") for header in found]
        images = list(isolated.read_slices(headers, pool))
    except Refusal as refusal:
        return refusal.reason, []
    return "pixels", images


def verdicts() -> Iterator[tuple[str, str, str]]:
    with Pool() as pool:
        for name in files():
            yield name, series_verdict(name, pool), pixels_verdict(FILES / name, pool)[0]


def test_the_table_of_verdicts() -> None:
    with TABLE.open(newline="") as table:
        _, *expected = csv.reader(table)
    assert [",".join(row) for row in verdicts()] == [",".join(row) for row in expected]
    codes = {code for row in expected for code in row[1:]}
    assert codes <= REASONS.keys() | {"pixels", "series", "object", "passed over"}
    assert sum(row[2] == "pixels" for row in expected) >= 10


def test_what_is_read_is_what_others_read() -> None:
    """pydicom, or SimpleITK for the lossy JPEG of 12 bits, which pydicom's plug-ins cannot."""
    compared = 0
    with Pool() as pool:
        for name in files():
            verdict, images = pixels_verdict(FILES / name, pool)
            if verdict != "pixels":
                continue
            if name in ("JPEG-lossy.dcm", "JPGExtended.dcm"):
                stored = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(FILES / name)))
            else:
                ds = pydicom.dcmread(FILES / name, force=True)
                stored = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
            for image, plane in zip(images, stored, strict=True):
                np.testing.assert_array_equal(image, np.clip(plane, -32768, 32767))
            compared += 1
    assert compared >= 40


@pytest.mark.parametrize(
    "count", [pytest.param(300, id="300"), pytest.param(5000, id="5000", marks=pytest.mark.acceptance)]
)
def test_mutations(count: int) -> None:
    """Nothing dies but disposable workers, nothing is uncaught, and the costs of each file are bounded."""
    rng = np.random.default_rng(20)
    seen: Counter[str] = Counter()
    slowest, workers = 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Pool(limits=Limits(wall_s=60.0)) as pool:  # a busy machine is no fault of a file
        for number in range(count):
            source = mutated((FILES / MUTATED[number % len(MUTATED)]).read_bytes(), rng)
            started = time.process_time()
            verdict, images = pixels_verdict(source, pool)
            slowest = max(slowest, time.process_time() - started)
            workers = max(workers, peak_worker_bytes())
            assert verdict in REASONS.keys() | {"pixels"}
            assert all(image.dtype == np.int16 for image in images)
            seen[verdict] += 1
    assert slowest <= MAX_SECONDS
    assert 2**20 < workers <= MAX_BYTES
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 <= MAX_BYTES
    assert seen["pixels"] > count / 10
    assert len(seen) > 5
    print(dict(seen.most_common()), f"slowest {slowest:.2f} s, workers at most {workers >> 20} MiB")


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, half of the time near the head; sometimes bytes added or lost, sometimes the end cut off."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 8)):
        at = int(rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 2000)))
        match rng.integers(0, 4):
            case 0:
                data[at] = rng.integers(0, 256)
            case 1:
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 2:
                data[at] = (0, 255, 128, 127)[rng.integers(0, 4)]
            case _:
                bytes_at = data[at : at + 4]
                data[at : at + 4] = rng.bytes(len(bytes_at))
    change = rng.random()
    if change < 0.05:
        del data[int(rng.integers(100, len(data))) :]
    elif change < 0.1:
        del data[at : at + int(rng.integers(1, 64))]
    elif change < 0.15:
        data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(data)


if __name__ == "__main__":
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "series", "pixels"])
    writer.writerows(verdicts())
