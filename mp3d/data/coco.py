"""COCO: pictures with the boxes and outlines of ``instances_*.json`` (https://cocodataset.org/#format-data).

What is made of an annotation:

- A box ``[x, y, width, height]`` becomes ``[x, y, x + width, y + height]``: COCO's corners are pixel edges, as ours.
- A crowd (``iscrowd``), a region of many objects, is no box to learn and is left out. A picture with nothing but crowds
  has objects that nobody boxed one by one: its truth is unknown, not empty.
- A picture without annotations was searched and holds nothing.
- Categories become the labels 1, 2, ... in the order of their ids, which have gaps in COCO.
- The mask holds the class of each pixel: small objects in front of large ones, crowds, which have a class too, behind
  all. A picture with an object that has no outline, or a packed one (a string instead of polygons or run lengths), has
  no mask.
"""

from collections import Counter
from pathlib import Path, PurePosixPath

from mp3d.data.coco_json import Instances, Pictured, read_instances
from mp3d.data.files import walk
from mp3d.data.outlines import Region
from mp3d.data.picture_files import SUFFIXES, Marks, check_batch_size, picture_items
from mp3d.data.source import Item, Source
from mp3d.data.splits import SPLITS
from mp3d.errors import DataError

READER = "coco/1"
PREFIX = "instances_"
NO_JPEG = "pictures of the JSON are no .jpg or .jpeg, not used"
MAX_CLASSES = 254
"""The stored mask has a byte per pixel, of which 255 means that the class is not known."""


def read_coco(
    root: Path,
    annotations: Path | None = None,
    images: Path | None = None,
    masks: bool = False,
    pictures_per_item: int = 256,
    dataset: str = "coco",
) -> Source:
    """JPEG pictures with boxes in COCO's JSON, as published or one's own.

    As published: ``<root>/annotations/instances_<name>.json`` with the pictures in ``<root>/<name>`` or
    ``<root>/images/<name>``, one pair or several; a name that begins with train, val or test says the split. Pictures
    of a pair with another name are dealt to the splits. Crowds are left out, degenerate boxes too; a picture without
    annotations was searched and holds nothing.

    Args:
        root: folder of the data set.
        annotations: one JSON file instead of all pairs.
        images: folder of its pictures; left out: ``<root>/<name>``, ``<root>/images/<name>`` or else the root.
        masks: paint the outlines into a mask of classes, for a segmenter.
        pictures_per_item: most pictures in a batch, which is what one task reads and one row group holds.
        dataset: name of the data set.

    Raises:
        ConfigError: ``pictures_per_item`` is below 1.
        DataError: no pair, or a JSON that cannot be read or contradicts itself or another.
    """
    check_batch_size(pictures_per_item)
    root = root.absolute()
    counts: Counter[str] = Counter()
    pairs = [_given_pair(root, annotations, images)] if annotations else _published_pairs(root, counts)
    read = [(path, folder, read_instances(path, masks)) for path, folder in pairs]
    names: dict[int, str] = {}
    for path, _, instances in read:
        for number, name in instances.categories.items():
            if names.setdefault(number, name) != name:
                raise DataError(f"{path}: category {number} is {name!r}, elsewhere {names[number]!r}; mend the one")
    if masks and len(names) > MAX_CLASSES:
        raise DataError(f"{len(names)} categories; a mask holds at most {MAX_CLASSES}: leave out --masks")
    labels = {number: label for label, number in enumerate(sorted(names), 1)}
    items: list[Item] = []
    for path, folder, instances in read:
        base = root if folder.is_relative_to(root) else folder
        split = _split(path.stem.removeprefix(PREFIX), "" if folder == root else folder.name)
        marks = _all_marks(folder, base, instances, labels, masks, counts)
        items += picture_items(base, split, marks, pictures_per_item)
    if not items:
        detail = f"no picture of {', '.join(path.name for path, _ in pairs)} is there"
        if others := counts[NO_JPEG]:
            raise DataError(
                f"{detail} as JPEG, {others} have another name; only JPEG is read (.jpg, .jpeg): convert them"
            )
        raise DataError(f"{detail}; see --images")
    return Source(
        dataset=dataset,
        reader=READER,
        class_names=tuple(names[number] for number in sorted(names)),
        items=tuple(items),
        options={
            "pictures_per_item": pictures_per_item,
            "masks": masks,
            "annotations_sha256": "+".join(instances.sha256 for _, _, instances in read),
        },
        notes=tuple(f"{count} {what}" for what, count in sorted(counts.items()) if count),
    )


def _published_pairs(root: Path, counts: Counter[str]) -> list[tuple[Path, Path]]:
    """Every JSON with the folder of its pictures."""
    tables = sorted((root / "annotations").glob(f"{PREFIX}*.json"))
    pairs = [(path, folder) for path in tables if (folder := _folder(root, path))]
    if not pairs:
        wanted = f"annotations/{PREFIX}<name>.json with a folder <name> or images/<name>"
        raise DataError(f"{root} has no {wanted}; name the JSON with --annotations and the folder with --images")
    counts["JSON files without a folder of their pictures, not used"] += len(tables) - len(pairs)
    return pairs


def _given_pair(root: Path, annotations: Path, images: Path | None) -> tuple[Path, Path]:
    return annotations, images.absolute() if images else _folder(root, annotations) or root


def _folder(root: Path, path: Path) -> Path | None:
    name = path.stem.removeprefix(PREFIX)
    return next((folder for folder in (root / name, root / "images" / name) if folder.is_dir()), None)


def _split(*names: str) -> str | None:
    return next((split for name in names for split in SPLITS if name.startswith(split)), None)


def _all_marks(
    folder: Path, base: Path, instances: Instances, labels: dict[int, int], masks: bool, counts: Counter[str]
) -> dict[str, Marks]:
    """By the names of the pictures relative to ``base``; counts what is left out."""
    there = {path.relative_to(folder).as_posix() for path in walk(folder) if path.suffix.lower() in SUFFIXES}
    marks: dict[str, Marks] = {}
    for picture in instances.pictures:
        if picture.name in there:
            name = (folder / picture.name).relative_to(base).as_posix()
            marks[name] = _marks(picture, labels, masks, counts)
        elif PurePosixPath(picture.name).suffix.lower() in SUFFIXES:
            counts["pictures of the JSON without their file, not used"] += 1
        else:
            counts[NO_JPEG] += 1
    counts["pictures in the folders, but not in the JSON, not used"] += len(
        there - {picture.name for picture in instances.pictures}
    )
    counts["annotations of pictures that the JSON does not list, not used"] += instances.num_unattached
    return marks


def _marks(picture: Pictured, labels: dict[int, int], masks: bool, counts: Counter[str]) -> Marks:
    objects = [instance for instance in picture.instances if not instance.crowd]
    num_crowds = len(picture.instances) - len(objects)
    counts["crowds, which are no boxes to learn, left out"] += num_crowds
    counts["pictures with nothing but crowds count as not searched"] += bool(num_crowds and not objects)
    regions = None
    if masks:
        regions = tuple(
            Region(labels[instance.category], instance.outline, instance.crowd)
            for instance in picture.instances
            if instance.outline is not None and instance.outline.size in (None, picture.size)
        )
        if len(regions) < len(picture.instances):
            regions = None
            counts["pictures with an object without outline have no mask"] += 1
    return Marks(
        boxes=tuple(instance.box for instance in objects) if objects or not num_crowds else None,
        labels=tuple(labels[instance.category] for instance in objects),
        regions=regions,
        size=picture.size,
    )
