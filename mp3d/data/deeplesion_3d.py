"""DeepLesion's fully annotated sub-volumes: 3D boxes of every lesion in 999 runs of slices (Yan et al., TMI 2020).

Both of their parts, ``val`` and ``test``, were drawn from DeepLesion's official *test* split, with no patient in both.
So their ``val`` is not DeepLesion's: what is tuned on it has seen patients of the official test split.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mp3d.data.deeplesion import clip_box, lesions_by_series, notes, only_table, run_spacing, series_of_run
from mp3d.data.deeplesion_images import SliceRun, list_slices, read_run
from mp3d.data.deeplesion_table import SERIES_FOLDER
from mp3d.data.files import check_folder
from mp3d.data.series import CTSeries, Truth
from mp3d.data.source import Item, Source
from mp3d.data.splits import SPLITS
from mp3d.errors import DataError, Refusal

READER = "deeplesion3d/1"
BOXES = "manual_3d_boxes.json"
_NAME = re.compile(rf"({SERIES_FOLDER.pattern})_(\d{{3,4}})-(\d{{3,4}})")

Box3D = tuple[float, float, int, float, float, int]
"""``x1 y1 z1 x2 y2 z2``: x and y as half-open pixel edges from 0, z as slice numbers, both included."""


class SubVolume(NamedTuple):
    """What the boxes' file says of one sub-volume."""

    name: str
    split: str
    series: str
    numbers: range
    boxes: tuple[Box3D, ...]


def read_deeplesion_3d(
    root: Path,
    boxes: Path | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
    empty_lists: Literal["unknown", "searched"] = "unknown",
) -> Source:
    """DeepLesion's fully annotated sub-volumes: 3D boxes, each slice with those that cross it.

    The boxes come as JSON, ``{"val": {"000001_01_01_103-115": [[x1, y1, z1, x2, y2, z2], ...]}, "test": ...}``; the
    authors publish a pickle with the same content, which is not opened here. Spacing is the table's. All lesions have
    the label 1; the slices of a 3D box have its instance. Both splits are of DeepLesion's official test split: do not
    tune on this val and report the official test score.

    Args:
        root: folder of the data set.
        boxes: file of the 3D boxes; left out: ``manual_3d_boxes.json`` in the root.
        annotations: the table of lesions; left out: the only ``DL_info*.csv`` in the root.
        images: as of the reader deeplesion.
        empty_lists: sub-volumes without a box in which the table marks a lesion: nobody knows what is there; or they
            were searched and hold nothing, as the authors' evaluation takes them.

    Raises:
        DataError: the root is no folder; no table, boxes or images, or one that cannot be read or contradicts itself.
    """
    check_folder(root)
    annotations, boxes = annotations or only_table(root), boxes or root / BOXES
    sub_volumes = read_boxes(boxes)
    listing = list_slices(root, images)
    lesions = lesions_by_series(annotations)
    items: list[Item] = []
    refused = list(listing.refused)
    counts: Counter[str] = Counter()
    for sub_volume in sub_volumes:
        places = listing.places.get(sub_volume.series, {})
        there = [places[number] for number in sub_volume.numbers if number in places]
        if not there:
            counts["sub-volumes without their images, not used"] += 1
            continue
        run = SliceRun(sub_volume.series, sub_volume.numbers.start, tuple(there))
        rows = lesions.get(sub_volume.series, [])
        try:
            if len(there) < len(sub_volume.numbers):
                missing = f"{len(sub_volume.numbers) - len(there)} of {len(sub_volume.numbers)} slices"
                raise Refusal("MISSING_SLICE", f"{missing} of a sub-volume are missing; fetch the series again")
            if not rows:
                raise Refusal("MISSING_GEOMETRY", "the table has no row of this series, so there is no spacing")
            spacing_mm = run_spacing(rows, run)
            if math.isnan(spacing_mm[2]):
                raise Refusal("BAD_SPACING", "the table gives no slice interval above 0 mm for a sub-volume")
        except Refusal as refusal:
            refused.append((sub_volume.name, refusal))
            continue
        doubtful = not sub_volume.boxes and any(lesion.slice_number in run.numbers for lesion in rows)
        counts["sub-volumes without a box although the table marks a lesion there"] += doubtful
        official = rows[0].split
        counts[f"sub-volumes in {sub_volume.split} that are of DeepLesion's official {official} split"] += (
            official != sub_volume.split
        )
        searched = empty_lists == "searched" or not doubtful
        load = partial(load_sub_volume, run, sub_volume.boxes, searched, spacing_mm)
        items.append(Item(sub_volume.name, sub_volume.series.split("_")[0], sub_volume.split, load))
    if not items and not refused:
        raise DataError(f"no image of {boxes.name} is there; name the folder that holds them with --images")
    return Source(
        dataset="deeplesion3d",
        reader=READER,
        class_names=("lesion",),
        items=tuple(items),
        refused=tuple(refused),
        options={
            "empty_lists": empty_lists,
            "annotations_sha256": sha256(annotations.read_bytes()).hexdigest(),
            "boxes_sha256": sha256(boxes.read_bytes()).hexdigest(),
        },
        notes=notes(counts, listing),
    )


def load_sub_volume(
    run: SliceRun, boxes: Sequence[Box3D], searched: bool, spacing_mm: tuple[float, float, float]
) -> CTSeries:
    """Read the slices of a sub-volume; its boxes are the instances 1, 2, ...

    Args:
        run: the slices.
        boxes: of the sub-volume; may be cut at the image's edge.
        searched: whether a slice that no box crosses holds nothing.
        spacing_mm: x, y, slice interval.

    Raises:
        Refusal: as :func:`~mp3d.data.deeplesion_images.read_run`.
    """
    hu = read_run(run)
    clipped = [clip_box((x1, y1, x2, y2), *hu.shape[1:]) for x1, y1, _, x2, y2, _ in boxes]
    truths = []
    for number in run.numbers:
        crossing = [i for i, (_, _, z1, _, _, z2) in enumerate(boxes) if z1 <= number <= z2]
        inside = [box for i in crossing if (box := clipped[i][0]) is not None]
        if searched and len(inside) == len(crossing):
            instances = np.array(crossing, np.int64) + 1
            found = np.array(inside, np.float32).reshape(-1, 4)
            truths.append(Truth(found, np.ones(len(found), np.int64), instances=instances))
        else:
            truths.append(Truth())
    warnings = {warning for _, warning in clipped if warning}
    return series_of_run(run, hu, spacing_mm, tuple(truths), warnings)


def read_boxes(path: Path) -> list[SubVolume]:
    """The sub-volumes in the order of their names.

    Raises:
        DataError: the file cannot be read, or something in it is no sub-volume with its boxes; it is named.
    """
    try:
        content = json.loads(path.read_bytes())
        parts = [(split, list(named.items())) for split, named in content.items()]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        told = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} cannot be read as JSON of splits, sub-volumes and boxes ({told})") from error
    if strange := [split for split, _ in parts if split not in SPLITS]:
        raise DataError(f"{path} has the split {strange[0]!r}; splits are {', '.join(SPLITS)}")
    return sorted(_parsed(path, parts), key=lambda sub_volume: sub_volume.name)


def _parsed(path: Path, parts: list[tuple[str, list[tuple[str, Any]]]]) -> Iterator[SubVolume]:
    for split, named in parts:
        for name, boxes in named:
            parsed = _NAME.fullmatch(name)
            if parsed is None or int(parsed[3]) < int(parsed[2]):
                raise DataError(f"{path}: {name!r} is no sub-volume such as 000001_01_01_103-115")
            numbers = range(int(parsed[2]), int(parsed[3]) + 1)
            if not isinstance(boxes, list) or not all(_is_box(box, numbers) for box in boxes):
                rule = "boxes are lists of x1 < x2, y1 < y2 and slices z1 <= z2 inside the sub-volume"
                raise DataError(f"{path}: {name} has something else than [x1, y1, z1, x2, y2, z2]; {rule}")
            yield SubVolume(name, split, parsed[1], numbers, tuple(map(tuple, boxes)))


def _is_box(box: Any, numbers: range) -> bool:
    if not isinstance(box, list) or len(box) != 6 or not all(type(value) in (int, float) for value in box):
        return False
    x1, y1, z1, x2, y2, z2 = box
    return -np.inf < x1 < x2 < np.inf and -np.inf < y1 < y2 < np.inf and z1 <= z2 and z1 in numbers and z2 in numbers
