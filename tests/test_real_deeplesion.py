"""The DeepLesion reader on two published volumes; expected values were read off the files with other programs."""

import csv
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.deeplesion import read_deeplesion
from mp3d.data.deeplesion_3d import read_boxes, read_deeplesion_3d
from mp3d.data.deeplesion_table import read_table
from mp3d.data.series import CTSeries, boxes_3d
from mp3d.data.source import Item
from mp3d.data.splits import assign_splits

ROOT = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data") / "deeplesion"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"no folder {ROOT}")


def load(item: Item) -> CTSeries:
    loaded = item.load()
    assert isinstance(loaded, CTSeries)
    return loaded


def test_two_volumes_of_the_official_test_split():
    source = read_deeplesion(ROOT)
    assert [(item.key, item.split) for item in source.items] == [
        ("000001_01_01/103-115", "test"),
        ("000001_02_01/008-023", "test"),
    ]
    assert source.notes == ("boxes without their image, not used: train 936, val 4889, test 4924",)
    first, second = map(load, source.items)
    assert first.volume.hu.shape == (13, 512, 512)
    assert (first.volume.hu.min(), first.volume.hu.max()) == (-3024, 1383)
    assert (first.volume.hu == -3024).sum(axis=(1, 2)).tolist() == [55772] * 13
    assert first.volume.spacing_mm == pytest.approx((5, 0.488281, 0.488281))
    assert second.volume.hu.shape == (16, 512, 512)
    assert (second.volume.hu.min(), second.volume.hu.max()) == (-1024, 937)
    assert second.volume.spacing_mm == pytest.approx((5, 0.314453, 0.314453))


def test_boxes_are_those_of_the_table_less_one():
    with (ROOT / "DL_info_subset.csv").open(newline="") as file:
        rows = {row["File_name"]: row["Bounding_boxes"] for row in csv.DictReader(file)}
    for item in read_deeplesion(ROOT).items:
        series = load(item)
        looked_at = [i for i, truth in enumerate(series.truths) if truth.boxes is not None]
        assert [series.first_index + i for i in looked_at] == ([109] if series.study == "000001_01" else [14, 17])
        for i in looked_at:
            name = f"{item.key.split('/')[0]}_{series.first_index + i:03d}.png"
            expected = [float(value) - 1 for value in rows[name].split(",")]
            boxes = series.truths[i].boxes
            assert boxes is not None
            assert np.allclose(boxes, [expected], atol=1e-4)
            x1, y1, x2, y2 = boxes[0].astype(int)
            inside = series.volume.hu[i, y1:y2, x1:x2]
            assert -100 < np.median(inside) < 200  # a soft-tissue lesion of the mediastinum, not air and not bone


def test_whole_table():
    lesions = read_table(ROOT / "DL_info_subset.csv")
    counts = [sum(lesion.split == split for lesion in lesions) for split in ("train", "val", "test")]
    assert counts == [936, 4889, 4927]
    key_slices = {(lesion.folder, lesion.slice_number, lesion.split) for lesion in lesions}
    assert [sum(key[2] == split for key in key_slices) for split in ("train", "val", "test")] == [919, 4793, 4831]
    sure = [lesion for lesion in lesions if not lesion.noisy]
    assert [sum(lesion.split == split for lesion in sure) for split in ("val", "test")] == [4887, 4912]
    beyond = {f"{lesion.folder}_{lesion.slice_number:03d}" for lesion in lesions if lesion.box[2] > 512}
    assert {"000211_02_01_018", "000211_04_01_022", "003957_03_01_586"} <= beyond
    patients = [Item(str(i), lesion.folder[:6], lesion.split, list) for i, lesion in enumerate(lesions)]  # type: ignore[arg-type]
    assert len(assign_splits(patients, (1, 0, 0), 0)) == 1484


def test_zip_parts_of_the_real_slices(tmp_path: Path):
    (tmp_path / "DL_info.csv").symlink_to(ROOT / "DL_info_subset.csv")
    for number, folder in enumerate(sorted((ROOT / "Images_png").iterdir()), 1):
        with zipfile.ZipFile(tmp_path / f"Images_png_{number:02d}.zip", "w", zipfile.ZIP_DEFLATED) as part:
            for file in folder.iterdir():
                part.write(file, f"Images_png/{folder.name}/{file.name}")
    packed, plain = read_deeplesion(tmp_path), read_deeplesion(ROOT)
    assert [item.key for item in packed.items] == [item.key for item in plain.items]
    for a, b in zip(map(load, packed.items), map(load, plain.items), strict=True):
        assert np.array_equal(a.volume.hu, b.volume.hu)
        assert np.array_equal(a.volume.affine, b.volume.affine)


def test_all_sub_volumes_with_3d_boxes():
    sub_volumes = read_boxes(ROOT / "manual_3d_boxes.json")
    by_split = {split: [one for one in sub_volumes if one.split == split] for split in ("val", "test")}
    assert {split: len(found) for split, found in by_split.items()} == {"val": 200, "test": 799}
    assert {split: sum(len(one.boxes) for one in found) for split, found in by_split.items()} == {
        "val": 1292,
        "test": 4150,
    }
    patients = {split: {one.series[:6] for one in found} for split, found in by_split.items()}
    assert (len(patients["val"]), len(patients["test"])) == (99, 519)
    assert not patients["val"] & patients["test"]
    assert sum(not one.boxes for one in by_split["test"]) == 31
    rows = {(lesion.folder, lesion.slice_number): lesion.split for lesion in read_table(ROOT / "DL_info_subset.csv")}
    official = {rows.get((one.series, number)) for one in sub_volumes for number in one.numbers} - {None}
    assert official == {"test"}


def test_the_sub_volume_with_pixels():
    source = read_deeplesion_3d(ROOT)
    assert [(item.key, item.split) for item in source.items] == [("000001_01_01_103-115", "test")]
    assert source.notes == ("998 sub-volumes without their images, not used",)
    series = load(source.items[0])
    assert series.volume.spacing_mm == pytest.approx((5, 0.488281, 0.488281))
    boxes, _, _ = boxes_3d(series.truths)
    assert (boxes + [0, 0, 103, 0, 0, 102]).tolist() == [
        [220, 88, 108, 246, 116, 110],
        [286, 168, 109, 309, 198, 112],
        [233, 80, 107, 256, 106, 110],
    ]
    (marked,) = [truth for truth in load(read_deeplesion(ROOT).items[0]).truths if truth.boxes is not None]
    assert marked.boxes is not None
    x1, y1, x2, y2 = marked.boxes[0]
    on_slice = series.truths[109 - 103].boxes
    assert on_slice is not None
    left, top, right, bottom = on_slice.T
    overlap = (np.minimum(right, x2) - np.maximum(left, x1)).clip(0) * (np.minimum(bottom, y2) - np.maximum(top, y1))
    assert overlap.max() / ((x2 - x1) * (y2 - y1)) > 0.8
