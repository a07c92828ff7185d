"""DeepLesion's slices: 16-bit PNG in folders, or in the zip parts as published, which are read where they are.

A part ``Images_png_01.zip``, ... holds ``Images_png/<series>/<slice>.png``. The names in it are compared, never used as
paths, and what a member or the directory of a zip may take in memory is bounded.
"""

import io
import re
import struct
import weakref
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int16
from PIL import Image

from mp3d.data.deeplesion_table import SERIES_FOLDER, SLICE_FILE
from mp3d.errors import DataError, Refusal

HU_OFFSET = 32768
"""Subtracted from the stored unsigned 16-bit values (the data set's own README)."""
MAX_SLICE_SIZE = 4096
"""Rows or columns; the data set has 512 to 1024."""
MAX_SLICE_BYTES = 2 * MAX_SLICE_SIZE**2 + 2**20
"""Of a PNG, which is about half of its pixels."""
MAX_RUN_BYTES = 4 * 2**30
"""Of the pixels of consecutive slices; the data set's longest runs have a tenth of it."""
ZIP_PARTS = "Images_png_*.zip"
MAX_DIRECTORY_BYTES = 64 * 2**20
"""Of a zip's directory; a part of 17,000 slices has 2 MB."""
_MEMBER = re.compile(rf"(?:Images_png/)?({SERIES_FOLDER.pattern})/(?:{SLICE_FILE.pattern})")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The decoders of the other methods allocate what the file tells them to."""
_ENCRYPTED = 0x1 | 0x40
_ZIP_DAMAGE = (
    zipfile.BadZipFile,
    NotImplementedError,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OSError,
    OverflowError,
)
"""What ``zipfile`` raises on damaged input."""


@dataclass(frozen=True)
class SliceRun:
    """Consecutive slices of a series.

    Attributes:
        series: ``<patient>_<study>_<series>``.
        first: number of the first slice.
        places: for each slice the folder of its series' folder, or the zip part that holds it.
    """

    series: str
    first: int
    places: tuple[Path, ...]

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.places))

    @property
    def name(self) -> str:
        """First and last slice, such as ``103-115``."""
        return f"{self.first:03d}-{self.numbers[-1]:03d}"

    def alone(self, number: int) -> "SliceRun":
        """One of its slices as a run."""
        return SliceRun(self.series, number, (self.places[number - self.first],))


@dataclass(frozen=True)
class SliceListing:
    """Where the slices of a data set lie.

    Attributes:
        places: by series and slice number.
        refused: zip parts that cannot be opened.
        num_twice: slices that lie in two places; folders go before zip parts, and those go by their names.
    """

    places: dict[str, dict[int, Path]]
    refused: tuple[tuple[str, Refusal], ...]
    num_twice: int

    def runs(self, series: str) -> list[SliceRun]:
        """The slices of a series that are there, without a gap in any run."""
        places = self.places.get(series, {})
        return [SliceRun(series, run[0], tuple(places[number] for number in run)) for run in consecutive_runs(places)]


def list_slices(root: Path, images: Path | None) -> SliceListing:
    """Find the slices by the names of files and of the members of zip parts.

    Args:
        root: folder of the data set.
        images: folder of the series folders or of the zip parts; None: ``Images_png`` in the root, and the root.

    Raises:
        DataError: there is no such folder.
    """
    folders = [folder.absolute() for folder in ([images] if images else [root / "Images_png", root])]
    if not any(folder.is_dir() for folder in folders):
        raise DataError(f"{folders[0]} is no folder; name that of the series folders or zip parts with --images")
    places: dict[str, dict[int, Path]] = defaultdict(dict)
    refused: list[tuple[str, Refusal]] = []
    num_twice = 0
    parts = sorted(part for folder in folders for part in folder.glob(ZIP_PARTS))
    for place in [*folders, *parts]:
        try:
            for series, number in _listed(place):
                num_twice += number in places[series]
                places[series].setdefault(number, place)
        except Refusal as refusal:
            refused.append((place.name, refusal))
    return SliceListing(dict(places), tuple(refused), num_twice)


def read_run(run: SliceRun) -> Int16[np.ndarray, "d h w"]:
    """The slices in HU.

    Raises:
        Refusal: ``UNREADABLE``, ``BAD_ARCHIVE``, ``BAD_IMAGE``, ``TOO_LARGE`` or ``MIXED_SIZE``.
    """
    volume = np.empty((0, 0, 0), np.int16)
    for z, (number, place) in enumerate(zip(run.numbers, run.places, strict=True)):
        hu = _decode(_read_bytes(place, run.series, number))
        if z == 0:
            if hu.nbytes * len(run.places) > MAX_RUN_BYTES:
                raise Refusal("TOO_LARGE", f"{len(run.places)} slices of {hu.shape} pixels in one run; leave it out")
            volume = np.empty((len(run.places), *hu.shape), np.int16)
        if hu.shape != volume.shape[1:]:
            sizes = f"{volume.shape[1:]} and {hu.shape}"
            raise Refusal("MIXED_SIZE", f"slices of two sizes in one run: {sizes} (rows, columns)")
        volume[z] = hu
    return volume


def consecutive_runs(numbers: Iterable[int]) -> list[range]:
    """Numbers without a gap between them, ascending."""
    runs: list[range] = []
    for number in sorted(numbers):
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _listed(place: Path) -> Iterator[tuple[str, int]]:
    """Series and number of every slice in a folder of series folders, or in a zip part."""
    if place.is_dir():
        for folder in place.iterdir():
            if SERIES_FOLDER.fullmatch(folder.name) and folder.is_dir():
                for file in folder.iterdir():
                    if match := SLICE_FILE.fullmatch(file.name):
                        yield folder.name, int(match[1])
    elif place.is_file():
        for name in _opened_zip(place).namelist():
            if match := _MEMBER.fullmatch(name):
                yield match[1], int(match[2])


def _read_bytes(place: Path, series: str, number: int) -> bytes:
    if place.match(ZIP_PARTS) and place.is_file():
        return _read_member(_opened_zip(place), series, number)
    try:
        with (place / series / f"{number:03d}.png").open("rb") as file:
            content = file.read(MAX_SLICE_BYTES + 1)
    except OSError as error:
        raise Refusal("UNREADABLE", "a slice that was listed is gone or must not be read") from error
    return _bounded(content)


def _read_member(archive: zipfile.ZipFile, series: str, number: int) -> bytes:
    names = (f"Images_png/{series}/{number:03d}.png", f"{series}/{number:03d}.png")
    info = next((archive.NameToInfo[name] for name in names if name in archive.NameToInfo), None)
    if info is None:
        raise Refusal("UNREADABLE", "a slice that was listed is gone from its zip part")
    if info.flag_bits & _ENCRYPTED or info.compress_type not in _METHODS:
        raise Refusal("BAD_ARCHIVE", "a slice in a zip part is encrypted, or packed by another method than deflate")
    try:
        with archive.open(info) as member:
            return _bounded(member.read(MAX_SLICE_BYTES + 1))
    except _ZIP_DAMAGE as error:
        detail = f"a slice in a zip part is damaged ({type(error).__name__})"
        raise Refusal("BAD_ARCHIVE", f"{detail}; fetch the part again") from error


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_SLICE_BYTES:
        raise Refusal("TOO_LARGE", f"a slice has more than {MAX_SLICE_BYTES >> 20} MiB; it is no CT slice")
    return content


class _BoundedFile(io.BufferedReader):
    """A zip; refuses the one long read of ``zipfile``: the directory, as long as the zip says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size)


def _opened_zip(path: Path) -> zipfile.ZipFile:
    try:
        return _open_zip(path, path.stat().st_mtime_ns)
    except _ZIP_DAMAGE as error:
        detail = f"a zip part cannot be opened ({type(error).__name__}): damaged, cut off or not readable"
        raise Refusal("BAD_ARCHIVE", f"{detail}; fetch it again") from error


@lru_cache(maxsize=4)
def _open_zip(path: Path, _modified_ns: int) -> zipfile.ZipFile:
    """Opened parts are kept: reading the directory again costs as much as reading ten slices."""
    file = _BoundedFile(io.FileIO(path))
    try:
        archive = zipfile.ZipFile(file)
    except BaseException:
        file.close()
        raise
    weakref.finalize(archive, file.close)  # a zip that leaves the cache
    return archive


def _decode(content: bytes) -> Int16[np.ndarray, "h w"]:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # the checksums of a PNG, which decoding skips
        with Image.open(io.BytesIO(content)) as image:
            if image.format != "PNG" or image.mode != "I;16":
                raise Refusal("BAD_IMAGE", f"a slice is {image.format} {image.mode}; it must be a 16-bit grey PNG")
            if max(image.size) > MAX_SLICE_SIZE:
                raise Refusal("TOO_LARGE", f"a slice has {image.size} pixels; at most {MAX_SLICE_SIZE} each way")
            stored = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refusal("BAD_IMAGE", f"a slice is no PNG, or damaged ({type(error).__name__}); copy it again") from error
    return (stored.astype(np.int32) - HU_OFFSET).astype(np.int16)  # 0..65535 - 32768 just fits
