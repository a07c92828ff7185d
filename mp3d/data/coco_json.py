"""The JSON of COCO's instances, checked entry by entry; nothing in it is trusted."""

import json
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mp3d.data.outlines import Outline
from mp3d.data.picture_files import Box
from mp3d.errors import DataError

MAX_JSON_BYTES = 2 * 2**30
"""COCO's largest, instances_train2017.json, has 0.45 GB."""


@dataclass(frozen=True)
class Instance:
    """One annotation.

    Attributes:
        category: its id.
        box: xyxy, pixels, half-open; perhaps empty or outside.
        crowd: a region of many objects.
        outline: None where it has none or a packed one, where it does not fit the picture, or none was asked for.
    """

    category: int
    box: Box
    crowd: bool
    outline: Outline | None


@dataclass(frozen=True)
class Pictured:
    """A picture as the file lists it, with its annotations in the order of the file."""

    name: str
    """File name relative to the folder of the pictures."""
    size: tuple[int, int]
    """Rows, columns."""
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class Instances:
    """What one file says.

    Attributes:
        categories: name by id.
        pictures: in the order of the file.
        num_unattached: annotations of pictures that it does not list.
        sha256: of its bytes.
    """

    categories: dict[int, str]
    pictures: tuple[Pictured, ...]
    num_unattached: int
    sha256: str


def read_instances(path: Path, outlines: bool) -> Instances:
    """Read ``instances_*.json``.

    Args:
        path: of the file.
        outlines: read the outlines too, which are most of it.

    Raises:
        DataError: the file cannot be read, lacks something, or contradicts itself; the entry is named.
    """
    data = _read(path)
    content = _parse(path, data, outlines)
    categories = dict(_entries(path, content, "categories", _category))
    of_picture: dict[int, list[Instance]] = defaultdict(list)
    for picture, instance in _entries(path, content, "annotations", _instance):
        if instance.category not in categories:
            raise DataError(f"{path}: an annotation has the category {instance.category}, which is not listed")
        of_picture[picture].append(instance)
    listed = _entries(path, content, "images", _picture)
    for what, seen in (("id", [number for number, _, _ in listed]), ("file_name", [name for _, name, _ in listed])):
        if len(set(seen)) < len(seen):
            raise DataError(f"{path}: two images have one {what}; remove what was listed twice")
    pictures = tuple(Pictured(name, size, tuple(of_picture.pop(number, ()))) for number, name, size in listed)
    return Instances(categories, pictures, sum(map(len, of_picture.values())), sha256(data).hexdigest())


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path} has more than {MAX_JSON_BYTES >> 30} GiB; split it")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _parse(path: Path, data: bytes, outlines: bool) -> dict[str, Any]:
    def without_lists(entry: dict[str, Any]) -> dict[str, Any]:
        """Outlines as arrays, or left out, as soon as they are parsed: as lists they would fill the memory."""
        if "segmentation" in entry:
            entry["segmentation"] = _outline(entry["segmentation"]) if outlines else None
        return entry

    try:
        content = json.loads(data, object_hook=without_lists)
    except (ValueError, RecursionError) as error:  # also where it is no text
        raise DataError(f"{path} is no JSON, or cut off ({type(error).__name__}); copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no JSON of COCO's instances; it must be an object")
    return content


def _entries(path: Path, content: dict[str, Any], what: str, parse: Any) -> list[Any]:
    """A list of the file, each entry parsed."""
    if not isinstance(content.get(what), list):
        raise DataError(f"{path} has no list {what}; is it COCO's instances_*.json?")
    parsed = []
    for place, entry in enumerate(content[what]):
        try:
            parsed.append(parse(entry))
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(f"{path}: {what}[{place}] cannot be used ({type(error).__name__}: {error})") from error
    return parsed


def _category(entry: dict[str, Any]) -> tuple[int, str]:
    return _integer(entry["id"]), str(entry["name"])


def _picture(entry: dict[str, Any]) -> tuple[int, str, tuple[int, int]]:
    name = PurePosixPath(str(entry["file_name"]))
    if name.is_absolute() or ".." in name.parts or not name.name:
        raise ValueError("file_name leads out of the folder of the pictures")
    return _integer(entry["id"]), name.as_posix(), (_integer(entry["height"]), _integer(entry["width"]))


def _instance(entry: dict[str, Any]) -> tuple[int, Instance]:
    x, y, width, height = (float(value) for value in entry["bbox"])
    box = (x, y, x + width, y + height)
    crowd = bool(entry.get("iscrowd", 0))
    instance = Instance(_integer(entry["category_id"]), box, crowd, entry.get("segmentation"))
    return _integer(entry["image_id"]), instance


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no integer")
    return value


def _outline(given: Any) -> Outline | None:
    """None for what is no outline, or a packed one."""
    try:
        if isinstance(given, dict):
            rows, columns = given["size"]
            runs = np.array(given["counts"], np.int32)
            fits = runs.ndim == 1 and (runs >= 0).all() and int(runs.sum(dtype=np.int64)) == rows * columns
            return Outline(runs=runs, size=(rows, columns)) if fits else None
        polygons = tuple(np.array(points, np.float32).reshape(-1, 2) for points in given)
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    drawn = polygons and all(len(points) >= 3 and np.isfinite(points).all() for points in polygons)
    return Outline(polygons) if drawn else None
