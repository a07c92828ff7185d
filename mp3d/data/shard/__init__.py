"""What is stored: Parquet with one row per CT slice or colour picture, and a manifest written last.

    <folder>/
      plan.json                what was asked for; preparing goes on only with the same plan
      part-00000.parquet ...   rows; row groups of consecutive slices of one series: nine slices are in one or two
      part-00000.json ...      index, hash and rejects of that part, written when the part is complete
      manifest.json            the commit: without it the folder is no data set; index, counts, hashes, rejects

The image is plain little-endian int16 (or the picture's JPEG) in a binary column, zstd level 1, without dictionary and
statistics; windows are read several times faster from it than from Arrow's tensor columns (``benchmarks/windows.py``).
A series keeps its own z grid.

The manifest holds a CRC of the bytes of every row group and of the footer, so one flipped bit anywhere is found before
it is parsed; every row has a CRC of its own, compared when it is read, which also goes with it into the cache. For
other readers of Parquet, which know no manifest, every page carries Parquet's checksum too.
"""

from mp3d.data.shard.aside import ASIDE_PATTERN, is_disk_full, is_not_writable, json_text, write_aside, write_once
from mp3d.data.shard.cache import cached
from mp3d.data.shard.columns import read_columns
from mp3d.data.shard.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Reject,
    ShardSet,
    manifest_text,
    open_shards,
    write_manifest,
)
from mp3d.data.shard.part_file import PartFile, PartWriter, SeriesEntry, count_rows, entry_as_dict, entry_from_dict
from mp3d.data.shard.rows import (
    SCHEMA,
    Origin,
    Row,
    decode_image,
    decode_truth,
    hashed_id,
    picture_rows,
    row_is_intact,
    series_rows,
)

__all__ = [
    "ASIDE_PATTERN",
    "FORMAT_VERSION",
    "MANIFEST",
    "SCHEMA",
    "Origin",
    "PartFile",
    "PartWriter",
    "Reject",
    "Row",
    "SeriesEntry",
    "ShardSet",
    "cached",
    "count_rows",
    "decode_image",
    "decode_truth",
    "entry_as_dict",
    "entry_from_dict",
    "hashed_id",
    "is_disk_full",
    "is_not_writable",
    "json_text",
    "manifest_text",
    "open_shards",
    "picture_rows",
    "read_columns",
    "row_is_intact",
    "series_rows",
    "write_aside",
    "write_once",
    "write_manifest",
]
