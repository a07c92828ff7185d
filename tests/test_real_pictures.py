"""The reader of picture folders on a piece of Tiny-ImageNet."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mp3d.data.pictures import read_picture_folders
from mp3d.data.prepare import prepare
from mp3d.data.shard import decode_image, open_shards
from mp3d.data.source import PictureBatch

SHARED = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
ARCHIVE = SHARED / "natural" / "tiny_imagenet20.tar.gz"
pytestmark = pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"no {ARCHIVE.name} in {ARCHIVE.parent}")


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
