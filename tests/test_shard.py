"""What is stored comes back as it was, and nothing altered comes back at all."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mp3d.data.batches import slice_truth
from mp3d.data.series import CTSeries, Picture, Truth, Volume
from mp3d.data.shard import (
    FORMAT_VERSION,
    MANIFEST,
    SCHEMA,
    Origin,
    PartWriter,
    Row,
    SeriesEntry,
    ShardSet,
    cached,
    count_rows,
    decode_image,
    decode_truth,
    entry_as_dict,
    hashed_id,
    open_shards,
    picture_rows,
    row_is_intact,
    series_rows,
    write_aside,
    write_manifest,
)
from mp3d.data.shard import manifest as manifest_module
from mp3d.data.shard import part_file as part_file_module
from mp3d.data.shard import rows as rows_module
from mp3d.errors import DataError

ORIGIN = Origin("made", "made/1", b"secret")
AFFINE = np.array([[0.7, 0, 0, -100], [0, 0.8, 0, -90], [0, 0, 2.5, 40], [0, 0, 0, 1.0]])


def make_series(name: str = "s", depth: int = 5, size: int = 16, truths: tuple[Truth, ...] | None = None) -> CTSeries:
    rng = np.random.default_rng(len(name) + depth)
    hu = rng.integers(-1024, 3072, (depth, size, size)).astype(np.int16)
    return CTSeries("p", "st", name, Volume(hu, AFFINE), truths or (Truth(),) * depth, first_index=100)


def write_set(folder: Path, *series: CTSeries) -> ShardSet:
    folder.mkdir(parents=True, exist_ok=True)
    with PartWriter(folder / "part-00000.parquet") as writer:
        for one in series:
            writer.append(series_rows(one, "train", ORIGIN), one.warnings)
    entries = [entry_as_dict(entry) for entry in writer.entries]
    write_manifest(folder, {"dataset": "made", "class_names": ["lesion"], "series": entries, "rejects": []})
    return open_shards(folder)


def read_all(shards: ShardSet) -> list[Row]:
    return [row for entry in shards.entries for row in shards.iter_rows(entry)]


def test_series_comes_back_as_it_was(tmp_path):
    boxes = np.array([[1, 2, 3, 4], [0, 0, 16, 16]], np.float32)
    mask = np.zeros((16, 16), np.uint8)
    mask[2:4, 1:3] = 7
    nothing = Truth(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    two = Truth(boxes, np.array([1, 3]), instances=np.array([7, 2]), types=("liver", None))
    two = replace(two, diameters_mm=np.array([1.5, np.nan], np.float32))
    truths = (Truth(), nothing, two, Truth(mask=mask), Truth(boxes[:1]))
    series = replace(make_series(truths=truths), warnings=("LOCALIZER_DROPPED",))
    shards = write_set(tmp_path, series)
    (entry,) = shards.entries
    rows = list(shards.iter_rows(entry))
    assert np.array_equal([decode_image(row) for row in rows], series.volume.hu)
    assert [row["z_index"] for row in rows] == [100, 101, 102, 103, 104]
    assert [row["z_mm"] for row in rows] == [0, 2.5, 5, 7.5, 10]
    assert rows[0]["spacing_mm"] == [2.5, 0.8, 0.7]
    assert np.array_equal(np.reshape(rows[0]["affine"], (4, 4)), AFFINE)
    assert {(row["patient"], row["study"], row["series"]) for row in rows} == {
        tuple(hashed_id(value, b"secret") for value in ("p", "st", "s"))
    }
    assert all(row_is_intact(row) for row in rows)
    assert entry.boxes_per_row == (None, 0, 2, None, 1)
    assert (entry.rows_with_boxes(), entry.rows_without_boxes()) == ([2, 4], [1])
    assert entry.warnings == ("LOCALIZER_DROPPED",)
    # absent truth is null, an empty list says that somebody looked
    back = [decode_truth(row) for row in rows]
    assert back[0].boxes is None
    assert back[0].labels is None
    assert back[1].boxes is not None
    assert back[1].boxes.shape == (0, 4)
    assert np.array_equal(np.array(back[2].boxes), boxes)
    assert np.array_equal(np.array(back[2].labels), [1, 3])
    assert np.array_equal(np.array(back[2].instances), [7, 2])
    assert (back[2].types, back[4].types) == (("liver", None), None)
    np.testing.assert_array_equal(np.array(back[2].diameters_mm), [1.5, np.nan])
    assert back[4].diameters_mm is None
    assert np.array_equal(np.array(back[3].mask), mask)
    assert back[3].boxes is None
    assert back[4].labels is None
    assert back[4].instances is None


def test_files_from_before_diameters_were_kept_are_read(tmp_path, monkeypatch):
    """As they were written: without the column, and with checksums that know nothing of it."""
    older = SCHEMA.remove(SCHEMA.get_field_index("diameters_mm"))
    with monkeypatch.context() as before:
        before.setattr(part_file_module, "SCHEMA", older)
        before.setattr(rows_module, "SCHEMA", older)
        truths = (Truth(np.array([[1, 2, 3, 4]], np.float32), np.array([1])), Truth())
        write_set(tmp_path / "shards", make_series(depth=2, truths=truths))
    assert "diameters_mm" not in pq.read_schema(tmp_path / "shards" / "part-00000.parquet").names
    shards = open_shards(tmp_path / "shards")
    with_cache = cached(shards, tmp_path / "cache", max_gb=1)
    for way in (shards, with_cache, with_cache):
        first, second = way.read_rows(shards.entries[0], 0, 2)
        assert np.array_equal(np.array(decode_truth(first).boxes), [[1, 2, 3, 4]])
        assert decode_truth(first).diameters_mm is decode_truth(second).diameters_mm is None
        assert slice_truth(first, shards.entries[0])[1].diameters_mm is None


def test_nobody_looked_at_all(tmp_path):
    assert write_set(tmp_path, make_series()).entries[0].boxes_per_row is None


def test_pictures_keep_their_jpeg(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 12), 200, np.uint8)).save(file, "JPEG")  # grey
    pictures = [Picture(f"train/a/{i}.jpg", file.getvalue(), 8, 12, image_label=i) for i in range(3)]
    with PartWriter(tmp_path / "part-00000.parquet") as writer:
        writer.append(picture_rows(pictures, "train", ORIGIN))
    entries = [entry_as_dict(entry) for entry in writer.entries]
    write_manifest(tmp_path, {"dataset": "made", "class_names": ["a"], "series": entries, "rejects": []})
    shards = open_shards(tmp_path)
    rows = shards.read_rows(shards.entries[0], 0, 3)
    assert [row["image"] for row in rows] == [file.getvalue()] * 3
    assert [row["image_label"] for row in rows] == [0, 1, 2]
    assert len({row["patient"] for row in rows}) == 3
    assert shards.entries[0].spacing_mm is None
    assert decode_image(rows[0]).shape == (3, 8, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.array([[1, 2, 1, 4]], np.float32)}, "x1 < x2"),
        ({"boxes": np.array([[1, 2, 17, 4]], np.float32)}, "x2 <= columns"),
        ({"boxes": np.array([[1, 2, np.nan, 4]], np.float32)}, "box"),
        ({"boxes": np.zeros((0, 5), np.float32)}, r"\(b, 4\)"),
        ({"boxes": np.array([[1, 2, 3, 4]], np.float32), "labels": np.array([0])}, "from 1 on"),
        ({"boxes": np.array([[1, 2, 3, 4]], np.float32), "labels": np.array([1, 1])}, "one label"),
        ({"boxes": np.array([[1, 2, 3, 4]], np.float32), "instances": np.array([0])}, "one instance from 1 on"),
        ({"instances": np.array([1])}, "one instance"),
        ({"boxes": np.array([[1, 2, 3, 4]], np.float32), "diameters_mm": np.zeros(1)}, "one above 0, or NaN, for each"),
        ({"diameters_mm": np.ones(1)}, "one above 0, or NaN, for each box"),
        ({"boxes": np.array([[1, 2, 3, 4]], np.float32), "types": ("lung", "lung")}, "one for each box"),
        ({"mask": np.zeros((15, 16), np.uint8)}, "mask"),
    ],
)
def test_truth_that_does_not_fit_is_not_stored(change, message):
    with pytest.raises(ValueError, match=message):
        series_rows(make_series(truths=(Truth(**change), *[Truth()] * 4)), "train", ORIGIN)


def test_pixels_that_are_not_int16_are_not_stored():
    series = make_series()
    wide = replace(series, volume=replace(series.volume, hu=series.volume.hu.astype(np.int32)))
    with pytest.raises(ValueError, match="int16"):
        series_rows(wide, "train", ORIGIN)


@pytest.mark.parametrize("signs", [(1, 1, -1), (-1, 1, 1), (-1, -1, -1), (1, 1, 0)])
def test_slices_that_do_not_ascend_along_the_normal_are_not_stored(signs):
    series = make_series()
    turned = replace(series, volume=replace(series.volume, affine=AFFINE @ np.diag([*signs, 1.0])))
    with pytest.raises(ValueError, match="above 0"):
        series_rows(turned, "train", ORIGIN)


def test_row_groups_hold_one_series_and_nine_slices_touch_two(tmp_path, monkeypatch):
    monkeypatch.setattr(part_file_module, "ROW_GROUP_BYTES", 1)  # the smallest row groups there are
    shards = write_set(tmp_path, make_series("a", 20), make_series("bb", 9), make_series("ccc", 30))
    parquet = pq.ParquetFile(tmp_path / "part-00000.parquet")
    for group in range(parquet.num_row_groups):
        assert len(set(parquet.read_row_group(group)["series"].to_pylist())) == 1
    assert [entry.first_row_group for entry in shards.entries] == [0, 3, 5]
    opened: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **more: opened.append(i) or read_row_group(self, i, **more)
    )
    for entry in shards.entries:
        for start in range(entry.num_rows - 8):
            part_file_module.read_row_group.cache_clear()
            opened.clear()
            rows = shards.read_rows(entry, start, start + 9)
            assert [row["z_index"] for row in rows] == list(range(100 + start, 109 + start))
            assert len(opened) <= 2


def test_slices_of_512_share_a_row_group_of_a_few_megabytes(tmp_path):
    hu = np.zeros((30, 512, 512), np.int16)
    shards = write_set(tmp_path, CTSeries("p", "st", "s", Volume(hu, AFFINE), (Truth(),) * 30))
    assert shards.entries[0].rows_per_group == 8


def test_same_rows_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_set(tmp_path / name, make_series("s", 20), make_series("t"))
    for file in ("part-00000.parquet", MANIFEST):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    shards = write_set(tmp_path, make_series("a", 9, size=8), make_series("bb", 9, size=8))
    path = tmp_path / "part-00000.parquet"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    step = 7  # of every seventh byte one bit, of the first and the last bytes all
    edges = [*range(8), *range(len(good) - 12, len(good))]
    places = [(i, 1 << int(rng.integers(8))) for i in range(0, len(good), step)]
    places += [(i, 1 << bit) for i in edges for bit in range(8)]
    for turn, (place, bit) in enumerate(places):
        bad = bytearray(good)
        bad[place] ^= bit
        path.write_bytes(bad)
        os.utime(path, ns=(turn, turn))
        with pytest.raises(DataError, match="not what was written"):
            read_all(shards)
    path.write_bytes(good)
    os.utime(path, ns=(10**9, 10**9))
    assert len(read_all(shards)) == 18


def test_other_readers_of_parquet_find_an_altered_row(tmp_path):
    write_set(tmp_path, make_series(truths=(Truth(np.array([[1, 2, 3, 4]], np.float32)), *[Truth()] * 4)))
    rows = pq.read_table(tmp_path / "part-00000.parquet").to_pylist()
    assert all(map(row_is_intact, rows))
    assert not row_is_intact(rows[0] | {"boxes": [1, 2, 3, 5]})
    assert not row_is_intact(rows[1] | {"boxes": []})
    assert not row_is_intact(rows[2] | {"image": bytes(len(rows[2]["image"]))})


def test_other_readers_of_parquet_find_a_flipped_bit_by_its_page(tmp_path):
    write_set(tmp_path, make_series("a", 9))
    path = tmp_path / "part-00000.parquet"
    good = path.read_bytes()
    group = pq.read_metadata(path).row_group(0)
    (image,) = (group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "image")
    middle = image.data_page_offset + image.total_compressed_size // 2
    assert pq.read_table(path, page_checksum_verification=True).num_rows == 9
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(path, page_checksum_verification=True)


def test_a_row_that_memory_or_decoder_altered_is_named(tmp_path, monkeypatch):
    shards = write_set(tmp_path, make_series("a", 9))
    read_row_group = manifest_module.read_row_group

    def altered(*place):
        rows = read_row_group(*place).to_pylist()
        rows[6]["image"] = bytes([rows[6]["image"][0] ^ 4]) + rows[6]["image"][1:]
        return pa.Table.from_pylist(rows, SCHEMA)

    monkeypatch.setattr(manifest_module, "read_row_group", altered)
    assert len(shards.read_rows(shards.entries[0], 0, 6)) == 6
    with pytest.raises(DataError, match=f"part-00000.parquet: row 6 of series {shards.entries[0].series} is not"):
        shards.read_rows(shards.entries[0], 2, 8)


def test_fewer_rows_than_the_index_says_are_no_series(tmp_path):
    shards = write_set(tmp_path, make_series("a", 7))
    with pytest.raises(DataError, match="rows of a series are missing"):
        shards.read_rows(replace(shards.entries[0], num_rows=8), 0, 8)


def test_missing_cut_or_exchanged_part_is_found(tmp_path):
    shards = write_set(tmp_path / "a", make_series("a"))
    write_set(tmp_path / "b", make_series("b"))
    path = tmp_path / "a" / "part-00000.parquet"
    shutil.copy(tmp_path / "b" / "part-00000.parquet", path)
    with pytest.raises(DataError, match="not what was written"):
        shards.read_rows(shards.entries[0], 0, 1)
    for content in (path.read_bytes()[:-100], b"PAR1", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not what was written"):
            shards.read_rows(shards.entries[0], 0, 1)
    with pytest.raises(DataError, match="delete it"):
        count_rows(path)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        shards.read_rows(shards.entries[0], 0, 1)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    shards = write_set(tmp_path, make_series("s"))
    shards.read_rows(shards.entries[0], 0, 5)
    other = write_set(tmp_path, make_series("longer", 7))
    assert len(other.read_rows(other.entries[0], 0, 7)) == 7


def test_altered_manifest_is_refused(tmp_path):
    write_set(tmp_path, make_series())
    path = tmp_path / MANIFEST
    content = json.loads(path.read_text())
    content["series"][0]["split"] = "test"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="altered"):
        open_shards(tmp_path)
    for broken in ("{", "[]", "\udcff"):
        path.write_bytes(broken.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match="prepare"):
            open_shards(tmp_path)


def test_other_format_version_and_missing_manifest_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"no manifest.json.*jobs/prepare.py"):
        open_shards(tmp_path)
    write_set(tmp_path, make_series())
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'))
    with pytest.raises(DataError, match="format version 99.*prepare it again"):
        open_shards(tmp_path)


def test_missing_split_names_those_that_are_there(tmp_path):
    shards = write_set(tmp_path, make_series())
    with pytest.raises(DataError, match="'val', only in: train"):
        shards.split("val")


def test_rows_beyond_the_series_are_a_defect_of_the_caller(tmp_path):
    shards = write_set(tmp_path, make_series())
    with pytest.raises(IndexError):
        shards.read_rows(shards.entries[0], 3, 6)


def test_failed_or_empty_writer_leaves_nothing(tmp_path):
    with PartWriter(tmp_path / "part-00000.parquet") as writer:
        pass
    assert (writer.file, list(tmp_path.iterdir())) == (None, [])
    with pytest.raises(ValueError, match="without rows"), PartWriter(tmp_path / "part-00000.parquet") as writer:
        writer.append([])
    assert list(tmp_path.iterdir()) == []


def test_files_are_private_from_the_first_moment(tmp_path):
    write_aside(tmp_path / "secret", "x", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_index_entries_are_hashable_and_plain():
    entry = SeriesEntry("s", "p", "train", "f", 0, 8, 20, (1.0, 1.0, 1.0), None)
    assert entry.num_groups == 3
    assert json.loads(json.dumps(entry_as_dict(entry)))["num_rows"] == 20
    assert len({entry, entry}) == 1


def test_hashes_depend_on_the_key():
    assert hashed_id("p", b"a") != hashed_id("p", b"b")
    assert len(hashed_id("p", b"a")) == 16
