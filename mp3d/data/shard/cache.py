"""A cache on the node's own disk: decoded CT series as memory-mapped int16, for those who read slices over and over.

    <cache>/
      v2-<digest of the manifest>/    one data set; folders of other versions are not looked into
        part-00000-0.hu               a series: its slices, one after the other, then its rows without them

A series is written when one of its slices is first asked for. Its rows carry their checksums from the shards: each
slice is compared with its own when a process first reads it, the rest of the file with a checksum at its end. Reading
touches no other slices. What is damaged is made again; what does not fit is read from the shards. Pictures are not
cached: they are small, and their JPEG is decoded anyway.
"""

import mmap
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int16

from mp3d.data.shard.aside import is_disk_full
from mp3d.data.shard.cache_folder import claim_set, commit, give_up, reserve
from mp3d.data.shard.manifest import ShardSet
from mp3d.data.shard.part_file import SeriesEntry
from mp3d.data.shard.rows import SCHEMA, Row, row_is_intact

CACHE_VERSION = 2
_ROWS_SCHEMA = SCHEMA.remove(SCHEMA.get_field_index("image"))
_TRAILER = struct.Struct("<8sQQ")
"""Magic bytes, length of the Arrow stream before it, and its CRC."""
_MAGIC = b"mp3d hu\n"
_ALIGNMENT = 64
"""Of the Arrow stream in the file."""
_TEXT_BYTES = 4096
"""More than the rest of a row takes."""


@dataclass(frozen=True)
class CachedShards(ShardSet):
    """A data set read through a cache.

    Attributes:
        stored: the data set as it is read without one.
        cache: its own folder in there.
    """

    stored: ShardSet
    cache: Path
    max_bytes: int

    def view_rows(self, entry: SeriesEntry, start: int, stop: int) -> list[Row]:
        series = self._cached(entry, start, stop)
        return self.stored.view_rows(entry, start, stop) if series is None else series.rows(start, stop)

    def read_slices(self, entry: SeriesEntry, start: int, stop: int) -> tuple[list[Row], Int16[np.ndarray, "d h w"]]:
        series = self._cached(entry, start, stop)
        if series is None:
            return self.stored.read_slices(entry, start, stop)
        return series.rows(start, stop), series.hu[start:stop]

    def _cached(self, entry: SeriesEntry, start: int, stop: int) -> "_CachedSeries | None":
        """The series with these slices verified; None where they must be read from the shards."""
        if entry.spacing_mm is None or not 0 <= start < stop <= entry.num_rows:
            return None
        path = self.cache / f"{Path(entry.file).stem}-{entry.first_row_group}.hu"
        try:
            series = _open_series(path)
            series.verify(start, stop)
        except FileNotFoundError:
            return _open_series(path) if self._make(entry, path) else None
        except ValueError:
            warnings.warn(f"{path} is not what was written; it is made again", stacklevel=2)
            path.unlink(missing_ok=True)
            _open_series.cache_clear()
            return None
        return series

    def _make(self, entry: SeriesEntry, path: Path) -> bool:
        """Write a series into the cache; False where another process does, or where it does not fit."""
        if self.cache in _full:
            return False
        first = self.stored.read_rows(entry, 0, 1)[0]
        most = entry.num_rows * (len(first["image"]) + first["rows"] * first["columns"] + _TEXT_BYTES)
        file = None
        try:
            file = reserve(path, most, self.max_bytes)
            if file is None:
                return False
            rows = []
            for row in self.stored.iter_rows(entry):
                file.write(row.pop("image"))
                rows.append(row)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            stream = BytesIO()
            with pa.ipc.new_stream(stream, _ROWS_SCHEMA) as writer:
                writer.write_table(pa.Table.from_pylist(rows, _ROWS_SCHEMA))
            file.write(stream.getbuffer())
            file.write(_TRAILER.pack(_MAGIC, len(stream.getbuffer()), zlib.crc32(stream.getbuffer())))
            commit(file, path)
        except BaseException as error:
            if file is not None:
                give_up(file, path)
            if not is_disk_full(error):
                raise
            warnings.warn(f"the cache is full ({error}); the rest is read from the shards", stacklevel=2)
            _full.add(self.cache)
            return False
        return True


_full: set[Path] = set()
"""Where this process found no more room."""


def cached(shards: ShardSet, folder: str | Path | None, max_gb: float) -> ShardSet:
    """The same data set, read through a cache; without a folder, itself.

    Args:
        shards: an opened data set.
        folder: of the cache, on a disk of this node; made if it is not there. Several data sets and processes share it.
        max_gb: most that the folder may hold. Data sets that nobody uses make room; what is in use stays.

    Raises:
        ConfigError: the folder cannot be made, written or locked.
    """
    if folder is None:
        return shards
    own = claim_set(Path(folder), f"v{CACHE_VERSION}-{shards.digest[:16]}")
    return CachedShards(**vars(shards), stored=shards, cache=own, max_bytes=int(max_gb * 1e9))


class _CachedSeries:
    """An opened file of the cache.

    Attributes:
        hu: the slices, mapped: nothing is read before it is looked at.
        table: the rows without their slices.
    """

    def __init__(self, hu: Int16[np.ndarray, "d h w"], table: pa.Table) -> None:
        self.hu, self.table = hu, table
        self._verified: Bool[np.ndarray, " d"] = np.zeros(len(hu), bool)

    def rows(self, start: int, stop: int) -> list[Row]:
        rows = self.table.slice(start, stop - start).to_pylist()
        return [row | {"image": hu.data.cast("B")} for row, hu in zip(rows, self.hu[start:stop], strict=True)]

    def verify(self, start: int, stop: int) -> None:
        """Raises: ValueError, a slice is not what was written; what was found right is not looked at again."""
        if self._verified[start:stop].all():
            return
        for index, row in enumerate(self.rows(start, stop), start):
            if not self._verified[index] and not row_is_intact(row):
                raise ValueError
            self._verified[index] = True


@lru_cache(maxsize=1024)
def _open_series(path: Path) -> _CachedSeries:
    """Raises: ValueError, the end of the file is not what was written; FileNotFoundError."""
    with path.open("rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if len(memory) < _TRAILER.size:
        raise ValueError
    magic, length, crc32 = _TRAILER.unpack(memory[-_TRAILER.size :])
    stream = memory[-_TRAILER.size - length : -_TRAILER.size]
    if magic != _MAGIC or zlib.crc32(stream) != crc32:
        raise ValueError
    table = pa.ipc.open_stream(pa.py_buffer(stream)).read_all()
    first = table.slice(0, 1).to_pylist()[0]
    shape = (table.num_rows, first["rows"], first["columns"])
    hu = np.frombuffer(memory, "<i2", count=int(np.prod(shape))).reshape(shape)
    return _CachedSeries(hu, table)
