"""The manifest, and reading a data set through it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int16

from mp3d.data.shard.aside import json_text, write_aside
from mp3d.data.shard.part_file import SeriesEntry, entry_from_dict, read_row_group
from mp3d.data.shard.rows import Row, decode_image, row_is_intact, rows_of
from mp3d.errors import DataError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Reject:
    """A series or picture that was refused."""

    source: str
    """Keyed hash of where it lies."""
    reason: str
    """A code of :data:`mp3d.data.reasons.REASONS`."""
    detail: str


def manifest_text(content: dict[str, Any]) -> str:
    """The manifest with its format version and its own digest."""
    content = {"format_version": FORMAT_VERSION, **content}
    content["digest"] = _digest(content)
    return json_text(content)


def write_manifest(folder: Path, content: dict[str, Any]) -> Path:
    """Write ``manifest.json``, the last file of a data set.

    Args:
        folder: where the Parquet files stand.
        content: ``dataset``, ``class_names``, ``series`` (``entry_as_dict``), ``rejects`` and what else is to be known.
    """
    return write_aside(folder / MANIFEST, manifest_text(content))


@dataclass(frozen=True)
class ShardSet:
    """An opened data set. Cheap to pickle: it holds paths and the index, no file handles."""

    folder: Path
    dataset: str
    digest: str
    entries: tuple[SeriesEntry, ...]
    class_names: tuple[str, ...]
    rejects: tuple[Reject, ...]

    def split(self, name: str) -> list[SeriesEntry]:
        """The series of one split.

        Raises:
            DataError: there are none; the message says which splits there are.
        """
        found = [entry for entry in self.entries if entry.split == name]
        if not found:
            there = ", ".join(sorted({entry.split for entry in self.entries})) or "none"
            raise DataError(f"{self.folder} has no series in split {name!r}, only in: {there}; prepare it with one")
        return found

    def read_rows(self, entry: SeriesEntry, start: int, stop: int) -> list[Row]:
        """Rows ``start..stop-1`` of a series, read from the row groups that hold them.

        Raises:
            DataError: the file is not there, or not as it was written; the file and row group, or row, are named.
        """
        return [row | {"image": bytes(row["image"])} for row in self.view_rows(entry, start, stop)]

    def read_slices(self, entry: SeriesEntry, start: int, stop: int) -> tuple[list[Row], Int16[np.ndarray, "d h w"]]:
        """Slices ``start..stop-1`` of a CT series in HU, beside their rows; raises as :meth:`read_rows`."""
        rows = self.view_rows(entry, start, stop)
        return rows, np.stack([decode_image(row) for row in rows])

    def view_rows(self, entry: SeriesEntry, start: int, stop: int) -> list[Row]:
        """As :meth:`read_rows`, but the images are views: who keeps one keeps a whole row group in memory."""
        if not 0 <= start < stop <= entry.num_rows:
            raise IndexError(f"rows {start}..{stop - 1} of a series of {entry.num_rows}")
        first, last = start // entry.rows_per_group, (stop - 1) // entry.rows_per_group
        path = self.folder / entry.file
        try:
            modified = path.stat().st_mtime_ns
            groups = [
                read_row_group(path, modified, entry.first_row_group + i, entry.group_crc32[i], entry.footer_crc32)
                for i in range(first, last + 1)
            ]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: {error}; run jobs/prepare.py again") from error
        rows = rows_of(pa.concat_tables(groups).slice(start - first * entry.rows_per_group, stop - start))
        if len(rows) != stop - start:
            raise DataError(f"{path}: rows of a series are missing; delete the file and run jobs/prepare.py again")
        for number, row in enumerate(rows, start):
            if not row_is_intact(row):
                told = f"{path}: row {number} of series {entry.series} is not what was written"
                raise DataError(f"{told}; is the memory of this machine sound?")
        return rows

    def iter_rows(self, entry: SeriesEntry) -> Iterator[Row]:
        """All rows of a series, one row group in memory at a time."""
        for start in range(0, entry.num_rows, entry.rows_per_group):
            yield from self.read_rows(entry, start, min(start + entry.rows_per_group, entry.num_rows))


def open_shards(folder: str | Path) -> ShardSet:
    """Open what ``jobs/prepare.py`` wrote.

    Raises:
        DataError: no manifest (nothing there, or preparation was cut off), an altered one, or another format version.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {MANIFEST}: it is no prepared data set, or was cut off; run jobs/prepare.py (again)"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}; run jobs/prepare.py again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}; prepare it again")
    if content.get("digest") != _digest(content):
        raise DataError(f"{folder / MANIFEST} does not match its digest: it was altered; run jobs/prepare.py again")
    return ShardSet(
        folder=folder,
        dataset=content["dataset"],
        digest=content["digest"],
        entries=tuple(entry_from_dict(entry) for entry in content["series"]),
        class_names=tuple(content["class_names"]),
        rejects=tuple(Reject(**reject) for reject in content["rejects"]),
    )


def _digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
