"""The folder of a cache, which the processes of a node share: who may write what, and how much fits.

Files take their name when they are complete, and all that changes which files there are happens under one lock. A
killed process loses its locks, so nothing it leaves is in the way of the next one.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mp3d.data.shard.aside import ASIDE_PATTERN
from mp3d.errors import ConfigError

_SET_NAME = re.compile(r"v\d+-[0-9a-f]{16}")
_LOCK = "lock"
_in_use: dict[Path, int] = {}
"""Open folders; each is locked as long as this process, and what it forked, lives."""


def claim_set(cache: Path, name: str) -> Path:
    """Make the folder of one data set in a cache, or take it into use; in use it is not removed for another's sake.

    Raises:
        ConfigError: the cache cannot be made, written or locked.
    """
    folder = cache / name
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _exclusive(cache):
            folder.mkdir(mode=0o700, exist_ok=True)
            os.utime(folder)  # used last
            if folder not in _in_use:
                held = os.open(folder, os.O_RDONLY)
                fcntl.flock(held, fcntl.LOCK_SH)
                _in_use[folder] = held
    except OSError as error:
        raise ConfigError(
            f"{cache} cannot be made, written or locked ({error.strerror}); choose a folder on a disk of this node"
        ) from error
    return folder


def reserve(path: Path, num_bytes: int, max_bytes: int) -> BinaryIO | None:
    """An empty file to fill in place of ``path``, to be ended by :func:`commit` or :func:`give_up`.

    Where the cache would grow beyond ``max_bytes``, other data sets leave it, the one used longest ago first.

    Returns:
        None where another process has made the file, or is making it.

    Raises:
        OSError: ``ENOSPC``, there is no room for so many bytes; or the folder cannot be written.
    """
    with _exclusive(path.parent.parent):
        if path.exists():
            return None
        file = os.fdopen(os.open(_aside(path), os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            if not _lock(file.fileno()):
                file.close()
                return None
            file.truncate(0)
            _make_room(path.parent, num_bytes, max_bytes)
            file.truncate(num_bytes)  # so that others count it
        except BaseException:
            give_up(file, path)
            raise
        return file


def commit(file: BinaryIO, path: Path) -> None:
    """Give a filled file its name."""
    file.truncate()
    file.flush()
    with _exclusive(path.parent.parent):
        _aside(path).replace(path)
    file.close()


def give_up(file: BinaryIO, path: Path) -> None:
    _aside(path).unlink(missing_ok=True)
    file.close()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.aside")


@contextmanager
def _exclusive(cache: Path) -> Iterator[None]:
    descriptor = os.open(cache / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_room(mine: Path, num_bytes: int, max_bytes: int) -> None:
    sets = [child for child in mine.parent.iterdir() if _SET_NAME.fullmatch(child.name)]
    spare = max_bytes - num_bytes - sum(map(_size, sets))
    if spare < 0:
        for aside in mine.glob(ASIDE_PATTERN):
            spare += _remove_abandoned(aside)
    for other in sorted(sets, key=lambda folder: folder.stat().st_mtime_ns):
        if spare < 0 and other != mine:
            spare += _remove_unused(other)
    if spare < 0:
        raise OSError(errno.ENOSPC, f"the cache may hold {max_bytes / 1e9:g} GB")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _remove_abandoned(aside: Path) -> int:
    """Remove what a killed process left; returns the bytes."""
    with aside.open("rb") as file:
        if not _lock(file.fileno()):
            return 0
        aside.unlink()
        return os.fstat(file.fileno()).st_size


def _remove_unused(folder: Path) -> int:
    """Remove the data set that no process uses; returns the bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(descriptor):
            return 0
        size = _size(folder)
        shutil.rmtree(folder)
        return size
    finally:
        os.close(descriptor)
