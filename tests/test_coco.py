"""COCO's instances: boxes, crowds, masks of classes, on files in its format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp3d.data.coco import read_coco
from mp3d.data.prepare import prepare
from mp3d.data.series import Picture
from mp3d.data.shard import open_shards
from mp3d.data.source import PictureBatch, Source
from mp3d.errors import ConfigError, DataError
from tests.test_pictures import jpeg, write

CATEGORIES = [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
ROWS, COLUMNS = 12, 20


def annotation(image: int, bbox: list[float], category: int = 1, **others: Any) -> dict[str, Any]:
    x, y, w, h = bbox
    square = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {"image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, "segmentation": square} | others


def write_pair(root: Path, annotations: list[dict], /, name: str = "train2017", count: int = 3, **content: Any) -> Path:
    """Pictures 0, 1, ... as files 5.jpg, 6.jpg, ..."""
    images = [{"id": i, "file_name": f"{i + 5}.jpg", "height": ROWS, "width": COLUMNS} for i in range(count)]
    for i in range(count):
        write(root / name / f"{i + 5}.jpg", jpeg(seed=i))
    path = root / "annotations" / f"instances_{name}.json"
    entries = {"images": images, "annotations": annotations, "categories": CATEGORIES} | content
    write(path, json.dumps(entries).encode())
    return path


def pictures(source: Source) -> dict[str, Picture]:
    found: dict[str, Picture] = {}
    for item in source.items:
        batch = item.load()
        assert isinstance(batch, PictureBatch)
        assert not batch.refused
        found |= {picture.name: picture for picture in batch.pictures}
    return found


def warnings(source: Source) -> set[str]:
    return {code for item in source.items for code in item.load().warnings}


def boxes(picture: Picture) -> list[list[float]] | None:
    return None if picture.truth.boxes is None else picture.truth.boxes.tolist()


def test_boxes_labels_and_the_official_split(tmp_path: Path):
    write_pair(
        tmp_path, [annotation(1, [2, 3, 6.5, 4], 44), annotation(0, [0, 0, 20, 12]), annotation(1, [1, 1, 2, 2], 3)]
    )
    write_pair(tmp_path, [], "val2017", count=1)
    source = read_coco(tmp_path)
    assert source.class_names == ("person", "car", "bottle")  # by their ids
    assert [item.split for item in source.items] == ["train", "val"]
    found = pictures(source)
    assert boxes(found["train2017/6.jpg"]) == [[2, 3, 8.5, 7], [1, 1, 3, 3]]
    assert found["train2017/6.jpg"].truth.labels.tolist() == [3, 2]
    assert boxes(found["train2017/5.jpg"]) == [[0, 0, 20, 12]]
    assert found["train2017/7.jpg"].truth.labels.tolist() == boxes(found["val2017/5.jpg"]) == []
    assert all(picture.truth.mask is None and picture.image_label is None for picture in found.values())
    assert found["train2017/5.jpg"].jpeg == jpeg(seed=0)
    assert source.notes == ()


def test_crowds_are_no_boxes_and_a_picture_of_crowds_is_not_empty(tmp_path: Path):
    crowd = {"iscrowd": 1, "segmentation": {"counts": [200, 40], "size": [ROWS, COLUMNS]}}
    write_pair(
        tmp_path,
        [annotation(0, [1, 1, 5, 5]), annotation(0, [9, 1, 5, 5], **crowd), annotation(1, [9, 1, 5, 5], **crowd)],
    )
    source = read_coco(tmp_path)
    found = pictures(source)
    assert [boxes(found[f"train2017/{number}.jpg"]) for number in (5, 6, 7)] == [[[1, 1, 6, 6]], None, []]
    assert source.notes == (
        "2 crowds, which are no boxes to learn, left out",
        "1 pictures with nothing but crowds count as not searched",
    )


def test_boxes_at_the_rim_are_cut_and_empty_ones_dropped(tmp_path: Path):
    write_pair(
        tmp_path,
        [
            *(annotation(0, box) for box in ([-2, 3, 6, 4], [18, 10, 5, 5], [4, 4, 0, 3], [30, 3, 5, 5])),
            annotation(1, [4, 4, float("nan"), 3]),
            annotation(2, [4, 4, -2, 3]),
        ],
    )
    source = read_coco(tmp_path)
    found = pictures(source)
    assert boxes(found["train2017/5.jpg"]) == [[0, 3, 4, 7], [18, 10, 20, 12]]
    assert boxes(found["train2017/6.jpg"]) is boxes(found["train2017/7.jpg"]) is None  # there is something, somewhere
    assert warnings(source) == {"BOX_CLIPPED", "BOX_DROPPED"}
    result = prepare(source, tmp_path / "out", id_key=b"k", runner="local")
    assert result.warnings == {"BOX_CLIPPED": 1, "BOX_DROPPED": 1}


class TestMasks:
    def test_small_before_large_before_crowd(self, tmp_path: Path):
        crowd = {"iscrowd": 1, "segmentation": {"counts": [0, 120, 120], "size": [ROWS, COLUMNS]}}
        write_pair(
            tmp_path,
            [annotation(0, [6, 4, 2, 2], 44), annotation(0, [2, 2, 12, 8]), annotation(0, [0, 0, 10, 12], 3, **crowd)],
        )
        (picture, *_) = pictures(read_coco(tmp_path, masks=True)).values()
        expected = np.zeros((ROWS, COLUMNS), np.uint8)
        expected[:, :10] = 2  # the runs go down the columns
        expected[2:10, 2:14] = 1
        expected[4:6, 6:8] = 3
        found = pictures(read_coco(tmp_path, masks=True))["train2017/5.jpg"].truth.mask
        np.testing.assert_array_equal(found, expected)
        assert picture.truth.mask is not None

    def test_parts_add_up_and_pixel_edges_are_cocos(self, tmp_path: Path):
        parts = [[1, 1, 5, 1, 5, 5, 1, 5], [3, 3, 8, 3, 8, 6, 3, 6], [10.4, 2.4, 12.6, 2.4, 12.6, 3.6, 10.4, 3.6]]
        write_pair(tmp_path, [annotation(0, [1, 1, 12, 5], segmentation=parts)])
        expected = np.zeros((ROWS, COLUMNS), np.uint8)
        expected[1:5, 1:5] = expected[3:6, 3:8] = 1
        expected[2:4, 10:13] = 1  # centres at 2.5, 3.5 and 10.5, 11.5, 12.5
        found = pictures(read_coco(tmp_path, masks=True))
        np.testing.assert_array_equal(found["train2017/5.jpg"].truth.mask, expected)
        assert not found["train2017/6.jpg"].truth.mask.any()  # searched, nothing there

    @pytest.mark.parametrize(
        "segmentation",
        [
            [],
            [[1, 1, 5, 1]],
            [[1, 1, 5, 1, 5]],
            [[1, 1, 5, 1, 5, float("nan")]],
            None,
            "text",
            {"counts": "packed<3", "size": [ROWS, COLUMNS]},
            {"counts": [0, 120, 120], "size": [COLUMNS, ROWS]},
            {"counts": [0, 120], "size": [ROWS, COLUMNS]},
            {"counts": [-10, 250], "size": [ROWS, COLUMNS]},
            {"counts": [10**20], "size": [10**10, 10**10]},
            {"size": [ROWS, COLUMNS]},
        ],
    )
    def test_without_a_readable_outline_of_every_object_there_is_no_mask(self, tmp_path: Path, segmentation: Any):
        write_pair(tmp_path, [annotation(0, [1, 1, 3, 3]), annotation(0, [6, 6, 3, 3], segmentation=segmentation)])
        source = read_coco(tmp_path, masks=True)
        found = pictures(source)
        assert found["train2017/5.jpg"].truth.mask is None
        assert boxes(found["train2017/5.jpg"]) == [[1, 1, 4, 4], [6, 6, 9, 9]]
        assert found["train2017/6.jpg"].truth.mask is not None
        assert source.notes == ("1 pictures with an object without outline have no mask",)

    def test_more_classes_than_a_byte_holds(self, tmp_path: Path):
        write_pair(tmp_path, [], categories=[{"id": number, "name": str(number)} for number in range(256)])
        assert len(read_coco(tmp_path).class_names) == 256
        with pytest.raises(DataError, match="256 categories; a mask holds at most 254"):
            read_coco(tmp_path, masks=True)


def test_a_picture_of_another_size_is_refused(tmp_path: Path):
    write_pair(tmp_path, [annotation(0, [1, 1, 3, 3])])
    write(tmp_path / "train2017" / "6.jpg", jpeg(size=(ROWS, COLUMNS)))
    (item,) = read_coco(tmp_path).items
    batch = item.load()
    assert isinstance(batch, PictureBatch)
    assert [(name, refusal.reason) for name, refusal in batch.refused] == [("train2017/6.jpg", "SIZE_MISMATCH")]
    assert "12 x 20 pixels, its annotation is for 20 x 12" in batch.refused[0][1].detail


def test_what_does_not_pair_up_is_counted(tmp_path: Path):
    write_pair(tmp_path, [annotation(0, [1, 1, 3, 3]), annotation(77, [1, 1, 3, 3])])
    content = json.loads((tmp_path / "annotations" / "instances_train2017.json").read_text())
    content["images"] += [
        {"id": 8 + i, "file_name": name, "height": 9, "width": 9} for i, name in enumerate(("a.jpg", "b.png"))
    ]
    write(tmp_path / "annotations" / "instances_train2017.json", json.dumps(content).encode())
    write(tmp_path / "annotations" / "instances_val2017.json", b"{}")
    write(tmp_path / "train2017" / "not_listed.jpg")
    assert read_coco(tmp_path).notes == (
        "1 JSON files without a folder of their pictures, not used",
        "1 annotations of pictures that the JSON does not list, not used",
        "1 pictures in the folders, but not in the JSON, not used",
        "1 pictures of the JSON are no .jpg or .jpeg, not used",
        "1 pictures of the JSON without their file, not used",
    )


def test_ones_own_json_and_folder(tmp_path: Path):
    path = write_pair(tmp_path / "elsewhere", [annotation(0, [1, 1, 3, 3])], "shapes", count=25)
    root = tmp_path / "elsewhere" / "shapes"
    for source in (read_coco(root, path), read_coco(tmp_path, path, root)):
        assert {item.split for item in source.items} == {None}
        assert len(source.items) == 20  # enough batches to deal them to the splits
        assert len(pictures(source)) == 25
    assert read_coco(root, path).items[0].key.startswith(tuple("0123456789"))
    path.rename(path.with_name("valid.json"))
    source = read_coco(root, path.with_name("valid.json"))
    assert {item.split for item in source.items} == {"val"}


def test_pictures_under_images(tmp_path: Path):
    write_pair(tmp_path, [])
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images" / "train2017")
    assert set(pictures(read_coco(tmp_path))) == {f"images/train2017/{i}.jpg" for i in (5, 6, 7)}


def test_another_json_is_another_data_set(tmp_path: Path):
    write_pair(tmp_path, [annotation(0, [1, 1, 3, 3])])
    prepare(read_coco(tmp_path), tmp_path / "out", id_key=b"k", runner="local")
    write_pair(tmp_path, [annotation(0, [1, 1, 3, 4])])
    with pytest.raises(ConfigError, match="annotations_sha256"):
        prepare(read_coco(tmp_path), tmp_path / "out", id_key=b"k", runner="local")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"images": None}, "has no list images"),
        ({"categories": [{"id": "1", "name": "person"}]}, r"categories\[0\].*'1' is no integer"),
        ({"images": [{"id": 0, "file_name": "5.jpg", "width": 20}]}, r"images\[0\].*'height'"),
        ({"images": [{"id": 0, "file_name": "../5.jpg", "width": 20, "height": 12}]}, "leads out of the folder"),
        ({"images": [{"id": 0, "file_name": "/5.jpg", "width": 20, "height": 12}]}, "leads out of the folder"),
        (
            {"images": [{"id": 0, "file_name": name, "width": 20, "height": 12} for name in ("5.jpg", "6.jpg")]},
            "one id",
        ),
        ({"images": [{"id": i, "file_name": "5.jpg", "width": 20, "height": 12} for i in (1, 2)]}, "one file_name"),
        ({"annotations": [{"id": 1}]}, r"annotations\[0\].*'bbox'"),
        ({"annotations": [annotation(0, [1, 1, 3, 3]) | {"bbox": [1, 1, 3]}]}, r"annotations\[0\].*ValueError"),
        ({"annotations": [annotation(0, [1, 1, 3, 3], 7)]}, "category 7, which is not listed"),
        ({"annotations": ["text"]}, r"annotations\[0\]"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, content: dict[str, Any], told: str):
    write_pair(tmp_path, [], **content)
    with pytest.raises(DataError, match=told):
        read_coco(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_of_coco(tmp_path: Path, content: bytes):
    path = write_pair(tmp_path, [])
    path.write_bytes(content)
    with pytest.raises(DataError, match="no JSON"):
        read_coco(tmp_path)


def test_what_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="--annotations"):
        read_coco(tmp_path)
    path = write_pair(tmp_path, [])
    with pytest.raises(DataError, match="cannot be read"):
        read_coco(tmp_path, tmp_path / "no.json")
    with pytest.raises(DataError, match="is no folder"):
        read_coco(tmp_path, path, tmp_path / "none")
    with pytest.raises(ConfigError, match="pictures_per_item is 0"):
        read_coco(tmp_path, pictures_per_item=0)
    with pytest.raises(DataError, match="no picture of instances_train2017.json"):
        read_coco(tmp_path, path, tmp_path / "annotations")
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace(".jpg", ".png")
    (tmp_path / "instances_png.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="only JPEG is read"):
        read_coco(tmp_path, tmp_path / "instances_png.json", tmp_path / "train2017")
    write_pair(tmp_path, [], "val2017", categories=[{"id": 1, "name": "dog"}])
    with pytest.raises(DataError, match="category 1 is 'dog', elsewhere 'person'"):
        read_coco(tmp_path)
    monkeypatch.setattr("mp3d.data.coco_json.MAX_JSON_BYTES", 10)
    with pytest.raises(DataError, match="more than"):
        read_coco(tmp_path)


def test_classes_of_all_pairs_are_counted_together(tmp_path: Path):
    write_pair(tmp_path, [], categories=CATEGORIES[:2])
    write_pair(tmp_path, [annotation(0, [1, 1, 3, 3], 3)], "val2017", categories=CATEGORIES[2:])
    source = read_coco(tmp_path)
    assert source.class_names == ("person", "car", "bottle")
    assert pictures(source)["val2017/5.jpg"].truth.labels.tolist() == [2]
    prepare(source, tmp_path / "out", id_key=b"k", runner="local")
    assert open_shards(tmp_path / "out").class_names == source.class_names
