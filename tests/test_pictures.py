"""Class folders of JPEGs."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mp3d.data.picture_files import MIN_BATCHES_TO_SPLIT, Marks, load_picture
from mp3d.data.pictures import read_picture_folders
from mp3d.data.prepare import prepare
from mp3d.data.shard import decode_image, open_shards
from mp3d.data.source import PictureBatch, Source
from mp3d.errors import ConfigError, DataError, Refusal


def jpeg(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (20, 12), **options) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def write(path: Path, content: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg() if content is None else content)


def batches(source: Source) -> list[PictureBatch]:
    loaded = [item.load() for item in source.items]
    assert all(isinstance(batch, PictureBatch) for batch in loaded)
    return [batch for batch in loaded if isinstance(batch, PictureBatch)]


def labels(source: Source, split: str | None = None) -> dict[str, int | None]:
    chosen = zip(source.items, batches(source), strict=True)
    return {
        picture.name: picture.image_label
        for item, batch in chosen
        if split is None or item.split == split
        for picture in batch.pictures
    }


def test_folders_with_a_given_split(tmp_path):
    write(tmp_path / "train" / "dog" / "deep" / "1.JPEG")
    write(tmp_path / "train" / "cat" / "2.jpg")
    write(tmp_path / "val" / "dog" / "3.jpeg")
    write(tmp_path / "test" / "cat" / "4.JPG")
    source = read_picture_folders(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert [item.split for item in source.items] == ["train", "val", "test"]
    assert labels(source, "train") == {"train/dog/deep/1.JPEG": 1, "train/cat/2.jpg": 0}
    assert labels(source, "val") == {"val/dog/3.jpeg": 1}
    assert labels(source, "test") == {"test/cat/4.JPG": 0}


def test_folders_without_a_split_are_dealt_by_batch(tmp_path):
    for i in range(60):
        write(tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg")
    source = read_picture_folders(tmp_path / "in")
    assert len(source.items) == MIN_BATCHES_TO_SPLIT
    assert len(labels(source)) == 60
    result = prepare(source, tmp_path / "out", id_key=b"k", runner="local")
    assert {split: counts["rows"] for split, counts in result.counts.items()} == {"train": 42, "val": 9, "test": 9}


def test_tiny_imagenet_layout(tmp_path):
    for wnid in ("n02", "n01"):
        write(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        write(tmp_path / "train" / wnid / f"{wnid}_boxes.txt", b"")
    for i in range(3):
        write(tmp_path / "val" / "images" / f"val_{i}.JPEG")
    write(tmp_path / "val" / "val_annotations.txt", b"val_0.JPEG\tn02\t0\t0\t5\t5\nval_1.JPEG\tn01\t0\t0\t5\t5\n")
    write(tmp_path / "test" / "images" / "test_0.JPEG")
    write(tmp_path / "wnids.txt", b"n02\nn01\n")
    source = read_picture_folders(tmp_path)
    assert source.class_names == ("n01", "n02")
    assert labels(source, "train") == {"train/n01/images/n01_0.JPEG": 0, "train/n02/images/n02_0.JPEG": 1}
    assert labels(source, "val") == {"val/images/val_0.JPEG": 1, "val/images/val_1.JPEG": 0}
    assert not labels(source, "test")
    assert source.notes == (
        "1 pictures have no line in val/val_annotations.txt, not used",
        "1 pictures in test/images have no class, not used",
    )


def write_tiny_imagenet(root: Path) -> None:
    """Two classes, 20 x 12 pixels: boxes to the rim, at the rim without extent, of no picture, and none."""
    for wnid, lines in {
        "n01": "n01_0.JPEG\t0\t0\t19\t11\nn01_1.JPEG\t3\t4\t5\t6\nn01_1.JPEG\t7\t8\t9\t10\n",
        "n02": "n02_0.JPEG\t19\t3\t19\t7\nn02_9.JPEG\t1\t1\t2\t2\n",
    }.items():
        for i in range(2):
            write(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        write(root / "train" / wnid / f"{wnid}_boxes.txt", lines.encode())
    write(root / "val" / "images" / "val_0.JPEG")
    write(root / "val" / "val_annotations.txt", b"val_0.JPEG\tn02\t2\t3\t4\t63\n")


def test_boxes_of_tiny_imagenet(tmp_path):
    write_tiny_imagenet(tmp_path)
    assert all(
        picture.truth.boxes is None for batch in batches(read_picture_folders(tmp_path)) for picture in batch.pictures
    )
    source = read_picture_folders(tmp_path, boxes=True)
    truths = {Path(picture.name).stem: picture.truth for batch in batches(source) for picture in batch.pictures}
    boxes = {name: truth.boxes if truth.boxes is None else truth.boxes.tolist() for name, truth in truths.items()}
    assert boxes == {
        "n01_0": [[0, 0, 20, 12]],  # the corners are pixels inside
        "n01_1": [[3, 4, 6, 7], [7, 8, 10, 11]],
        "n02_0": None,  # no extent: somewhere, but not there
        "n02_1": None,  # no line
        "val_0": [[2, 3, 5, 12]],  # cut at the rim
    }
    assert truths["n01_1"].labels.tolist() == [1, 1]
    assert truths["val_0"].labels.tolist() == [2]
    assert source.class_names == ("n01", "n02")
    assert [batch.warnings for batch in batches(source)] == [("BOX_DROPPED",), ("BOX_CLIPPED",)]


@pytest.mark.parametrize(
    "line", ["n01_0.JPEG", "n01_0.JPEG\t1\t2\t3", "n01_0.JPEG\t1\t2\t3\t4\t5", "n01_0.JPEG\t1\t2\t3\tx"]
)
def test_wrong_table_of_boxes(tmp_path, line):
    write_tiny_imagenet(tmp_path)
    write(tmp_path / "train" / "n01" / "n01_boxes.txt", f"n01_1.JPEG\t0\t0\t5\t5\n{line}\n".encode())
    with pytest.raises(DataError, match="n01_boxes.txt, line 2"):
        read_picture_folders(tmp_path, boxes=True)


def test_boxes_where_there_are_none(tmp_path):
    write(tmp_path / "train" / "a" / "1.jpg")
    with pytest.raises(DataError, match="leave out --boxes"):
        read_picture_folders(tmp_path, boxes=True)


def write_kit(folder: Path, numbers: list[int]) -> None:
    """As ``meta.mat`` of ILSVRC 2012 has it: the synsets, inner nodes of the tree behind them."""
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    synsets = np.array(
        [(1, "n03", "cup", 0), (2, "n01", "dog", 0), (3, "n02", "cat", 0), (4, "n00", "animal", 2)], fields
    )
    (folder / "data").mkdir(parents=True)
    savemat(folder / "data" / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "".join(f"{number}\n" for number in numbers)
    )


class TestFlatValidationFolder:
    """ImageNet's validation pictures as published: in one folder, without their classes."""

    @pytest.fixture
    def root(self, tmp_path) -> Path:
        for wnid in ("n03", "n01", "n02"):
            write(tmp_path / "train" / wnid / f"{wnid}_1.JPEG")
        for number in (1, 2, 3):
            write(tmp_path / "val" / f"ILSVRC2012_val_{number:08}.JPEG")
        return tmp_path

    def val(self, root: Path, **options) -> list[int | None]:
        source = read_picture_folders(root, **options)
        assert source.class_names == ("n01", "n02", "n03")
        found = labels(source, "val")
        return [found[name] for name in sorted(found)]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            (
                "val.txt",
                "ILSVRC2012_val_00000001.JPEG 2\nILSVRC2012_val_00000003.JPEG 1\nILSVRC2012_val_00000002.JPEG 0\n",
            ),
            (
                "val.txt",
                "".join(
                    f"ILSVRC2012_val_0000000{i}.JPEG\t{wnid}\n" for i, wnid in ((3, "n02"), (1, "n03"), (2, "n01"))
                ),
            ),
            (
                "LOC_val_solution.csv",
                "ImageId,PredictionString\nILSVRC2012_val_00000003,n02 1 2 3 4 n02 5 6 7 8 \n"
                "ILSVRC2012_val_00000001,n03 1 2 3 4 \nILSVRC2012_val_00000002,n01 1 2 3 4 \n",
            ),
        ],
    )
    def test_tables_beside_it(self, root, name, content):
        (root / name).write_text(content)
        assert self.val(root) == [2, 0, 1]
        (root / name).rename(root / f"other_{name}")
        assert self.val(root, val_classes=root / f"other_{name}") == [2, 0, 1]

    def test_the_organisers_kit(self, root):
        write_kit(root / "ILSVRC2012_devkit_t12", [1, 2, 3])
        assert self.val(root) == [2, 0, 1]

    def test_other_classes_are_another_data_set(self, root, tmp_path):
        sources = []
        for content in ("ILSVRC2012_val_00000001.JPEG 2\n", "ILSVRC2012_val_00000001.JPEG 1\n"):
            (root / "mine").write_text(content)
            sources.append(read_picture_folders(root, val_classes=root / "mine"))
        assert sources[0].options != sources[1].options
        assert sources[0].notes == ("2 pictures have no line in mine, not used",)

    def test_without_table(self, root):
        assert read_picture_folders(root).notes == (
            "3 pictures in val have neither class folder nor table of classes, not used",
        )

    @pytest.mark.parametrize(
        ("name", "content", "told"),
        [
            ("val.txt", "ILSVRC2012_val_00000001.JPEG 3\n", "class 3 of 3 known ones"),
            ("val.txt", "ILSVRC2012_val_00000001.JPEG n09\n", "val has the class n09, train has not"),
            ("LOC_val_solution.csv", "Image,Class\na,n01\n", "cannot be read as a table of classes"),
            ("LOC_val_solution.csv", "ImageId,PredictionString\na,\n", "cannot be read as a table of classes"),
        ],
    )
    def test_wrong_tables(self, root, name, content, told):
        (root / name).write_text(content)
        with pytest.raises(DataError, match=told):
            read_picture_folders(root)

    def test_wrong_kit(self, root):
        write_kit(root / "ILSVRC2012_devkit_t12", [1, 2, 5])
        with pytest.raises(DataError, match="cannot be read as a table of classes"):
            read_picture_folders(root)
        (root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"MATLAB 5.0")
        with pytest.raises(DataError, match=r"meta\.mat cannot be read"):
            read_picture_folders(root)

    def test_table_without_val(self, tmp_path):
        write(tmp_path / "a" / "1.jpg")
        with pytest.raises(ConfigError, match="no folder val"):
            read_picture_folders(tmp_path, val_classes=tmp_path / "val.txt")


def test_batches_are_even_mixed_and_stable(tmp_path):
    for name in "abcd":
        for i in range(25):
            write(tmp_path / "train" / name / f"{i}.jpg")
    source = read_picture_folders(tmp_path, pictures_per_item=30)
    assert [len(item.members) for item in source.items] == [25] * 4
    assert all(min(Counter(name.split("/")[1] for name in item.members).values()) >= 2 for item in source.items)
    assert len({name for item in source.items for name in item.members}) == 100
    assert [item.members for item in source.items] == [
        item.members for item in read_picture_folders(tmp_path, pictures_per_item=30).items
    ]


def test_links_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "1.jpg")
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    assert labels(read_picture_folders(tmp_path / "in")) == {"train/cat/1.jpg": 0}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_grey_and_print_colours_become_three_planes(tmp_path, mode):
    write(tmp_path / "in" / "train" / "a" / "1.jpg", jpeg(mode=mode))
    prepare(read_picture_folders(tmp_path / "in"), tmp_path / "out", id_key=b"k", runner="local")
    shards = open_shards(tmp_path / "out")
    (row,) = shards.read_rows(shards.entries[0], 0, 1)
    assert decode_image(row).shape == (3, 12, 20)
    assert (row["rows"], row["columns"], row["image"]) == (12, 20, jpeg(mode=mode))


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", jpeg()[:10], jpeg()[:-60], jpeg(size=(300, 300))[:-500], jpeg(progressive=True)[:-60], png()],
)
def test_broken_picture_is_refused_and_the_others_are_kept(tmp_path, content):
    for i in range(4):
        write(tmp_path / "train" / "a" / f"{i}.jpg")
    write(tmp_path / "train" / "a" / "broken.jpg", content)
    (batch,) = batches(read_picture_folders(tmp_path))
    assert len(batch.pictures) == 4
    ((name, refusal),) = batch.refused
    assert (name, refusal.reason) == ("train/a/broken.jpg", "BAD_IMAGE")
    assert "broken" not in refusal.detail


def test_picture_that_is_gone_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Refusal, match="UNREADABLE"):
        load_picture(tmp_path / "gone.jpg", "gone.jpg", Marks(0))
    write(tmp_path / "large.jpg")
    monkeypatch.setattr("mp3d.data.picture_files.MAX_PIXELS", 20 * 12 - 1)
    with pytest.raises(Refusal, match="TOO_LARGE"):
        load_picture(tmp_path / "large.jpg", "large.jpg", Marks(0))


def test_other_files_are_counted(tmp_path):
    write(tmp_path / "train" / "a" / "1.jpg")
    write(tmp_path / "train" / "a" / "1.png", png())
    assert read_picture_folders(tmp_path).notes == ("1 files are no .jpg or .jpeg, not used",)


def test_what_is_no_class_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        read_picture_folders(tmp_path / "none")
    write(tmp_path / "1.jpg")
    with pytest.raises(DataError, match="train/<class>/1.jpg"):
        read_picture_folders(tmp_path)
    write(tmp_path / "train" / "a" / "1.jpg")
    write(tmp_path / "val" / "b" / "1.jpg")
    with pytest.raises(DataError, match="val has the class b, train has not"):
        read_picture_folders(tmp_path)
    with pytest.raises(ConfigError, match="pictures_per_item is 0"):
        read_picture_folders(tmp_path, pictures_per_item=0)
    write(tmp_path / "val" / "val_annotations.txt", b"val_0.JPEG\n")
    with pytest.raises(DataError, match="a tab and a class"):
        read_picture_folders(tmp_path)
