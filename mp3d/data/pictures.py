"""Colour pictures in one folder per class: ImageNet, Tiny-ImageNet, or one's own."""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

from mp3d.data.files import walk
from mp3d.data.picture_files import SUFFIXES, Box, Marks, check_batch_size, picture_items
from mp3d.data.picture_tables import CLASS_TABLES, TINY_CLASSES, read_boxes, read_class_table, stem
from mp3d.data.source import Source
from mp3d.data.splits import SPLITS
from mp3d.errors import ConfigError, DataError

READER = "pictures/1"


def read_picture_folders(
    root: Path,
    boxes: bool = False,
    val_classes: Path | None = None,
    pictures_per_item: int = 256,
    dataset: str = "pictures",
) -> Source:
    """JPEG pictures in class folders, their class being the folder's name.

    Either ``<root>/train/<class>/**/*.jpg`` with ``val`` and ``test`` beside ``train``, or ``<root>/<class>/**/*.jpg``
    without a given split. Tiny-ImageNet is read as it is unpacked; ImageNet's validation pictures may lie in one folder
    as published, with a table of their classes. Classes are numbered in the sorted order of their folders' names, which
    is the usual order of ImageNet's. Pictures of all classes are mixed in each batch, in an order that depends on their
    names only.

    Args:
        root: folder of the classes, or of train, val and test.
        boxes: read the boxes of Tiny-ImageNet too; their labels are the classes of the pictures, from 1. A picture
            without a box that has an extent counts as not searched.
        val_classes: table of the classes where ``val`` has no class folders; left out: ``val_annotations.txt`` in it,
            or beside it ``val.txt``, ``LOC_val_solution.csv`` or the folder ``ILSVRC2012_devkit_t12``.
        pictures_per_item: most pictures in a batch, which is what one task reads and one row group holds.
        dataset: name of the data set.

    Raises:
        ConfigError: ``pictures_per_item`` is below 1, or there is a table for ``val`` and no ``val``.
        DataError: no pictures, pictures of a class that is not among the training pictures, or a table that cannot be
            read or is not there.
    """
    check_batch_size(pictures_per_item)
    root = root.absolute()
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if val_classes is not None and "val" not in splits:
        raise ConfigError(f"there are classes for val, but {root} has no folder val; leave out --val-classes")
    notes: Counter[str] = Counter()
    folders: dict[str | None, Path] = {split: root / split for split in splits} if splits else {None: root}
    class_names: tuple[str, ...] = ()
    classes: dict[str | None, dict[str, str]] = {}
    for split, folder in folders.items():
        table = _class_table(folder, root, val_classes if split == "val" else None)
        if table is None:
            classes[split] = _classes_by_folder(folder, root, notes)
        else:
            classes[split] = _classes_by_table(folder, root, table, class_names, notes)
        found = sorted(set(classes[split].values()))
        class_names = class_names or tuple(found)
        if not class_names:
            raise DataError(f"{folder} has no *.jpg in class folders; wanted: train/<class>/1.jpg or <class>/1.jpg")
        if unknown := [name for name in found if name not in class_names]:
            first = next(iter(classes))
            raise DataError(f"{split} has the class {unknown[0]}, {first} has not; name the class folders alike")
    boxes_of = _read_all_boxes(list(folders.values())) if boxes else {}
    numbers = {name: number for number, name in enumerate(class_names)}
    items = [
        item
        for split, pictures in classes.items()
        for item in picture_items(
            root,
            split,
            {name: _marks(numbers[wnid], boxes_of.get(stem(name))) for name, wnid in pictures.items()},
            pictures_per_item,
        )
    ]
    return Source(
        dataset=dataset,
        reader=READER,
        class_names=class_names,
        items=tuple(items),
        options={
            "pictures_per_item": pictures_per_item,
            "boxes": boxes,
            "val_classes": val_classes and sha256(json.dumps(classes["val"]).encode()).hexdigest(),
        },
        notes=tuple(f"{count} {what}" for what, count in sorted(notes.items()) if count),
    )


def _marks(label: int, boxes: tuple[Box, ...] | None) -> Marks:
    return Marks(label, boxes, (label + 1,) * len(boxes or ()))


def _class_table(folder: Path, root: Path, named: Path | None) -> Path | None:
    """The table of a folder without class folders."""
    if named is not None:
        return named
    if (folder / TINY_CLASSES).is_file():
        return folder / TINY_CLASSES
    if folder.name == "val" and not any(child.is_dir() for child in folder.iterdir()):
        return next((root / name for name in CLASS_TABLES if (root / name).exists()), None)
    return None


def _classes_by_folder(folder: Path, root: Path, notes: Counter[str]) -> dict[str, str]:
    """Class of every picture of a split, by its name relative to the root."""
    found: dict[str, str] = {}
    for child in sorted(folder.iterdir()):
        if child.is_file():
            what = f"pictures in {folder.relative_to(root)} have neither class folder nor table of classes, not used"
            notes[what] += child.suffix.lower() in SUFFIXES
            continue
        pictures = _pictures(child, notes)
        if child.name == "images":  # Tiny-ImageNet's test pictures
            notes[f"pictures in {child.relative_to(root)} have no class, not used"] += len(pictures)
            continue
        found |= {path.relative_to(root).as_posix(): child.name for path in pictures}
    return found


def _classes_by_table(
    folder: Path, root: Path, table: Path, class_names: tuple[str, ...], notes: Counter[str]
) -> dict[str, str]:
    class_of = read_class_table(table, class_names)
    shown = table.relative_to(root).as_posix() if table.is_relative_to(root) else table.name
    found: dict[str, str] = {}
    for path in _pictures(folder, notes):
        if stem(path.name) in class_of:
            found[path.relative_to(root).as_posix()] = class_of[stem(path.name)]
        else:
            notes[f"pictures have no line in {shown}, not used"] += 1
    return found


def _read_all_boxes(folders: list[Path]) -> dict[str, tuple[Box, ...]]:
    """Boxes of every picture, by its file name; those of Tiny-ImageNet are unique.

    Raises:
        DataError: there are none, or a table cannot be read.
    """
    found: dict[str, tuple[Box, ...]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*_boxes.txt")):
            found |= read_boxes(path, first_column=1)
        if (folder / TINY_CLASSES).is_file():
            found |= read_boxes(folder / TINY_CLASSES, first_column=2)
    if not found:
        raise DataError(
            f"no box in <class>/<class>_boxes.txt or {TINY_CLASSES} of {', '.join(folder.name for folder in folders)}; "
            "boxes are read of Tiny-ImageNet only: leave out --boxes, or use the reader coco"
        )
    return found


def _pictures(folder: Path, notes: Counter[str]) -> list[Path]:
    found: list[Path] = []
    for path in walk(folder):
        if path.suffix.lower() in SUFFIXES:
            found.append(path)
        elif path.suffix.lower() != ".txt":
            notes["files are no .jpg or .jpeg, not used"] += 1
    return found
