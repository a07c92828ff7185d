"""DeepLesion's table of lesions, ``DL_info.csv``."""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mp3d.errors import DataError

SPLIT_NAMES = {"1": "train", "2": "val", "3": "test"}
LESION_TYPES: dict[str, str | None] = {
    "-1": None,
    "1": "bone",
    "2": "abdomen",
    "3": "mediastinum",
    "4": "liver",
    "5": "lung",
    "6": "kidney",
    "7": "soft tissue",
    "8": "pelvis",
}
"""Of ``Coarse_lesion_type``; the training split has none."""
SERIES_FOLDER = re.compile(r"\d{6}_\d{2}_\d{2}")
SLICE_FILE = re.compile(r"(\d{3}|[1-9]\d{3})\.png")


@dataclass(frozen=True)
class Lesion:
    """A row of the table.

    Attributes:
        folder: ``<patient>_<study>_<series>``.
        slice_number: of the key slice; the number in its file name.
        box: xyxy in pixels, counted from 0, padded by 5 pixels as published; may leave the image.
        spacing_mm: x, y and slice interval, as the table says them.
        split: the official one.
        noisy: the authors doubt this annotation.
        type: where the lesion is, one of ``LESION_TYPES``; None: not annotated.
        long_diameter_px: as it was measured (RECIST); NaN where the table has none.
    """

    folder: str
    slice_number: int
    box: tuple[float, float, float, float]
    spacing_mm: tuple[float, float, float]
    split: str
    noisy: bool
    type: str | None = None
    long_diameter_px: float = math.nan


def read_table(path: Path) -> list[Lesion]:
    """Every row of ``DL_info.csv``.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a row that cannot be parsed; the line is named.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(_parse(csv.DictReader(file), path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _parse(rows: csv.DictReader, path: Path) -> Iterator[Lesion]:
    for row in rows:
        try:
            folder, name = row["File_name"].rsplit("_", 1)
            number = SLICE_FILE.fullmatch(name)
            if number is None or not SERIES_FOLDER.fullmatch(folder):
                raise ValueError(f"File_name {row['File_name']!r} is not like 000001_01_01_109.png")
            x1, y1, x2, y2 = (float(value) - 1 for value in row["Bounding_boxes"].split(","))  # the table counts from 1
            x, y, z = (float(value) for value in row["Spacing_mm_px_"].split(","))
            split = SPLIT_NAMES[row["Train_Val_Test"].strip()]
            noisy = float(row["Possibly_noisy"]) > 0
            lesion_type = LESION_TYPES[row["Coarse_lesion_type"].strip()]
            diameter = _long_diameter(row.get("Lesion_diameters_Pixel_") or "")
        except KeyError as error:
            raise DataError(
                f"{path}, line {rows.line_num}: no column, split or lesion type {error}; is it DL_info.csv?"
            ) from error
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}, line {rows.line_num} cannot be parsed: {error}") from error
        yield Lesion(folder, int(number[1]), (x1, y1, x2, y2), (x, y, z), split, noisy, lesion_type, diameter)


def _long_diameter(diameters_px: str) -> float:
    """The first of ``long, short``; NaN where there is none above 0."""
    long = float(diameters_px.split(",")[0]) if diameters_px.strip() else math.nan
    return long if math.isfinite(long) and long > 0 else math.nan
