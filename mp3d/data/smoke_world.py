"""Shards for the smoke sizes of the recipes: made in memory, in seconds, where a recipe looks for its own."""

from functools import partial
from pathlib import Path

from mp3d.data.id_key import load_id_key
from mp3d.data.prepare import prepare
from mp3d.data.shard import MANIFEST
from mp3d.data.source import Item, Source
from mp3d.data.synthetic.plain import ball_series, blob_series, picture_batch, shaded_batch

PATIENTS = {"train": 12, "val": 6, "test": 6}
PICTURES = {"train": 48, "val": 16, "test": 16}


def ensure_smoke_shards(folder: Path) -> None:
    """Make the shards that the folder's name asks for (see :func:`smoke_source`), unless they stand already."""
    if not (folder / MANIFEST).exists():
        prepare(smoke_source(folder.name), folder, id_key=load_id_key(), runner="local")


def smoke_source(kind: str) -> Source:
    """
    Args:
        kind: classes (of pictures), objects (boxes and masks in pictures), lesions (boxes in CT), nodules (of two
            classes, with masks), organs (masks).

    Raises:
        ValueError: another kind.
    """
    splits = [(split, number) for split, count in PATIENTS.items() for number in range(count)]
    numbered = [(f"{split}{number}", split, 100 * tuple(PATIENTS).index(split) + number) for split, number in splits]
    match kind:
        case "classes":
            items = [Item(split, split, split, partial(picture_batch, split, n)) for split, n in PICTURES.items()]
            classes = ("dark", "bright")
        case "objects":
            items = [Item(split, split, split, partial(shaded_batch, split, n)) for split, n in PICTURES.items()]
            classes = ("rectangle",)
        case "lesions":
            items = [Item(key, key, split, partial(blob_series, index)) for key, split, index in numbered]
            classes = ("lesion",)
        case "nodules":
            items = [
                Item(key, key, split, partial(ball_series, index, label=index % 2)) for key, split, index in numbered
            ]
            classes = ("small", "large")
        case "organs":
            items = [Item(key, key, split, partial(ball_series, index)) for key, split, index in numbered]
            classes = ("organ",)
        case _:
            raise ValueError(f"there is no smoke data of kind {kind!r}")
    return Source(f"smoke {kind}", "smoke/1", classes, tuple(items))
