"""The DeepLesion reader, on files in its format."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mp3d.config import ClipConfig
from mp3d.data.clips import window_positions
from mp3d.data.deeplesion import read_deeplesion
from mp3d.data.deeplesion_3d import read_deeplesion_3d
from mp3d.data.deeplesion_images import consecutive_runs
from mp3d.data.prepare import prepare
from mp3d.data.reasons import REASONS, WARNINGS
from mp3d.data.series import CTSeries
from mp3d.data.shard import open_shards
from mp3d.errors import DataError, Refusal

COLUMNS = [
    "File_name",
    "Patient_index",
    "Study_index",
    "Series_ID",
    "Key_slice_index",
    "Measurement_coordinates",
    "Bounding_boxes",
    "Lesion_diameters_Pixel_",
    "Normalized_lesion_location",
    "Coarse_lesion_type",
    "Possibly_noisy",
    "Slice_range",
    "Spacing_mm_px_",
    "Image_size",
    "DICOM_windows",
    "Patient_gender",
    "Patient_age",
    "Train_Val_Test",
]
SIZE = 40
BOX = "11.5, 6, 20, 16.25"


def lesion(folder: str, number: int, **changes: str) -> dict[str, str]:
    row = {
        "File_name": f"{folder}_{number:03d}.png",
        "Key_slice_index": str(number),
        "Measurement_coordinates": "1, 2, 3, 4, 5, 6, 7, 8",
        "Bounding_boxes": BOX,
        "Coarse_lesion_type": "-1",
        "Possibly_noisy": "0",
        "Spacing_mm_px_": "0.8, 0.7, 5",
        "Image_size": "512, 512",
        "Patient_age": "",
        "Train_Val_Test": "1",
    }
    return dict.fromkeys(COLUMNS, "1") | row | changes


def write_table(root: Path, rows: list[dict[str, str]], name: str = "DL_info.csv") -> None:
    with (root / name).open("w", newline="") as file:  # CRLF, lists in quotes, as published
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(COLUMNS)
        writer.writerows([row[column] for column in COLUMNS] for row in rows)


def stored(number: int, size: int = SIZE) -> np.ndarray:
    """Unsigned 16 bits, with the padding of the corners and the extremes that may occur."""
    pixels = np.full((size, size), 32768 + number, np.uint16)
    pixels[0, :4] = [32768 - 3024, 0, 65535, 32768 - 1024]
    return pixels


def write_slices(root: Path, folder: str, numbers: range, size: int = SIZE) -> None:
    (root / "Images_png" / folder).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(stored(number, size)).save(root / "Images_png" / folder / f"{number:03d}.png")


@pytest.fixture
def root(tmp_path) -> Path:
    write_slices(tmp_path, "000001_01_01", range(98, 108))
    write_slices(tmp_path, "000001_01_01", range(120, 124))
    write_slices(tmp_path, "000002_03_01", range(1, 4))
    write_table(
        tmp_path,
        [
            lesion("000001_01_01", 100),
            lesion("000001_01_01", 100, Bounding_boxes="1, 1, 9, 9"),
            lesion("000001_01_01", 104, Possibly_noisy="1"),
            lesion("000001_01_01", 121, Spacing_mm_px_="0.8, 0.7, 1"),
            lesion("000001_01_01", 200),
            lesion("000002_03_01", 2, Train_Val_Test="3"),
            lesion("000007_01_01", 5, Train_Val_Test="3"),
        ],
    )
    return tmp_path


def load(root: Path, index: int = 0, **options) -> CTSeries:
    loaded = read_deeplesion(root, **options).items[index].load()
    assert isinstance(loaded, CTSeries)
    return loaded


def test_the_kind_of_a_lesion_is_stored_beside_it(tmp_path):
    write_slices(tmp_path, "000001_01_01", range(1, 4))
    rows = [lesion("000001_01_01", 2, Coarse_lesion_type="5"), lesion("000001_01_01", 2, Coarse_lesion_type="-1")]
    write_table(tmp_path, rows)
    assert [truth.types for truth in load(tmp_path).truths] == [None, ("lung", None), None]
    write_table(tmp_path, [lesion("000001_01_01", 2, Coarse_lesion_type="9")])
    with pytest.raises(DataError, match="lesion type '9'"):
        load(tmp_path)


def test_the_long_diameter_of_a_lesion_is_stored_beside_it_in_millimetres(tmp_path):
    write_slices(tmp_path, "000001_01_01", range(1, 4))
    square = {"Spacing_mm_px_": "0.8, 0.8, 5"}
    rows = [
        lesion("000001_01_01", 2, Lesion_diameters_Pixel_="11.5, 6.25", **square),
        lesion("000001_01_01", 2, Lesion_diameters_Pixel_="", **square),
        lesion("000001_01_01", 3, Lesion_diameters_Pixel_="NaN, NaN", **square),
    ]
    write_table(tmp_path, rows)
    truths = load(tmp_path).truths
    assert truths[1].diameters_mm is not None
    np.testing.assert_allclose(truths[1].diameters_mm, [9.2, np.nan])
    assert truths[2].boxes is not None
    assert truths[2].diameters_mm is None
    write_table(tmp_path, [lesion("000001_01_01", 2, Lesion_diameters_Pixel_="long")])
    with pytest.raises(DataError, match="line 2 cannot be parsed"):
        load(tmp_path)


def test_each_run_of_slices_is_an_item(root):
    source = read_deeplesion(root)
    assert [(item.key, item.patient, item.split) for item in source.items] == [
        ("000001_01_01/098-107", "000001", "train"),
        ("000001_01_01/120-123", "000001", "train"),
        ("000002_03_01/001-003", "000002", "test"),
    ]
    assert source.class_names == ("lesion",)
    assert source.notes == ("boxes without their image, not used: train 1, test 1",)
    assert source.refused == ()


def test_a_root_that_is_no_folder(tmp_path):
    with pytest.raises(DataError, match="none is no folder; give the folder that holds the data set"):
        read_deeplesion(tmp_path / "none")
    with pytest.raises(DataError, match="none is no folder; give the folder that holds the data set"):
        read_deeplesion_3d(tmp_path / "none")


def test_hounsfield_units_and_place(root):
    series = load(root)
    assert series.volume.hu.dtype == np.int16
    assert series.volume.hu[3, 1, 1] == 101
    assert series.volume.hu[0, 0, :4].tolist() == [-3024, -32768, 32767, -1024]
    assert series.volume.spacing_mm == pytest.approx((5, 0.7, 0.8))
    assert series.volume.affine[:3, 3].tolist() == [0, 0, 98 * 5]
    assert (series.patient, series.study, series.series) == ("000001", "000001_01", "000001_01_01_098-107")
    assert series.first_index == 98
    assert load(root, 1).volume.spacing_mm[0] == 1  # two runs of a folder may differ


def test_boxes_count_from_zero_and_only_key_slices_were_looked_at(root):
    truths = load(root).truths
    assert truths[2].boxes is not None
    assert truths[2].boxes.tolist() == [[10.5, 5, 19, 15.25], [0, 0, 8, 8]]
    assert truths[2].labels is not None
    assert truths[2].labels.tolist() == [1, 1]
    assert [i for i, truth in enumerate(truths) if truth.boxes is not None] == [2, 6]


def test_noisy_boxes_can_be_left_out(root):
    source = read_deeplesion(root, keep_noisy=False)
    assert "1 boxes marked as possibly noisy, not used" in source.notes
    truths = load(root, keep_noisy=False).truths
    assert truths[6].boxes is None  # not "looked, none found"
    assert source.options["keep_noisy"] is False
    assert source.options != read_deeplesion(root).options


def test_boxes_beyond_the_image_are_cut_or_dropped(root):
    write_table(
        root,
        [
            lesion("000001_01_01", 98, Bounding_boxes="0.5, 30, 60, 50"),
            lesion("000001_01_01", 99, Bounding_boxes="50, 1, 60, 9"),
            lesion("000001_01_01", 100, Bounding_boxes="5, nan, 6, 9"),
            lesion("000001_01_01", 101, Bounding_boxes="9, 9, 5, 5"),
        ],
    )
    series = load(root)
    assert series.truths[0].boxes is not None
    assert series.truths[0].boxes.tolist() == [[0, 29, SIZE, SIZE]]
    assert all(truth.boxes is None for truth in series.truths[1:])
    assert series.warnings == ("BOX_CLIPPED", "BOX_DROPPED")
    assert set(series.warnings) <= WARNINGS.keys()


@pytest.mark.parametrize("spacing", ["nan, nan, nan", "0.8, -0.8, 5", "0, 0.8, 5", "inf, 1, 1"])
def test_absurd_spacing_is_refused(root, spacing):
    write_table(root, [lesion("000001_01_01", 100, Spacing_mm_px_=spacing), lesion("000002_03_01", 2)])
    source = read_deeplesion(root)
    assert [(key, refusal.reason) for key, refusal in source.refused] == [
        ("000001_01_01/098-107", "BAD_SPACING"),
        ("000001_01_01/120-123", "BAD_SPACING"),
    ]
    assert len(source.items) == 1


@pytest.mark.parametrize("interval", ["nan", "NaN", "-5", "0", "inf"])
def test_key_slices_of_unknown_interval_stand_alone(root, interval):
    """As 3DCE reads them: it fills the clip with the key slice where the interval is NaN or negative."""
    spacing = f"0.8, 0.7, {interval}"
    rows = [lesion("000001_01_01", 100, Spacing_mm_px_=spacing), lesion("000001_01_01", 100, Bounding_boxes="1,1,9,9")]
    rows[1]["Spacing_mm_px_"] = spacing
    write_table(root, [*rows, lesion("000001_01_01", 104, Spacing_mm_px_=spacing), lesion("000001_01_01", 121)])
    source = read_deeplesion(root)
    assert source.refused == ()
    assert [item.key.split("/")[1] for item in source.items] == ["100-100", "104-104", "120-123"]
    assert "8 slices beside key slices of unknown slice interval, not used" in source.notes
    series = load(root)
    assert series.warnings == ("INTERVAL_UNKNOWN",)
    assert series.volume.hu.shape == (1, SIZE, SIZE)
    assert series.volume.hu[0, 1, 1] == 100
    assert series.volume.spacing_mm[1:] == pytest.approx((0.7, 0.8))
    assert series.first_index == 100
    assert len(series.truths[0].boxes) == 2
    clip = window_positions(0, 1, series.volume.spacing_mm[0], ClipConfig())
    assert clip.tolist() == [0] * 9


def test_an_interval_that_only_some_rows_of_a_run_give_counts_for_all(root):
    rows = [lesion("000001_01_01", 100), lesion("000001_01_01", 104, Spacing_mm_px_="0.8, 0.7, nan")]
    write_table(root, rows)
    series = load(root)
    assert series.volume.spacing_mm == pytest.approx((5, 0.7, 0.8))
    assert len(series.volume.hu) == 10


def test_contradicting_spacing_is_refused(root):
    rows = [lesion("000001_01_01", 100), lesion("000001_01_01", 101, Spacing_mm_px_="0.8, 0.7, 1")]
    write_table(root, rows)
    source = read_deeplesion(root)
    assert [refusal.reason for _, refusal in source.refused] == ["MIXED_SPACING", "MIXED_SPACING"]
    assert source.notes == ("1 series folders without a row in the table, so without spacing and split, not used",)


def broken(root: Path) -> Path:
    return root / "Images_png" / "000001_01_01" / "101.png"


def cut(root: Path) -> None:
    broken(root).write_bytes(broken(root).read_bytes()[:-40])


def flip(root: Path) -> None:
    data = bytearray(broken(root).read_bytes())
    data[-30] ^= 1  # in the last bytes of the pixels
    broken(root).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "BAD_IMAGE"),
        (flip, "BAD_IMAGE"),
        (lambda root: broken(root).write_bytes(b""), "BAD_IMAGE"),
        (lambda root: broken(root).write_text("no PNG"), "BAD_IMAGE"),
        (lambda root: Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(broken(root)), "BAD_IMAGE"),
        (lambda root: Image.new("RGB", (SIZE, SIZE)).save(broken(root)), "BAD_IMAGE"),
        (lambda root: Image.fromarray(stored(101)).save(broken(root), "TIFF"), "BAD_IMAGE"),
        (lambda root: Image.fromarray(stored(101, SIZE + 1)).save(broken(root)), "MIXED_SIZE"),
        (lambda root: Image.fromarray(np.zeros((1, 5000), np.uint16)).save(broken(root)), "TOO_LARGE"),
        (lambda root: broken(root).unlink(), "UNREADABLE"),
    ],
)
def test_broken_slices_are_refused(root, damage, reason):
    item = read_deeplesion(root).items[0]
    damage(root)
    with pytest.raises(Refusal) as caught:
        item.load()
    assert caught.value.reason == reason
    assert reason in REASONS
    assert "000001" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lesion("000001_01_01", 100, Train_Val_Test="4"), "line 2: no column, split or lesion type '4'"),
        (lesion("000001_01_01", 100, Bounding_boxes="1, 2, 3"), "line 2 cannot be parsed"),
        (lesion("000001_01_01", 100, File_name="a/../../etc_100.png"), "is not like"),
        (lesion("000001_01_01", 100, File_name="x"), "line 2 cannot be parsed"),
    ],
)
def test_broken_table_names_the_line(root, row, message):
    write_table(root, [row])
    with pytest.raises(DataError, match=message):
        read_deeplesion(root)


def test_wrong_or_missing_files_are_told(root):
    (root / "DL_info.csv").write_text("a,b\r\n1,2\r\n")
    with pytest.raises(DataError, match="'File_name'"):
        read_deeplesion(root)
    (root / "DL_info.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_deeplesion(root)
    with pytest.raises(DataError, match="No such file"):
        read_deeplesion(root, annotations=root / "none.csv")
    write_table(root, [lesion("000001_01_01", 100)], "DL_info_2.csv")
    with pytest.raises(DataError, match=r"one DL_info.*found: DL_info.csv, DL_info_2.csv"):
        read_deeplesion(root)
    with pytest.raises(DataError, match="no folder; name"):
        read_deeplesion(root, annotations=root / "DL_info_2.csv", images=root / "none")
    write_table(root, [lesion("000009_01_01", 100)], "DL_info_2.csv")
    with pytest.raises(DataError, match="no image of DL_info_2.csv"):
        read_deeplesion(root, annotations=root / "DL_info_2.csv")


def test_series_in_two_splits_is_refused(root):
    write_table(root, [lesion("000001_01_01", 100), lesion("000001_01_01", 121, Train_Val_Test="2")])
    with pytest.raises(DataError, match="train and val"):
        read_deeplesion(root)


def test_runs():
    assert consecutive_runs([]) == []
    assert consecutive_runs([5, 3, 4, 9, 11, 10]) == [range(3, 6), range(9, 12)]


def test_prepared(root, tmp_path):
    result = prepare(read_deeplesion(root), tmp_path / "out", id_key=b"k", runner="local")
    assert result.counts == {
        "train": {"patients": 1, "series": 2, "rows": 14, "boxes": 4},
        "test": {"patients": 1, "series": 1, "rows": 3, "boxes": 1},
    }
    shards = open_shards(tmp_path / "out")
    assert shards.entries[0].boxes_per_row == (None, None, 2, None, None, None, 1, None, None, None)
    assert shards.read_rows(shards.entries[0], 2, 3)[0]["z_index"] == 100
