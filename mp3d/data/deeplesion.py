"""DeepLesion (Yan et al. 2018): 16-bit PNG slices, and lesion boxes on key slices in ``DL_info.csv``.

A folder ``Images_png/<patient>_<study>_<series>`` holds the slices around its key slices, often as several runs with
gaps between; each run is an item of its own. About half of the lesions were marked, and only on key slices: of every
other slice nothing is known.
"""

import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from mp3d.data.deeplesion_table import SERIES_FOLDER, SLICE_FILE, Lesion, read_table
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.source import Item, Source
from mp3d.errors import DataError, Refusal

HU_OFFSET = 32768
"""Subtracted from the stored unsigned 16-bit values (the data set's own README)."""
READER = "deeplesion/1"
MAX_SLICE_SIZE = 4096
"""Rows or columns; the data set has 512 to 1024."""


def read_deeplesion(
    root: Path, annotations: Path | None = None, images: Path | None = None, keep_noisy: bool = True
) -> Source:
    """DeepLesion: key slices with boxes in 16-bit PNG, official split.

    All lesions have the label 1. The data set does not say how a slice lies in the patient: the affine takes columns
    for +x, rows for +y and slice numbers for +z of LPS, with the origin at slice 0, so that distances are right, but
    directions and places in the body are not.

    Args:
        root: folder of the data set.
        annotations: the table of lesions; left out: the only ``DL_info*.csv`` in the root.
        images: folder of the series folders; left out: ``Images_png`` in the root.
        keep_noisy: keep the boxes that are marked as possibly noisy, as the MP3D paper does.

    Raises:
        DataError: no table, no images, or a table that cannot be read or contradicts itself.
    """
    annotations = annotations or _only_table(root)
    images = (images or root / "Images_png").absolute()
    if not images.is_dir():
        raise DataError(f"{images} is no folder; unpack the PNG archives there, or name the folder with --images")
    lesions: dict[str, list[Lesion]] = defaultdict(list)
    for lesion in read_table(annotations):
        lesions[lesion.folder].append(lesion)
    items: list[Item] = []
    refused: list[tuple[str, Refusal]] = []
    counts: Counter[str] = Counter()
    for folder in sorted(lesions.keys() | _series_folders(images)):
        if folder not in lesions:
            counts["series folders without a row in the table, so without spacing and split, not used"] += 1
            continue
        splits = sorted({lesion.split for lesion in lesions[folder]})
        if len(splits) > 1:
            raise DataError(f"{annotations} puts {folder} into {' and '.join(splits)}; a series is in one split")
        runs = consecutive_runs(_slice_numbers(images / folder))
        there = {number for run in runs for number in run}
        counts["rows of the table without their image, not used"] += sum(
            lesion.slice_number not in there for lesion in lesions[folder]
        )
        for run in runs:
            key = f"{folder}/{run[0]:03d}-{run[-1]:03d}"
            try:
                spacing_mm = _spacing(lesions[folder], run)
            except Refusal as refusal:
                refused.append((key, refusal))
                continue
            marked = [lesion for lesion in lesions[folder] if lesion.slice_number in run]
            kept = tuple(lesion for lesion in marked if keep_noisy or not lesion.noisy)
            counts["boxes marked as possibly noisy, not used"] += len(marked) - len(kept)
            load = partial(load_run, images / folder, run, kept, spacing_mm)
            items.append(Item(key, folder.split("_")[0], splits[0], load))
    if not items and not refused:
        raise DataError(f"no image of {annotations.name} is under {images}; it must hold folders such as 000001_01_01")
    return Source(
        dataset="deeplesion",
        reader=READER,
        class_names=("lesion",),
        items=tuple(items),
        refused=tuple(refused),
        options={"keep_noisy": keep_noisy, "annotations_sha256": sha256(annotations.read_bytes()).hexdigest()},
        notes=tuple(f"{count} {what}" for what, count in sorted(counts.items()) if count),
    )


def load_run(folder: Path, run: range, lesions: Sequence[Lesion], spacing_mm: tuple[float, float, float]) -> CTSeries:
    """Read consecutive slices.

    Args:
        folder: of the series.
        run: numbers of the slices.
        lesions: those with their key slice in the run.
        spacing_mm: x, y, slice interval.

    Raises:
        Refusal: ``UNREADABLE``, ``BAD_IMAGE``, ``TOO_LARGE`` or ``MIXED_SIZE``.
    """
    slices = [_read_slice(folder / f"{number:03d}.png") for number in run]
    sizes = {hu.shape for hu in slices}
    if len(sizes) > 1:
        raise Refusal("MIXED_SIZE", f"slices of {len(sizes)} sizes in one run: {sorted(sizes)} (rows, columns)")
    hu = np.stack(slices)
    affine = np.diag([*spacing_mm, 1.0])
    affine[2, 3] = run[0] * spacing_mm[2]
    boxes: dict[int, list[np.ndarray]] = defaultdict(list)
    warnings: set[str] = set()
    for lesion in lesions:
        box, warning = _clip(lesion.box, *hu.shape[1:])
        if warning:
            warnings.add(warning)
        if box is not None:
            boxes[lesion.slice_number].append(box)
    patient, study, _ = folder.name.split("_")
    return CTSeries(
        patient=patient,
        study=f"{patient}_{study}",
        series=f"{folder.name}_{run[0]:03d}-{run[-1]:03d}",
        volume=Volume(hu, affine),
        truths=tuple(_truth(boxes[number]) for number in run),
        first_index=run[0],
        warnings=tuple(sorted(warnings)),
    )


def consecutive_runs(numbers: Iterable[int]) -> list[range]:
    """Numbers without a gap between them, ascending."""
    runs: list[range] = []
    for number in sorted(numbers):
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _spacing(lesions: Sequence[Lesion], run: range) -> tuple[float, float, float]:
    """Of the rows of this run, or, where it has none, of the whole folder (two of its runs may differ).

    Raises:
        Refusal: ``BAD_SPACING`` or ``MIXED_SPACING``.
    """
    of_run = {lesion.spacing_mm for lesion in lesions if lesion.slice_number in run}
    found = of_run or {lesion.spacing_mm for lesion in lesions}
    for spacing_mm in found:
        if not all(math.isfinite(value) and value > 0 for value in spacing_mm):
            raise Refusal("BAD_SPACING", f"spacing (x, y, interval) is {spacing_mm} mm; each must be above 0")
    if len(found) > 1:
        raise Refusal("MIXED_SPACING", f"several spacings (x, y, interval) for one run: {sorted(found)} mm")
    return found.pop()


def _clip(box: tuple[float, float, float, float], rows: int, columns: int) -> tuple[np.ndarray | None, str | None]:
    """The box inside the image, or None where nothing is left, and a warning code."""
    inside = np.clip(np.array(box, np.float32), 0, np.array([columns, rows, columns, rows], np.float32))
    if not (inside[0] < inside[2] and inside[1] < inside[3]):  # also where a number is NaN
        return None, "BOX_DROPPED"
    return inside, "BOX_CLIPPED" if (inside != np.array(box, np.float32)).any() else None


def _truth(boxes: Sequence[np.ndarray]) -> Truth:
    """A slice whose boxes were all dropped is no slice without lesions."""
    return Truth(np.stack(boxes), np.ones(len(boxes), np.int64)) if boxes else Truth()


def _read_slice(path: Path) -> np.ndarray:
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # the checksums of a PNG, which decoding skips
        with Image.open(io.BytesIO(content)) as image:
            if image.format != "PNG" or image.mode != "I;16":
                raise Refusal("BAD_IMAGE", f"a slice is {image.format} {image.mode}; it must be a 16-bit grey PNG")
            if max(image.size) > MAX_SLICE_SIZE:
                raise Refusal("TOO_LARGE", f"a slice has {image.size} pixels; at most {MAX_SLICE_SIZE} each way")
            stored = np.asarray(image)
    except (FileNotFoundError, PermissionError) as error:
        raise Refusal("UNREADABLE", "a slice that was listed is gone or must not be read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refusal("BAD_IMAGE", f"a slice is no PNG, or damaged ({type(error).__name__}); copy it again") from error
    return (stored.astype(np.int32) - HU_OFFSET).astype(np.int16)  # 0..65535 - 32768 just fits


def _only_table(root: Path) -> Path:
    tables = sorted(root.glob("DL_info*.csv"))
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise DataError(f"{root} must hold one DL_info*.csv (found: {found}); name the table with --annotations")
    return tables[0]


def _series_folders(images: Path) -> set[str]:
    return {child.name for child in images.iterdir() if SERIES_FOLDER.fullmatch(child.name) and child.is_dir()}


def _slice_numbers(folder: Path) -> set[int]:
    if not folder.is_dir():
        return set()
    names = (child.name for child in folder.iterdir())
    return {int(match[1]) for name in names if (match := SLICE_FILE.fullmatch(name))}
