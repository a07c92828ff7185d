"""Finding files under a folder, links followed."""

import os
from collections.abc import Iterator
from pathlib import Path

from mp3d.errors import DataError


def walk(root: Path) -> Iterator[Path]:
    """Every file under a folder in sorted order; linked folders are followed, each real folder is entered once.

    Raises:
        DataError: the root is no folder.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the folder that holds the data set")
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders.sort()
        yield from (Path(folder, name) for name in sorted(names))
