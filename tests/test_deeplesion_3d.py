"""The reader of the fully annotated sub-volumes, on files in its format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp3d.data.deeplesion_3d import read_boxes, read_deeplesion_3d
from mp3d.data.prepare import prepare
from mp3d.data.reasons import REASONS
from mp3d.data.series import CTSeries, boxes_3d
from mp3d.data.shard import decode_truth, open_shards
from mp3d.errors import DataError
from tests.test_deeplesion import SIZE, lesion, write_slices, write_table
from tests.test_deeplesion_images import members, pack
from tests.tiny import ID_KEY

FIRST, SECOND, EMPTY = "000001_01_01_098-107", "000002_03_01_001-003", "000003_01_01_010-012"
BOXES: dict[str, dict[str, list[Any]]] = {
    "val": {SECOND: [[4, 5, 1, 9, 12, 3]]},
    "test": {
        FIRST: [[10, 20, 99, 18, 31, 102], [12, 22, 101, 20, 33, 107]],
        EMPTY: [],
        "000009_01_01_005-009": [[1, 1, 5, 9, 9, 6]],
    },
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_slices(tmp_path, "000001_01_01", range(90, 110))  # more than the sub-volume
    write_slices(tmp_path, "000002_03_01", range(1, 4))
    write_slices(tmp_path, "000003_01_01", range(10, 13))
    write_table(
        tmp_path,
        [
            lesion("000001_01_01", 100, Train_Val_Test="3"),
            lesion("000001_01_01", 92, Train_Val_Test="3", Spacing_mm_px_="0.8, 0.7, 1"),
            lesion("000002_03_01", 2, Train_Val_Test="3"),
            lesion("000003_01_01", 11, Train_Val_Test="3"),
        ],
    )
    write_boxes(tmp_path, BOXES)
    return tmp_path


def write_boxes(root: Path, content: Any) -> Path:
    path = root / "manual_3d_boxes.json"
    path.write_text(json.dumps(content))
    return path


def load(root: Path, name: str, **options: Any) -> CTSeries:
    (item,) = [item for item in read_deeplesion_3d(root, **options).items if item.key == name]
    loaded = item.load()
    assert isinstance(loaded, CTSeries)
    return loaded


def test_sub_volumes_and_their_splits(root: Path):
    source = read_deeplesion_3d(root)
    assert [(item.key, item.patient, item.split) for item in source.items] == [
        (FIRST, "000001", "test"),
        (SECOND, "000002", "val"),
        (EMPTY, "000003", "test"),
    ]
    assert source.refused == ()
    assert source.notes == (
        "1 sub-volumes in val that are of DeepLesion's official test split",
        "1 sub-volumes without a box although the table marks a lesion there",
        "1 sub-volumes without their images, not used",
    )


def test_every_slice_has_the_boxes_that_cross_it(root: Path):
    series = load(root, FIRST)
    assert series.volume.hu.shape == (10, SIZE, SIZE)
    assert series.volume.hu[:, 1, 1].tolist() == list(range(98, 108))
    assert series.volume.spacing_mm == pytest.approx((5, 0.7, 0.8))  # of the row inside, not of slice 92
    assert (series.patient, series.study, series.series, series.first_index) == ("000001", "000001_01", FIRST, 98)
    instances = [None if truth.instances is None else truth.instances.tolist() for truth in series.truths]
    assert instances == [[], [1], [1], [1, 2], [1, 2], [2], [2], [2], [2], [2]]
    assert series.truths[3].boxes is not None
    assert series.truths[3].boxes.tolist() == [[10, 20, 18, 31], [12, 22, 20, 33]]


def test_3d_boxes_come_back_from_the_shards(root: Path, tmp_path: Path):
    prepare(read_deeplesion_3d(root), tmp_path / "out", id_key=ID_KEY, runner="local")
    shards = open_shards(tmp_path / "out")
    entry = next(entry for entry in shards.entries if entry.num_rows == 10)
    rows = shards.read_rows(entry, 0, 10)
    boxes, labels, instances = boxes_3d([decode_truth(row) for row in rows])
    published = boxes + np.array([0, 0, rows[0]["z_index"], 0, 0, rows[0]["z_index"] - 1])  # the last slice counts
    assert published.tolist() == BOXES["test"][FIRST]
    assert (labels.tolist(), instances.tolist()) == ([1, 1], [1, 2])


def test_an_empty_list_is_no_proof_of_absence(root: Path):
    assert all(truth.boxes is None for truth in load(root, EMPTY).truths)
    searched = load(root, EMPTY, empty_lists="searched")
    assert [truth.boxes is not None and len(truth.boxes) for truth in searched.truths] == [0, 0, 0]
    assert read_deeplesion_3d(root).options != read_deeplesion_3d(root, empty_lists="searched").options


def test_an_empty_list_without_a_lesion_in_the_table_says_that_nothing_is_there(root: Path):
    write_slices(root, "000003_01_01", range(20, 24))
    write_boxes(root, {"test": {"000003_01_01_020-023": []}})
    assert all(truth.boxes is not None for truth in load(root, "000003_01_01_020-023").truths)


def test_zip_parts_do_as_well(root: Path):
    write_slices(root / "folders", "000004_01_01", range(1, 4))
    pack(root, "Images_png_01.zip", members(range(1, 4), series="000004_01_01"))
    write_table(root, [lesion("000004_01_01", 2, Train_Val_Test="3")])
    write_boxes(root, {"test": {"000004_01_01_001-003": [[1, 2, 1, 3, 4, 2]]}})
    assert load(root, "000004_01_01_001-003").volume.hu[:, 1, 1].tolist() == [1, 2, 3]


def test_what_cannot_be_used_is_refused_by_name(root: Path):
    (root / "Images_png" / "000001_01_01" / "103.png").unlink()
    write_slices(root, "000005_01_01", range(1, 4))
    write_table(
        root,
        [lesion("000001_01_01", 100, Train_Val_Test="3"), lesion("000002_03_01", 2, Spacing_mm_px_="0.8, 0.8, nan")],
    )
    write_boxes(root, {"test": {FIRST: [], SECOND: [], "000005_01_01_001-003": []}})
    source = read_deeplesion_3d(root)
    assert [(key, refusal.reason) for key, refusal in source.refused] == [
        (FIRST, "MISSING_SLICE"),
        (SECOND, "BAD_SPACING"),
        ("000005_01_01_001-003", "MISSING_GEOMETRY"),
    ]
    assert {refusal.reason for _, refusal in source.refused} <= REASONS.keys()


def test_boxes_beyond_the_image_are_cut_or_make_their_slices_unknown(root: Path):
    write_boxes(root, {"val": {SECOND: [[30, 5, 1, 60, 12, 2], [50, 50, 2, 60, 60, 3]]}})
    series = load(root, SECOND)
    assert series.truths[0].boxes is not None
    assert series.truths[0].boxes.tolist() == [[30, 5, SIZE, 12]]
    assert [truth.boxes is None for truth in series.truths] == [False, True, True]
    assert series.warnings == ("BOX_CLIPPED", "BOX_DROPPED")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "cannot be read"),
        ({"test": [1]}, "cannot be read"),
        ({"all": {}}, "the split 'all'"),
        ({"test": {"../000001_01_01_098-107": []}}, "is no sub-volume"),
        ({"test": {"000001_01_01_107-098": []}}, "is no sub-volume"),
        ({"test": {FIRST: None}}, f"{FIRST} has something else"),
        ({"test": {FIRST: [[1, 2, 99, 3, 4]]}}, "has something else"),
        ({"test": {FIRST: [[1, 2, 97, 3, 4, 99]]}}, "inside the sub-volume"),
        ({"test": {FIRST: [[1, 2, 99.5, 3, 4, 100]]}}, "something else"),
        ({"test": {FIRST: [[3, 2, 99, 3, 4, 100]]}}, "x1 < x2"),
        ({"test": {FIRST: [[1, 2, 99, float("nan"), 4, 100]]}}, "x1 < x2"),
        ({"test": {FIRST: [[1, 2, 99, True, 4, 100]]}}, "something else"),
        ({"test": {FIRST: [[1, 2, 99, "3", 4, 100]]}}, "something else"),
    ],
)
def test_broken_boxes_are_told(tmp_path: Path, content: Any, message: str):
    with pytest.raises(DataError, match=message):
        read_boxes(write_boxes(tmp_path, content))


def test_missing_or_damaged_files_are_told(root: Path):
    (root / "manual_3d_boxes.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="RecursionError"):
        read_deeplesion_3d(root)
    with pytest.raises(DataError, match="No such file"):
        read_deeplesion_3d(root, boxes=root / "none.json")
    write_boxes(root, {"test": {"000009_01_01_005-009": []}})
    with pytest.raises(DataError, match="no image of manual_3d_boxes.json"):
        read_deeplesion_3d(root)
