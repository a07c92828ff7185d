"""Any folder of DICOM with a CSV table of the lesion boxes: one's own annotations, or the export of another tool."""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mp3d.data.box_table import BoxRow, read_box_tables
from mp3d.data.boxes import truth_of_boxes
from mp3d.data.dicom import SeriesFiles, StoredSlice, group_series, load_volume
from mp3d.data.files import walk
from mp3d.data.rtstruct import PLANE_TOLERANCE
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.source import Item, Source
from mp3d.errors import DataError, Refusal

READER = "dicom_boxes/1"
TABLE = "boxes.csv"


def read_dicom_boxes(
    root: Path, boxes: Path | None = None, whole_series: bool = True, dataset: str = "dicom_boxes"
) -> Source:
    """CT series in DICOM, with lesion boxes in a table.

    The table has a row for each box, under the columns SeriesInstanceUID, SOPInstanceUID (or z_mm: the third value of
    the slice's Image Position), x1, y1, x2, y2 (pixels, half-open: the box of the single pixel (x, y) is x, y, x + 1,
    y + 1) and perhaps label; other columns are ignored. A row with empty x1 to y2 says that the slice, or where it
    names none the series, was searched and holds nothing. Of a series without a row nothing is known.

    Args:
        root: folder, searched through all subfolders; links are followed.
        boxes: the table; left out: every ``boxes.csv`` under the root.
        whole_series: every slice of a series with a row was searched; otherwise only the slices that rows name.
        dataset: name of the data set.

    Raises:
        DataError: no table, or one that cannot be read; see :func:`~mp3d.data.box_table.read_box_tables`.
    """
    root = root.absolute()
    paths = [boxes] if boxes else [path for path in walk(root) if path.name == TABLE]
    if not paths:
        raise DataError(f"{root} has no {TABLE}; write one, or name the table with --boxes")
    table = read_box_tables(paths)
    listing = group_series(root)
    refused = listing.refused
    stacks: dict[str, list[SeriesFiles]] = defaultdict(list)
    for series in listing.series:
        stacks[series.series_instance_uid].append(series)
    items: list[Item] = []
    for series in listing.series:
        if wrong := table.wrong.get(series.series_instance_uid):
            refused.append((series.key, wrong))
            continue
        rows = table.rows.get(series.series_instance_uid, [])
        others = [other for other in stacks[series.series_instance_uid] if other is not series]
        theirs = {header.sop_instance_uid for other in others for header in other.slices} - {""}
        rows = [row for row in rows if row.sop_instance_uid not in theirs]
        load = partial(load_series, series, tuple(rows), table.labels, whole_series)
        items.append(Item(series.key, series.patient, None, load))
    unused = sum(len(rows) for series_instance_uid, rows in table.rows.items() if series_instance_uid not in stacks)
    return Source(
        dataset=dataset,
        reader=READER,
        class_names=table.labels,
        items=tuple(sorted(items, key=lambda item: item.key)),
        refused=tuple(sorted(refused, key=lambda entry: entry[0])),
        options={"whole_series": whole_series, "boxes_sha256": table.sha256},
        notes=(f"{unused} rows of the table are of series that are not here",) if unused else (),
    )


def load_series(
    series: SeriesFiles, rows: Sequence[BoxRow], class_names: tuple[str, ...], whole_series: bool
) -> CTSeries:
    """Read one series with its rows of the table.

    Raises:
        Refusal: as :func:`~mp3d.data.dicom.load_volume`, or ``BOX_OFF_SLICE``.
    """
    volume, stored, warnings = load_volume(series)
    searched = whole_series and bool(rows)
    on_slice: dict[int, list[BoxRow]] = defaultdict(list)
    for row in rows:
        if row.sop_instance_uid or row.z_mm is not None:
            on_slice[_slice_of(row, volume, stored)].append(row)
        else:
            searched = True
    truths: list[Truth] = []
    codes: set[str] = set()
    for z, hu in enumerate(volume.hu):
        truth, found = Truth(), ()
        if searched or z in on_slice:
            boxes = [(row.box, class_names.index(row.label) + 1) for row in on_slice[z] if row.box]
            truth, found = truth_of_boxes([box for box, _ in boxes], [label for _, label in boxes], *hu.shape)
        truths.append(truth)
        codes.update(found)
    return CTSeries(
        series.patient, series.study, series.series, volume, tuple(truths), warnings=(*warnings, *sorted(codes))
    )


def _slice_of(row: BoxRow, volume: Volume, stored: Sequence[StoredSlice]) -> int:
    """Where both are given, the image decides."""
    if row.sop_instance_uid:
        there = [z for z, image in enumerate(stored) if image.sop_instance_uid == row.sop_instance_uid]
        if len(there) == 1:
            return there[0]
        detail = "a SOPInstanceUID that is no slice of its series; mend it"
        if there:
            detail = f"{len(there)} frames of one image; give z_mm and no SOPInstanceUID"
        raise Refusal("BOX_OFF_SLICE", f"line {row.line} of the table of boxes names {detail}")
    step_mm = float(volume.affine[2, 2])
    along_z = abs(step_mm) > volume.spacing_mm[0] / 2  # elsewhere one z_mm lies on many slices
    z = ((row.z_mm or 0.0) - float(volume.affine[2, 3])) / step_mm if along_z else math.nan
    if not (abs(z - np.rint(z)) <= PLANE_TOLERANCE and 0 <= np.rint(z) < len(volume.hu)):  # also NaN
        first, last = volume.affine[2, 3], volume.affine[2, 3] + step_mm * (len(volume.hu) - 1)
        raise Refusal(
            "BOX_OFF_SLICE",
            f"line {row.line} of the table of boxes has z_mm {row.z_mm:g}, where no slice is; they lie from "
            f"{first:g} to {last:g} mm, {abs(step_mm):g} mm apart",
        )
    return int(np.rint(z))
