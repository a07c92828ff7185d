"""Tables of lesion boxes on CT slices, in CSV: one box in a row."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path

from mp3d.errors import DataError, Refusal

SERIES, IMAGE, POSITION, LABEL = "SeriesInstanceUID", "SOPInstanceUID", "z_mm", "label"
SIDES = ("x1", "y1", "x2", "y2")
SURPLUS = "values beyond the last column"
LESION = "lesion"
"""The label of every box where the table has no column of labels."""
MAX_TABLE_BYTES = 64 * 2**20
"""Half a million boxes."""


@dataclass(frozen=True)
class BoxRow:
    """One row: a box on a slice, or without a box that the slice, or the series, was searched and holds nothing.

    Attributes:
        line: of the file, from 1.
        sop_instance_uid: of the slice; empty where the row has ``z_mm`` instead.
        z_mm: Image Position (Patient) of the slice, its third value.
        box: xyxy, pixels, half-open; x1 <= x2 and y1 <= y2.
        label: its class.
    """

    line: int
    sop_instance_uid: str
    z_mm: float | None
    box: tuple[float, float, float, float] | None
    label: str


@dataclass(frozen=True)
class BoxTable:
    """What one or more tables say.

    Attributes:
        rows: by Series Instance UID, in the order of the file.
        wrong: for a series with rows that cannot be used, what is wrong with the first of these.
        sha256: of the files.
    """

    rows: dict[str, list[BoxRow]]
    wrong: dict[str, Refusal]
    sha256: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the boxes, sorted."""
        return tuple(sorted({row.label for rows in self.rows.values() for row in rows if row.box})) or (LESION,)


def read_box_tables(paths: Sequence[Path]) -> BoxTable:
    """Read tables with the columns SeriesInstanceUID; SOPInstanceUID or z_mm or both; x1, y1, x2, y2; perhaps label.

    Raises:
        DataError: a table cannot be read, lacks a column, or has a row without series; the line is named.
    """
    contents = {path: _read(path) for path in paths}
    table = BoxTable(defaultdict(list), {}, "+".join(sha256(content).hexdigest() for content in contents.values()))
    for path, content in contents.items():
        for line, fields in _lines(path, content):
            if not (series := fields[SERIES]):
                raise DataError(f"{path}, line {line} has no {SERIES}; every row belongs to a series")
            try:
                table.rows[series].append(_row(line, fields))
            except ValueError as error:
                table.wrong.setdefault(
                    series, Refusal("BAD_BOX", f"line {line} of the table of boxes {error}; mend it")
                )
    return table


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"{path} has more than {MAX_TABLE_BYTES >> 20} MiB; is it the table of boxes?")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and values of the rows."""
    try:
        lines = csv.DictReader(StringIO(content.decode("utf-8-sig"), newline=""), restkey=SURPLUS)
        columns = lines.fieldnames = [name.strip() for name in lines.fieldnames or ()]
        wanted = [SERIES, *SIDES] + ([] if {IMAGE, POSITION} & set(columns) else [f"{IMAGE} or {POSITION}"])
        if missing := [name for name in wanted if name not in columns]:
            raise DataError(f"{path} has no column {missing[0]}; write the names of the columns with commas between")
        yield from _filled(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def _filled(lines: csv.DictReader) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows that are not blank, as spreadsheets leave some at the end, without spaces around the values."""
    for row in lines:
        fields = {name: "".join(value or "").strip() for name, value in row.items()}
        if any(fields.values()):
            yield lines.line_num, fields


def _row(line: int, fields: dict[str, str]) -> BoxRow:
    """Raises ValueError with what is wrong."""
    if fields.get(SURPLUS):  # of a decimal comma, say
        raise ValueError("has more values than columns; write decimals with a point")
    image, position = fields.get(IMAGE, ""), fields.get(POSITION, "")
    z_mm = _number(fields, POSITION) if position else None
    label = fields.get(LABEL, LESION)
    if not any(fields[side] for side in SIDES):
        return BoxRow(line, image, z_mm, None, label)
    x1, y1, x2, y2 = (_number(fields, side) for side in SIDES)
    if x1 > x2 or y1 > y2:
        raise ValueError(f"has {'x1 above x2' if x1 > x2 else 'y1 above y2'}; corners are left and top first")
    if not image and z_mm is None:
        raise ValueError(f"has a box and no slice: neither {IMAGE} nor {POSITION}")
    if not label:
        raise ValueError("has a box and no label")
    return BoxRow(line, image, z_mm, (x1, y1, x2, y2), label)


def _number(fields: dict[str, str], column: str) -> float:
    try:
        value = float(fields[column])
    except ValueError:
        raise ValueError(f"has no number as {column}") from None
    if not math.isfinite(value):
        raise ValueError(f"has a {column} that is not finite")
    return value
