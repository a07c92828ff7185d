"""The reader of picture folders on a piece of Tiny-ImageNet."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mp3d.data.coco import read_coco
from mp3d.data.pictures import read_picture_folders
from mp3d.data.prepare import prepare
from mp3d.data.shard import decode_image, open_shards
from mp3d.data.source import PictureBatch

SHARED = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
ARCHIVE = SHARED / "natural" / "tiny_imagenet20.tar.gz"
COCO = SHARED / "natural" / "coco"
without_coco = pytest.mark.skipif(not COCO.is_dir(), reason=f"no coco in {COCO.parent}")


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ARCHIVE.is_file():
        pytest.skip(f"no {ARCHIVE.name} in {ARCHIVE.parent}")
    folder = tmp_path_factory.mktemp("tiny")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "tiny-imagenet-20"


def test_every_picture_of_twenty_classes_is_read(tiny_imagenet):
    source = read_picture_folders(tiny_imagenet)
    assert source.class_names == tuple(sorted((tiny_imagenet / "wnids.txt").read_text().split()))
    members = [(item.split, name) for item in source.items for name in item.members]
    assert len(set(members)) == 5000
    assert sum(split == "val" for split, _ in members) == 1000
    grey = 0
    for item in source.items:
        batch = item.load()
        assert isinstance(batch, PictureBatch)
        assert not batch.refused
        grey += sum(Image.open(io.BytesIO(picture.jpeg)).mode == "L" for picture in batch.pictures)
        counts = np.bincount([picture.image_label or 0 for picture in batch.pictures], minlength=20)
        assert counts.min() >= 2  # every batch is a mixture of the classes
        assert all((picture.rows, picture.columns) == (64, 64) for picture in batch.pictures)
    assert grey == 72


def test_a_few_classes_prepared(tiny_imagenet, tmp_path):
    classes = sorted((tiny_imagenet / "wnids.txt").read_text().split())[:3]
    for wnid in classes:
        (tmp_path / "in" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "train" / wnid).symlink_to(tiny_imagenet / "train" / wnid)
    (tmp_path / "in" / "val").mkdir()
    (tmp_path / "in" / "val" / "images").symlink_to(tiny_imagenet / "val" / "images")
    table = (tiny_imagenet / "val" / "val_annotations.txt").read_text().splitlines(keepends=True)
    chosen = [line for line in table if line.split("\t")[1] in classes]
    (tmp_path / "in" / "val" / "val_annotations.txt").write_text("".join(chosen))
    source = read_picture_folders(tmp_path / "in")
    assert source.notes == ("850 pictures have no line in val/val_annotations.txt, not used",)
    result = prepare(source, tmp_path / "out", id_key=b"k", runner="local")
    assert {split: counts["rows"] for split, counts in result.counts.items()} == {"train": 600, "val": 150}
    shards = open_shards(tmp_path / "out")
    (entry,) = shards.split("val")
    rows = list(shards.iter_rows(entry))
    assert np.bincount([row["image_label"] for row in rows]).tolist() == [50, 50, 50]
    assert {decode_image(row).shape for row in rows} == {(3, 64, 64)}


def test_every_box_with_an_extent_is_read(tiny_imagenet):
    counts: Counter[tuple[str | None, int | None]] = Counter()
    widest = 0.0
    for item in read_picture_folders(tiny_imagenet, boxes=True).items:
        batch = item.load()
        assert isinstance(batch, PictureBatch)
        assert set(batch.warnings) <= {"BOX_DROPPED"}
        for picture in batch.pictures:
            boxes, labels = picture.truth.boxes, picture.truth.labels
            counts[item.split, None if boxes is None else len(boxes)] += 1
            if boxes is not None and labels is not None and picture.image_label is not None:
                assert labels.tolist() == [picture.image_label + 1]
                widest = max(widest, float((boxes[:, 2] - boxes[:, 0]).max()))
    assert counts == {("train", 1): 3988, ("train", None): 12, ("val", 1): 998, ("val", None): 2}
    assert widest == 64  # from the first to the last pixel, both inside


@without_coco
def test_coco_with_masks(tmp_path):
    source = read_coco(COCO, masks=True)
    assert source.notes == ("21 crowds, which are no boxes to learn, left out",)
    assert len(source.class_names) == 80
    assert (source.class_names[0], source.class_names[-1]) == ("person", "toothbrush")
    found = {}
    for item in source.items:
        batch = item.load()
        assert isinstance(batch, PictureBatch)
        assert (batch.refused, batch.warnings) == ((), ())
        found |= {picture.name: picture for picture in batch.pictures}
    num_boxes = Counter(name.split("/")[0] for name, picture in found.items() for _ in picture.truth.boxes)
    assert num_boxes == {"train2017": 939 - 10, "val2017": 815 - 11}
    empty = sorted(name for name, picture in found.items() if len(picture.truth.boxes) == 0)
    assert empty == ["train2017/000000000250.jpg", "train2017/000000000508.jpg"]
    num_alone = 0
    for picture in found.values():
        mask, labels = picture.truth.mask, picture.truth.labels
        assert mask is not None
        if len(labels) == 1 and len(np.unique(mask)) == 2:  # one object and no crowd: its mask fills its box
            y, x = np.nonzero(mask == labels[0])
            around = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            np.testing.assert_allclose(
                around, picture.truth.boxes[0], atol=2
            )  # a thin tip may pass between the centres
            num_alone += 1
    assert num_alone == 18
    assert sum(Image.open(io.BytesIO(picture.jpeg)).mode == "L" for picture in found.values()) == 1
    result = prepare(source, tmp_path / "out", id_key=b"k", runner="local")
    assert {split: (counts["rows"], counts["boxes"]) for split, counts in result.counts.items()} == {
        "train": (128, 929),
        "val": (80, 804),
    }
    rows = [
        row for entry in open_shards(tmp_path / "out").entries for row in open_shards(tmp_path / "out").iter_rows(entry)
    ]
    assert {decode_image(row).shape[1:] for row in rows} == {
        (picture.rows, picture.columns) for picture in found.values()
    }
