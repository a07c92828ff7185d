"""DeepLesion (Yan et al. 2018): 16-bit PNG slices, and lesion boxes on key slices in ``DL_info.csv``.

A folder ``Images_png/<patient>_<study>_<series>`` holds the slices around its key slices, often as several runs with
gaps between; each run is an item of its own. About half of the lesions were marked, and only on key slices: of every
other slice nothing is known. A run is cut at a missing slice: neighbours of a key slice beyond the gap are all the last
slice before it. The authors' loader (``image_io_3DCE.py``) steps towards the key slice for the missing neighbour only,
and takes those behind the gap as they are.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16

from mp3d.data.deeplesion_images import SliceListing, SliceRun, list_slices, read_run
from mp3d.data.deeplesion_table import Lesion, read_table
from mp3d.data.files import check_folder
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.source import Item, Source
from mp3d.data.splits import SPLITS
from mp3d.errors import DataError, Refusal

READER = "deeplesion/3"
LONE_SLICE_MM = 1.0
"""Stands for the slice interval where the table gives none; no neighbour is ever read by it."""

Box = tuple[float, float, float, float]


def read_deeplesion(
    root: Path, annotations: Path | None = None, images: Path | None = None, keep_noisy: bool = True
) -> Source:
    """DeepLesion: key slices with boxes in 16-bit PNG, official split.

    All lesions have the label 1; the coarse type and the long RECIST diameter are stored beside it. The data set does
    not say how a slice lies in the patient: the affine takes columns for +x, rows for +y and slice numbers for +z of
    LPS, with the origin at slice 0, so that distances are right, but directions and places in the body are not.

    Consecutive slices are a series: a folder is cut where a slice is missing, and in a clip around a key slice all
    neighbours beyond the gap are the last slice before it. The authors step towards the key slice for the missing
    neighbour only.

    Where the table gives no slice interval (not finite, or not above 0) neighbours cannot be placed: each key slice of
    the run is a series of one slice, as in 3DCE (``image_io_3DCE.py``), and the other slices are not used.

    Args:
        root: folder of the data set.
        annotations: the table of lesions; left out: the only ``DL_info*.csv`` in the root.
        images: folder of the series folders, or of the zip parts (``Images_png_*.zip``) as published, which need not be
            unpacked; left out: ``Images_png`` in the root, and the root.
        keep_noisy: keep the boxes that are marked as possibly noisy, as the MP3D paper does.

    Raises:
        DataError: the root is no folder; no table, no images, or a table that cannot be read or contradicts itself.
    """
    check_folder(root)
    annotations = annotations or only_table(root)
    listing = list_slices(root, images)
    lesions = lesions_by_series(annotations)
    items: list[Item] = []
    refused = list(listing.refused)
    counts: Counter[str] = Counter()
    without_image: Counter[str] = Counter()
    for series in sorted(lesions.keys() | listing.places.keys()):
        if series not in lesions:
            counts["series folders without a row in the table, so without spacing and split, not used"] += 1
            continue
        splits = sorted({lesion.split for lesion in lesions[series]})
        if len(splits) > 1:
            raise DataError(f"{annotations} puts {series} into {' and '.join(splits)}; a series is in one split")
        there = listing.places.get(series, {})
        without_image[splits[0]] += sum(lesion.slice_number not in there for lesion in lesions[series])
        for run in listing.runs(series):
            key = f"{series}/{run.name}"
            try:
                spacing_mm = run_spacing(lesions[series], run)
            except Refusal as refusal:
                refused.append((key, refusal))
                continue
            marked = [lesion for lesion in lesions[series] if lesion.slice_number in run.numbers]
            kept = tuple(lesion for lesion in marked if keep_noisy or not lesion.noisy)
            counts["boxes marked as possibly noisy, not used"] += len(marked) - len(kept)
            parts = [run]
            if math.isnan(spacing_mm[2]):
                parts = [run.alone(number) for number in sorted({lesion.slice_number for lesion in marked})]
                counts["slices beside key slices of unknown slice interval, not used"] += len(run.places) - len(parts)
            for part in parts:
                boxed = tuple(lesion for lesion in kept if lesion.slice_number in part.numbers)
                load = partial(load_run, part, boxed, spacing_mm)
                items.append(Item(f"{series}/{part.name}", series.split("_")[0], splits[0], load))
    if not items and not refused:
        raise DataError(f"no image of {annotations.name} is there; name the folder that holds them with --images")
    return Source(
        dataset="deeplesion",
        reader=READER,
        class_names=("lesion",),
        items=tuple(items),
        refused=tuple(refused),
        options={"keep_noisy": keep_noisy, "annotations_sha256": sha256(annotations.read_bytes()).hexdigest()},
        notes=(*_without_image(without_image), *notes(counts, listing)),
    )


def load_run(run: SliceRun, lesions: Sequence[Lesion], spacing_mm: tuple[float, float, float]) -> CTSeries:
    """Read consecutive slices.

    Args:
        run: the slices.
        lesions: those with their key slice in the run.
        spacing_mm: x, y, slice interval; the interval may be NaN where the run is one slice.

    Raises:
        Refusal: as :func:`~mp3d.data.deeplesion_images.read_run`.
    """
    hu = read_run(run)
    boxes: dict[int, list[tuple[np.ndarray, str | None, float]]] = defaultdict(list)
    warnings: set[str] = set()
    if math.isnan(spacing_mm[2]):
        spacing_mm = (*spacing_mm[:2], LONE_SLICE_MM)
        warnings.add("INTERVAL_UNKNOWN")
    pixel_mm = math.sqrt(spacing_mm[0] * spacing_mm[1])  # its pixels are square
    for lesion in lesions:
        box, warning = clip_box(lesion.box, *hu.shape[1:])
        if warning:
            warnings.add(warning)
        if box is not None:
            boxes[lesion.slice_number].append((box, lesion.type, lesion.long_diameter_px * pixel_mm))
    truths = tuple(_truth(boxes[number]) for number in run.numbers)
    return series_of_run(run, hu, spacing_mm, truths, warnings)


def series_of_run(
    run: SliceRun,
    hu: Int16[np.ndarray, "d h w"],
    spacing_mm: tuple[float, float, float],
    truths: tuple[Truth, ...],
    warnings: set[str],
) -> CTSeries:
    """The slices of a run under its names; ``spacing_mm`` is x, y, slice interval."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[2, 3] = run.first * spacing_mm[2]
    patient, study, _ = run.series.split("_")
    return CTSeries(
        patient=patient,
        study=f"{patient}_{study}",
        series=f"{run.series}_{run.name}",
        volume=Volume(hu, affine),
        truths=truths,
        first_index=run.first,
        warnings=tuple(sorted(warnings)),
    )


def only_table(root: Path) -> Path:
    """The table of lesions of a data set.

    Raises:
        DataError: there is none in the root, or more than one.
    """
    tables = sorted(root.glob("DL_info*.csv"))
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise DataError(f"{root} must hold one DL_info*.csv (found: {found}); name the table with --annotations")
    return tables[0]


def lesions_by_series(annotations: Path) -> dict[str, list[Lesion]]:
    """The rows of the table; raises as :func:`~mp3d.data.deeplesion_table.read_table`."""
    lesions: dict[str, list[Lesion]] = defaultdict(list)
    for lesion in read_table(annotations):
        lesions[lesion.folder].append(lesion)
    return dict(lesions)


def notes(counts: Counter[str], listing: SliceListing) -> tuple[str, ...]:
    """A line for everything that was counted."""
    told = counts + Counter({"slices that lie in two places, read from the first": listing.num_twice})
    return tuple(f"{count} {what}" for what, count in sorted(told.items()))


def _without_image(counts: Counter[str]) -> tuple[str, ...]:
    """A line that counts the boxes without image of each split, where there are any."""
    by_split = ", ".join(f"{split} {counts[split]}" for split in SPLITS if counts[split])
    return (f"boxes without their image, not used: {by_split}",) if by_split else ()


def run_spacing(lesions: Sequence[Lesion], run: SliceRun) -> tuple[float, float, float]:
    """Of the rows of this run, or, where it has none, of the whole folder (two of its runs may differ).

    The interval (the last) is NaN where no row gives one.

    Raises:
        Refusal: ``BAD_SPACING`` or ``MIXED_SPACING``.
    """
    rows = [lesion for lesion in lesions if lesion.slice_number in run.numbers] or lesions
    for *in_plane, _ in (lesion.spacing_mm for lesion in rows):
        if not all(map(_is_length, in_plane)):
            raise Refusal("BAD_SPACING", f"pixel spacing (x, y) is {tuple(in_plane)} mm; each must be above 0")
    found = {lesion.spacing_mm for lesion in rows if _is_length(lesion.spacing_mm[2])}
    found = found or {(*lesion.spacing_mm[:2], math.nan) for lesion in rows}
    if len(found) > 1:
        raise Refusal("MIXED_SPACING", f"several spacings (x, y, interval) for one run: {sorted(found)} mm")
    return found.pop()


def clip_box(box: Box, rows: int, columns: int) -> tuple[Float[np.ndarray, " 4"] | None, str | None]:
    """The box inside the image, or None where nothing is left, and a warning code."""
    inside = np.clip(np.array(box, np.float32), 0, np.array([columns, rows, columns, rows], np.float32))
    if not (inside[0] < inside[2] and inside[1] < inside[3]):  # also where a number is NaN
        return None, "BOX_DROPPED"
    return inside, "BOX_CLIPPED" if (inside != np.array(box, np.float32)).any() else None


def _truth(lesions: Sequence[tuple[np.ndarray, str | None, float]]) -> Truth:
    """A slice whose boxes were all dropped is no slice without lesions."""
    if not lesions:
        return Truth()
    boxes, types, diameters_mm = zip(*lesions, strict=True)
    return Truth(
        np.stack(boxes),
        np.ones(len(boxes), np.int64),
        types=types,
        diameters_mm=None if all(map(math.isnan, diameters_mm)) else np.array(diameters_mm, np.float32),
    )


def _is_length(value: float) -> bool:
    return math.isfinite(value) and value > 0
