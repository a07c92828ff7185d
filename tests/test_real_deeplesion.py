"""The DeepLesion reader on two published volumes; expected values were read off the files with other programs."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.deeplesion import read_deeplesion
from mp3d.data.deeplesion_table import read_table
from mp3d.data.series import CTSeries
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
    assert source.notes == ("10749 rows of the table without their image, not used",)
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
    assert sum(lesion.noisy for lesion in lesions) == 17
    assert len({(lesion.folder, lesion.slice_number) for lesion in lesions}) == 10543
    beyond = {f"{lesion.folder}_{lesion.slice_number:03d}" for lesion in lesions if lesion.box[2] > 512}
    assert {"000211_02_01_018", "000211_04_01_022", "003957_03_01_586"} <= beyond
    patients = [Item(str(i), lesion.folder[:6], lesion.split, list) for i, lesion in enumerate(lesions)]  # type: ignore[arg-type]
    assert len(assign_splits(patients, (1, 0, 0), 0)) == 1484
