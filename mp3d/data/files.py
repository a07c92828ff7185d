"""Finding files under a folder, links followed."""

import os
from collections.abc import Iterator
from pathlib import Path

from mp3d.errors import DataError


def check_folder(root: Path) -> None:
    """Raises DataError where the root of a data set is no folder."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the folder that holds the data set")


def walk(root: Path) -> Iterator[Path]:
    """Every file under a folder in sorted order; linked folders are followed, each real folder is entered once.

    Pipes, sockets and devices are no files: whoever opened one might wait for ever. What is there and cannot be reached
    is for the caller to refuse: broken links, and folders that cannot be listed, which then stand for what is in them.

    Raises:
        DataError: the root is no folder.
    """
    check_folder(root)
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError:
            yield folder
            continue
        subfolders = []
        for entry in entries:
            if _is_folder(entry):
                subfolders.append(Path(entry.path))
            elif _is_file(entry):
                yield Path(entry.path)
        waiting += reversed(subfolders)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_file(entry: os.DirEntry) -> bool:
    """Also a link that leads nowhere."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True
