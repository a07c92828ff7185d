"""Pictures one by one, checked and kept as their JPEG bytes with what is known of them; and their deal into batches."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from mp3d.data.boxes import truth_of_boxes
from mp3d.data.outlines import Region, class_mask
from mp3d.data.series import Picture, Truth
from mp3d.data.source import Item, PictureBatch
from mp3d.errors import ConfigError, Refusal

SUFFIXES = (".jpg", ".jpeg")
MIN_BATCHES_TO_SPLIT = 20
"""Where no split is given batches are dealt to the splits, so there must be enough of them to meet the fractions."""
MAX_PIXELS = 50_000_000
"""Of a picture; the largest of ImageNet has 18 million."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Marks:
    """What a data set says of one picture, before the picture is opened.

    Attributes:
        image_label: its class, from 0.
        boxes: xyxy, pixels, half-open; None: nobody looked.
        labels: of the boxes, from 1.
        regions: what the mask is painted of; None: there is no mask.
        size: (rows, columns) that the annotation was made on, where it says so.
    """

    image_label: int | None = None
    boxes: tuple[Box, ...] | None = None
    labels: tuple[int, ...] = ()
    regions: tuple[Region, ...] | None = None
    size: tuple[int, int] | None = None


def check_batch_size(pictures_per_item: int) -> None:
    """Raises ConfigError where no batch can be made."""
    if pictures_per_item < 1:
        raise ConfigError(f"pictures_per_item is {pictures_per_item}; a batch holds at least one")


def picture_items(root: Path, split: str | None, marks: Mapping[str, Marks], pictures_per_item: int) -> list[Item]:
    """The pictures of a split in batches of nearly equal size, in an order that depends on their names only.

    Args:
        root: absolute folder that the names are relative to.
        split: the given one, or None.
        marks: by name.
        pictures_per_item: most pictures in a batch.
    """
    names = sorted(marks, key=lambda name: (blake2b(name.encode(errors="surrogateescape")).digest(), name))
    items: list[Item] = []
    for batch in _batches(names, pictures_per_item, at_least=1 if split else MIN_BATCHES_TO_SPLIT):
        key = f"{batch[0]}+{len(batch) - 1}"
        load = partial(load_pictures, root, batch, tuple(marks[name] for name in batch))
        items.append(Item(key=key, patient=key, split=split, load=load, members=batch))
    return items


def load_pictures(root: Path, names: Sequence[str], marks: Sequence[Marks]) -> PictureBatch:
    """Read pictures; those that are broken are refused one by one.

    Args:
        root: folder that the names are relative to.
        names: of the files.
        marks: of each.
    """
    pictures: list[Picture] = []
    refused: list[tuple[str, Refusal]] = []
    warnings: set[str] = set()
    for name, known in zip(names, marks, strict=True):
        try:
            picture, codes = load_picture(root / name, name, known)
        except Refusal as refusal:
            refused.append((name, refusal))
        else:
            pictures.append(picture)
            warnings.update(codes)
    return PictureBatch(tuple(pictures), tuple(refused), tuple(sorted(warnings)))


def load_picture(path: Path, name: str, marks: Marks) -> tuple[Picture, tuple[str, ...]]:
    """Read one JPEG with its marks, and make sure that it can be decoded to its end; warning codes.

    The bytes are kept whatever their colours: when a stored picture is decoded a grey one gives three equal planes, one
    in print colours (CMYK) is converted.

    Raises:
        Refusal: ``UNREADABLE``, ``TOO_LARGE``, ``BAD_IMAGE`` or ``SIZE_MISMATCH``.
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
    if marks.size not in (None, (rows, columns)):
        annotated = " x ".join(map(str, reversed(marks.size or ())))
        detail = f"the picture has {columns} x {rows} pixels, its annotation is for {annotated}"
        raise Refusal("SIZE_MISMATCH", f"{detail}; use the pictures that were annotated, neither resized nor turned")
    truth, warnings = Truth(), ()
    if marks.boxes is not None:
        truth, warnings = truth_of_boxes(marks.boxes, marks.labels, rows, columns)
    if marks.regions is not None:
        truth = replace(truth, mask=class_mask(marks.regions, rows, columns))
    return Picture(name, jpeg, rows, columns, marks.image_label, truth), warnings


def _batches(names: Sequence[str], largest: int, at_least: int) -> list[tuple[str, ...]]:
    """Cut into batches of nearly equal size."""
    if not names:
        return []
    number = min(max(-(-len(names) // largest), at_least), len(names))
    ends = [len(names) * i // number for i in range(number + 1)]
    return [tuple(names[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
