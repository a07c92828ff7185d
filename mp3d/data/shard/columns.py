"""Reading some columns of a series, without its pixels: for counting, and for fitting to boxes."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from mp3d.data.shard.manifest import ShardSet
from mp3d.data.shard.part_file import SeriesEntry, read_footer
from mp3d.errors import DataError


def read_columns(shards: ShardSet, entry: SeriesEntry, names: Sequence[str]) -> pa.Table:
    """These columns of all rows of a series (or batch of pictures).

    What is checked are the footer and the checksums of the pages that are read, not those of whole row groups.

    Raises:
        DataError: the file is not there, or not as it was written.
    """
    path = shards.folder / entry.file
    groups = range(entry.first_row_group, entry.first_row_group + entry.num_groups)
    try:
        # parsing the footer anew for every series would cost more than the columns do
        metadata, _ = read_footer(path, path.stat().st_mtime_ns, entry.footer_crc32)
        with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as parquet:
            return parquet.read_row_groups(list(groups), columns=list(names), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}; delete the file and run jobs/prepare.py again") from error
