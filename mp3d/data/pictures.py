"""Colour pictures in one folder per class: ImageNet, Tiny-ImageNet, or one's own."""

import io
from collections import Counter
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from mp3d.data.files import walk
from mp3d.data.series import Picture
from mp3d.data.source import Item, PictureBatch, Source
from mp3d.data.splits import SPLITS
from mp3d.errors import ConfigError, DataError, Refusal

READER = "pictures/1"
SUFFIXES = (".jpg", ".jpeg")
TINY_IMAGENET_LABELS = "val_annotations.txt"
"""Tiny-ImageNet keeps its validation pictures in one folder and their classes in this table."""
MIN_BATCHES_TO_SPLIT = 20
"""Where no split is given batches are dealt to the splits, so there must be enough of them to meet the fractions."""
MAX_PIXELS = 50_000_000
"""Of a picture; the largest of ImageNet has 18 million."""


def read_picture_folders(root: Path, pictures_per_item: int = 256, dataset: str = "pictures") -> Source:
    """JPEG pictures in class folders, their class being the folder's name.

    Either ``<root>/train/<class>/**/*.jpg`` with ``val`` and ``test`` beside ``train``, or ``<root>/<class>/**/*.jpg``
    without a given split. Tiny-ImageNet is read as it is unpacked. Pictures of all classes are mixed in each batch, in
    an order that depends on their names only.

    Args:
        root: folder of the classes, or of train, val and test.
        pictures_per_item: most pictures in a batch, which is what one task reads and one row group holds.
        dataset: name of the data set.

    Raises:
        ConfigError: ``pictures_per_item`` is below 1.
        DataError: no pictures, or pictures of a class that is not among the training pictures.
    """
    if pictures_per_item < 1:
        raise ConfigError(f"pictures_per_item is {pictures_per_item}; a batch holds at least one")
    root = root.absolute()
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    splits = [split for split in SPLITS if (root / split).is_dir()]
    notes: Counter[str] = Counter()
    folders: dict[str | None, Path] = {split: root / split for split in splits} if splits else {None: root}
    classes = {split: _classes(folder, root, notes) for split, folder in folders.items()}
    first, *others = classes
    class_names = tuple(sorted(set(classes[first].values())))
    if not class_names:
        raise DataError(f"{folders[first]} has no *.jpg in class folders; wanted: train/<class>/1.jpg or <class>/1.jpg")
    for split in others:
        if unknown := sorted(set(classes[split].values()) - set(class_names)):
            raise DataError(f"{split} has the class {unknown[0]}, {first} has not; name the class folders alike")
    items: list[Item] = []
    for split, pictures in classes.items():
        names = sorted(pictures, key=lambda name: (blake2b(name.encode(errors="surrogateescape")).digest(), name))
        labels = {name: class_names.index(pictures[name]) for name in names}
        for batch in _batches(names, pictures_per_item, at_least=1 if split else MIN_BATCHES_TO_SPLIT):
            key = f"{batch[0]}+{len(batch) - 1}"
            load = partial(load_pictures, root, batch, tuple(labels[name] for name in batch))
            items.append(Item(key=key, patient=key, split=split, load=load, members=batch))
    return Source(
        dataset=dataset,
        reader=READER,
        class_names=class_names,
        items=tuple(items),
        options={"pictures_per_item": pictures_per_item},
        notes=tuple(f"{count} {what}" for what, count in sorted(notes.items())),
    )


def load_pictures(root: Path, names: Sequence[str], labels: Sequence[int]) -> PictureBatch:
    """Read pictures; those that are broken are refused one by one.

    Args:
        root: folder that the names are relative to.
        names: of the files.
        labels: class of each, from 0.
    """
    pictures: list[Picture] = []
    refused: list[tuple[str, Refusal]] = []
    for name, label in zip(names, labels, strict=True):
        try:
            pictures.append(load_picture(root / name, name, label))
        except Refusal as refusal:
            refused.append((name, refusal))
    return PictureBatch(tuple(pictures), tuple(refused))


def load_picture(path: Path, name: str, label: int) -> Picture:
    """Read one JPEG, grey or in colour, and make sure that it can be decoded to its end.

    Raises:
        Refusal: ``UNREADABLE``, ``TOO_LARGE`` or ``BAD_IMAGE``.
    """
    try:
        jpeg = path.read_bytes()
    except OSError as error:
        raise Refusal("UNREADABLE", "a picture that was listed is gone or cannot be read") from error
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            columns, rows = image.size
            if columns * rows > MAX_PIXELS:
                raise Refusal("TOO_LARGE", f"the picture has {columns} x {rows} pixels; at most {MAX_PIXELS} are read")
            image.draft(image.mode, (1, 1))  # an eighth of the size: reads all coded bytes at little work
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Refusal("BAD_IMAGE", f"no JPEG, or damaged ({type(error).__name__}); copy it again") from error
    return Picture(name, jpeg, rows, columns, label)


def _classes(folder: Path, root: Path, notes: Counter[str]) -> dict[str, str]:
    """Class of every picture of a split, by its name relative to the root."""
    if (folder / TINY_IMAGENET_LABELS).is_file():
        return _labelled_by_table(folder, root, notes)
    found: dict[str, str] = {}
    for class_folder in sorted(child for child in folder.iterdir() if child.is_dir()):
        pictures = _pictures(class_folder, notes)
        if class_folder.name == "images":  # Tiny-ImageNet's test pictures
            notes[f"pictures in {class_folder.relative_to(root)} have no class, not used"] += len(pictures)
            continue
        found |= {path.relative_to(root).as_posix(): class_folder.name for path in pictures}
    return found


def _labelled_by_table(folder: Path, root: Path, notes: Counter[str]) -> dict[str, str]:
    table = folder / TINY_IMAGENET_LABELS
    try:
        rows = [line.split("\t") for line in table.read_text().splitlines() if line.strip()]
        class_of = {row[0]: row[1] for row in rows}
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"{table} cannot be read; each line must begin with a file name, a tab and a class") from error
    found: dict[str, str] = {}
    for path in _pictures(folder, notes):
        if path.name in class_of:
            found[path.relative_to(root).as_posix()] = class_of[path.name]
        else:
            notes[f"pictures have no line in {table.relative_to(root)}, not used"] += 1
    return found


def _pictures(folder: Path, notes: Counter[str]) -> list[Path]:
    found: list[Path] = []
    for path in walk(folder):
        if path.suffix.lower() in SUFFIXES:
            found.append(path)
        elif path.suffix.lower() != ".txt":
            notes["files are no .jpg or .jpeg, not used"] += 1
    return found


def _batches(names: Sequence[str], largest: int, at_least: int) -> list[tuple[str, ...]]:
    """Cut into batches of nearly equal size."""
    if not names:
        return []
    number = min(max(-(-len(names) // largest), at_least), len(names))
    ends = [len(names) * i // number for i in range(number + 1)]
    return [tuple(names[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
