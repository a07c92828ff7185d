"""Files that are complete or not there: written beside their place, then renamed."""

import errno
import json
import os
from pathlib import Path
from secrets import token_hex
from typing import Any

ASIDE_PATTERN = ".*.aside"
"""What a killed writer may leave behind."""
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTDIR})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk, the user's quota or the largest file is full."""


def is_disk_full(error: BaseException) -> bool:
    """Whether writing failed for want of room, which nothing in the data is to blame for."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def is_not_writable(error: BaseException) -> bool:
    """Whether writing failed because the folder, or the disk below it, takes nothing any more."""
    return isinstance(error, OSError) and error.errno in _NOT_WRITABLE


def create_aside(path: Path, mode: int = 0o666) -> Path:
    """An empty file beside ``path``, with its permissions (less the umask) from the first moment on."""
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.aside")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    return temporary


def commit_aside(temporary: Path, path: Path) -> None:
    """Give the written file its name, once its content is on the disk."""
    _sync(temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def json_text(content: dict[str, Any]) -> str:
    """JSON with sorted keys, and a line of its own for each element of a top-level list."""
    fields = []
    for name, value in sorted(content.items()):
        text = json.dumps(value, sort_keys=True)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(element, sort_keys=True) for element in value) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def write_once(path: Path, text: str) -> None:
    """Write a whole text file where there is none; one that another process just wrote stays."""
    temporary = create_aside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links, such as FAT or some of those in a network
            temporary.replace(path)
    except FileNotFoundError:  # whoever was first clears away what others had begun
        if not path.exists():
            raise
    finally:
        temporary.unlink(missing_ok=True)


def write_aside(path: Path, text: str, mode: int = 0o666) -> Path:
    """Write or replace a whole text file."""
    temporary = create_aside(path, mode)
    try:
        temporary.write_text(text, encoding="utf-8")
        commit_aside(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
