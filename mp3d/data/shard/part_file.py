"""Writing and checked reading of one Parquet file of a data set."""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from errno import EIO
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from os import SEEK_CUR, SEEK_END, SEEK_SET
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mp3d.data.shard.aside import commit_aside, create_aside
from mp3d.data.shard.rows import SCHEMA, Row
from mp3d.errors import DataError

ROW_GROUP_BYTES = 4 * 2**20
"""Pixels in a row group before compression: 8 slices of 512 x 512, so that 9 are read out of 16."""
MIN_ROWS_PER_GROUP = 8

_COMPRESSION = {field.name + (".list.element" if pa.types.is_list(field.type) else ""): "none" for field in SCHEMA}
_COMPRESSION |= {"image": "zstd", "mask": "zstd"}
"""The rest of a row is a few hundred bytes, in columns that take longer to open compressed."""
_TAIL_BYTES = 8
"""A Parquet file ends with the length of its footer (4 bytes, little-endian) and ``PAR1``."""


@dataclass(frozen=True)
class SeriesEntry:
    """A line of the manifest's index: enough to plan sampling without opening a file, and to check what is read."""

    series: str
    patient: str
    split: str
    file: str
    first_row_group: int
    rows_per_group: int
    num_rows: int
    spacing_mm: tuple[float, float, float] | None
    """z, y, x; None for pictures."""
    boxes_per_row: tuple[int | None, ...] | None
    """None where nobody looked; the whole is None where no row has boxes."""
    warnings: tuple[str, ...] = ()
    group_crc32: tuple[int, ...] = ()
    """Of the bytes of each of its row groups; the file's first four bytes belong to the first group of the file."""
    footer_crc32: int = 0
    """Of the bytes of the file behind the last row group."""
    marked_per_row: tuple[bool | None, ...] | None = None
    """Whether a row's mask marks anything; None where nobody looked; the whole is None where no row has a mask."""

    @property
    def num_groups(self) -> int:
        return -(-self.num_rows // self.rows_per_group)

    def rows_with_boxes(self) -> list[int]:
        return [i for i, count in enumerate(self.boxes_per_row or ()) if count]

    def rows_without_boxes(self) -> list[int]:
        """Rows that were searched and hold nothing: the only honest negatives."""
        return [i for i, count in enumerate(self.boxes_per_row or ()) if count == 0]

    def rows_with_mask(self, marked: bool) -> list[int]:
        """Rows whose mask marks something, or those whose mask says that there is nothing."""
        return [i for i, found in enumerate(self.marked_per_row or ()) if found is marked]


def entry_as_dict(entry: SeriesEntry) -> dict[str, Any]:
    return asdict(entry)


def entry_from_dict(content: dict[str, Any]) -> SeriesEntry:
    """Inverse of :func:`entry_as_dict` after a way through JSON, which knows no tuples."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return SeriesEntry(**fields)


@dataclass(frozen=True)
class PartFile:
    """A finished Parquet file."""

    name: str
    rows: int
    bytes: int
    sha256: str


class PartWriter:
    """Writes one Parquet file, series by series; row groups never hold two series.

    A context manager: the file takes its name when the block ends; a block that raises or appends nothing leaves none.

    Attributes:
        entries: the index of what was appended; with its checksums once the block has ended.
        file: the finished file, once the block has ended; None where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[SeriesEntry] = []
        self.file: PartFile | None = None
        self._row_groups = 0
        self._temporary = create_aside(path)
        self._writer = pq.ParquetWriter(
            self._temporary,
            SCHEMA,
            compression=_COMPRESSION,  # type: ignore[arg-type]  # a codec a column
            compression_level={name: 1 for name, codec in _COMPRESSION.items() if codec == "zstd"},
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
            if error is None and self.entries:
                self._finish()
        finally:
            self._temporary.unlink(missing_ok=True)

    def append(self, rows: Sequence[Row], warnings: Sequence[str] = ()) -> None:
        """Add the rows of one series (or of one batch of pictures, which then is one entry of the index)."""
        if not rows:
            raise ValueError("a series without rows cannot be stored")
        largest = max(len(row["image"]) for row in rows)
        per_group = max(MIN_ROWS_PER_GROUP, ROW_GROUP_BYTES // max(largest, 1))
        for start in range(0, len(rows), per_group):  # so that only one group exists twice in memory
            self._writer.write_table(_as_table(rows[start : start + per_group]))
        counts = tuple(None if row["boxes"] is None else len(row["boxes"]) // 4 for row in rows)
        marked = tuple(None if row["mask"] is None else row["mask"].strip(b"\0") != b"" for row in rows)
        first = rows[0]
        self.entries.append(
            SeriesEntry(
                series=first["series"],
                patient=first["patient"],
                split=first["split"],
                file=self.path.name,
                first_row_group=self._row_groups,
                rows_per_group=per_group,
                num_rows=len(rows),
                spacing_mm=None if first["spacing_mm"] is None else tuple(first["spacing_mm"]),
                boxes_per_row=None if all(count is None for count in counts) else counts,
                warnings=tuple(warnings),
                marked_per_row=None if all(found is None for found in marked) else marked,
            )
        )
        self._row_groups += self.entries[-1].num_groups

    def _finish(self) -> None:
        """Read the file once more for its checksums, then give it its name."""
        starts = [0, *_group_ends(pq.read_metadata(self._temporary))]
        digest, crcs = sha256(), []
        with self._temporary.open("rb", buffering=0) as file:
            size = file.seek(0, SEEK_END)
            file.seek(0)
            lengths = [end - start for start, end in pairwise([*starts, size])]
            room = memoryview(bytearray(max(lengths)))  # new memory for each would take longer than reading
            for length in lengths:
                content = room[:length]
                if file.readinto(content) != length:
                    raise OSError(EIO, "what was just written cannot be read", str(self._temporary))
                digest.update(content)
                crcs.append(zlib.crc32(content))
        *groups, footer = crcs
        self.entries = [
            replace(entry, group_crc32=tuple(groups[entry.first_row_group :][: entry.num_groups]), footer_crc32=footer)
            for entry in self.entries
        ]
        commit_aside(self._temporary, self.path)
        self.file = PartFile(self.path.name, sum(entry.num_rows for entry in self.entries), size, digest.hexdigest())


def _as_table(rows: Sequence[Row]) -> pa.Table:
    """The rows in Arrow; images that lie one behind the other, as the slices of a volume do, are not copied."""
    images = [pa.py_buffer(row["image"]) for row in rows]
    if all(one.address + one.size == next_.address for one, next_ in pairwise(images)):
        bounds = np.cumsum([0, *(image.size for image in images)], dtype=np.int32)
        content = pa.foreign_buffer(images[0].address, int(bounds[-1]), base=images)
        column = pa.BinaryArray.from_buffers(pa.binary(), len(images), [None, pa.py_buffer(bounds), content])
    else:
        column = pa.array([row["image"] for row in rows], pa.binary())
    place = SCHEMA.get_field_index("image")
    rest = pa.Table.from_pylist(list(rows), SCHEMA.remove(place))
    return rest.add_column(place, SCHEMA.field(place), column)


def count_rows(path: Path) -> int:
    """Rows of a Parquet file by its footer.

    Raises:
        DataError: the file is missing or its footer cannot be read.
    """
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}; delete it and run jobs/prepare.py again") from error


@lru_cache(maxsize=32)
def read_row_group(path: Path, modified_ns: int, group: int, group_crc32: int, footer_crc32: int) -> pa.Table:
    """One row group whose bytes, and the footer's, are checked before they are parsed.

    Row groups are kept, a few hundred megabytes at most: neighbouring key slices and pictures share them.
    ``modified_ns`` is there so that a file which was written anew is read anew.

    Raises:
        DataError: the bytes are not those that were written.
        OSError: the file cannot be read.
    """
    metadata, ends = read_footer(path, modified_ns, footer_crc32)
    start, end = ends[group : group + 2]
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(end - start)
    if zlib.crc32(content) != group_crc32:
        raise _altered(path, f"row group {group}")
    parquet = pq.ParquetFile(_PieceOfFile(content, start), metadata=metadata, pre_buffer=False)
    return parquet.read_row_group(group, use_threads=False)


@lru_cache(maxsize=256)
def read_footer(path: Path, _modified_ns: int, footer_crc32: int) -> tuple[pq.FileMetaData, list[int]]:
    """What is written where, and where each row group begins and ends; kept, for it is wanted with every row group."""
    with path.open("rb") as file:
        size = file.seek(0, SEEK_END)
        file.seek(max(size - _TAIL_BYTES, 0))
        footer = int.from_bytes(file.read(_TAIL_BYTES)[:4], "little") + _TAIL_BYTES
        file.seek(max(size - footer, 0))
        content = file.read()
    if zlib.crc32(content) != footer_crc32:
        raise _altered(path, "the footer")
    metadata = pq.read_metadata(pa.BufferReader(content))
    return metadata, [0, *_group_ends(metadata)]


class _PieceOfFile:
    """Bytes that were checked, at their place in a file, for Arrow to parse: it does not read the file again."""

    closed = False

    def __init__(self, content: bytes, start: int) -> None:
        self._content, self._start, self._at = memoryview(content), start, 0

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        end = self._start + len(self._content)
        self._at = offset + {SEEK_SET: 0, SEEK_CUR: self._at, SEEK_END: end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> memoryview:
        first = self._at - self._start
        self._at += size
        return self._content[first : first + size]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def _group_ends(metadata: pq.FileMetaData) -> list[int]:
    """Where each row group ends in the file; the next one begins there."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    last_columns = (group.column(group.num_columns - 1) for group in groups)
    return [column.data_page_offset + column.total_compressed_size for column in last_columns]


def _altered(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what} is not what was written; delete the file and run jobs/prepare.py again")
