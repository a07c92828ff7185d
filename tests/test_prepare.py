"""Listed items to shards: what is refused, what is repeated, what stays the same."""

import fcntl
import json
import stat
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.plan import claim
from mp3d.data.prepare import PrepareResult, prepare
from mp3d.data.reasons import REASONS
from mp3d.data.series import CTSeries, Picture, Truth
from mp3d.data.shard import MANIFEST, decode_image, open_shards
from mp3d.data.source import Item, PictureBatch, Source
from mp3d.errors import ConfigError, DataError, Refusal
from tests.tiny import blob_series

KEY = b"k" * 32


def make_source(patients: int = 6, **changes) -> Source:
    items = tuple(Item(f"folder {i}", f"patient {i}", None, partial(blob_series, i)) for i in range(patients))
    return replace(Source("blobs", "tiny/1", ("lesion",), items), **changes)


def run(source: Source, out: Path, **options) -> PrepareResult:
    return prepare(source, out, **{"id_key": KEY, "runner": "local", **options})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refuse() -> CTSeries:
    raise Refusal("GANTRY_TILT", "tilted by 18.5 degrees; correct it")


def fail(secret: str) -> CTSeries:
    raise KeyError(secret)


def with_bad_box() -> CTSeries:
    series = blob_series(0)
    return replace(series, truths=(Truth(np.array([[0, 0, 99, 99]], np.float32)), *series.truths[1:]))


def broken_source() -> Source:
    bad = (
        Item("Smith/a", "Smith", None, refuse),
        Item("Smith/b", "Smith", None, partial(fail, "Smith^John")),
        Item("Smith/c", "Smith", None, with_bad_box),
    )
    source = make_source()
    return replace(
        source, items=(*bad, *source.items), refused=(("Smith/d.dcm", Refusal("NOT_DICOM", "no DICOM; take it out")),)
    )


def test_shards_hold_what_was_listed(tmp_path):
    result = run(make_source(10), tmp_path / "out", items_per_part=4)
    shards = open_shards(tmp_path / "out")
    assert (shards.dataset, shards.class_names) == ("blobs", ("lesion",))
    assert {entry.file for entry in shards.entries} == {f"part-0000{i}.parquet" for i in range(3)}
    for index, entry in enumerate(shards.entries):
        series = blob_series(index)
        rows = list(shards.iter_rows(entry))
        assert np.array_equal([decode_image(row) for row in rows], series.volume.hu)
        assert {row["split"] for row in rows} == {entry.split}
    assert {split: counts["patients"] for split, counts in result.counts.items()} == {"train": 7, "val": 2, "test": 1}
    assert result.counts["train"] == {"patients": 7, "series": 7, "rows": 77, "boxes": 21}
    assert (result.rejects, result.private, result.already_prepared) == ((), None, False)
    assert not (tmp_path / "out-private").exists()


def test_what_cannot_be_used_is_refused_by_name_outside_the_shards(tmp_path):
    result = run(broken_source(), tmp_path / "out", items_per_part=2)
    by_key = dict(result.rejects)
    assert list(by_key) == ["Smith/d.dcm", "Smith/a", "Smith/b", "Smith/c"]
    assert {reject.reason for reject in by_key.values()} == {"NOT_DICOM", "GANTRY_TILT", "READER_FAILED"}
    assert all(reject.reason in REASONS for reject in by_key.values())
    assert by_key["Smith/b"].detail.startswith("KeyError in fail (test_prepare.py line")
    assert by_key["Smith/c"].detail.startswith("ValueError in _check_boxes (rows.py line")
    assert len(open_shards(tmp_path / "out").rejects) == 4
    # names only where they may be
    assert all(b"Smith" not in data and b"folder" not in data for data in content(tmp_path / "out").values())
    private = tmp_path / "out-private" / "sources.json"
    assert result.private == private
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    names = json.loads(private.read_text())
    assert names == {reject.source: key for key, reject in result.rejects}
    # part 0 held nothing but bad items, part 1 a bad and a good one
    files = [entry["name"] for entry in json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]]
    assert files[0] == "part-00001.parquet"
    assert not (tmp_path / "out" / "part-00000.parquet").exists()


def test_one_broken_picture_loses_no_other(tmp_path):
    good = tuple(Picture(f"{i}.jpg", b"jpeg", 4, 4, image_label=0) for i in range(3))
    batch = PictureBatch(good, (("broken.jpg", Refusal("BAD_IMAGE", "no JPEG; copy it again")),))
    item = Item("batch", "batch", "train", lambda: batch, (*(picture.name for picture in good), "broken.jpg"))
    result = run(Source("shades", "tiny/1", ("grey",), (item,)), tmp_path / "out")
    assert [(key, reject.reason) for key, reject in result.rejects] == [("broken.jpg", "BAD_IMAGE")]
    assert result.counts["train"] == {"patients": 3, "series": 3, "rows": 3, "boxes": 0}


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    source = replace(make_source(0), items=(Item("Smith", "Smith", None, refuse),))
    said = r"all 1 were refused \(GANTRY_TILT 1\); the first is [0-9a-f]{16}: GANTRY_TILT.*sources.json"
    with pytest.raises(DataError, match=said):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert "Smith" in (tmp_path / "out-private" / "sources.json").read_text()
    with pytest.raises(DataError, match="found nothing"):
        run(make_source(0), tmp_path / "other")


def test_same_bytes_twice_and_wherever_they_lie(tmp_path):
    for name in ("a", "b/c"):
        run(broken_source(), tmp_path / name, items_per_part=2)
    assert content(tmp_path / "a") == content(tmp_path / "b" / "c")


def test_finished_folder_is_only_checked(tmp_path, monkeypatch):
    first = run(broken_source(), tmp_path / "out")
    before = content(tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("mp3d.data.part.prepare_part", lambda part: pytest.fail("done again"))
    again = run(broken_source(), tmp_path / "out")
    assert again == replace(first, already_prepared=True)
    assert content(tmp_path / "out") == before
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def sometimes(flag: Path) -> CTSeries:
    if not flag.exists():
        raise PermissionError(flag)
    return blob_series(99)


def test_rejects_are_retried_on_demand(tmp_path):
    source = make_source()
    source = replace(source, items=(*source.items, Item("x", "x", "train", partial(sometimes, tmp_path / "flag"))))
    assert [reject.reason for _, reject in run(source, tmp_path / "out").rejects] == ["READER_FAILED"]
    (tmp_path / "flag").touch()
    assert run(source, tmp_path / "out").already_prepared
    result = run(source, tmp_path / "out", retry_rejects=True)
    assert (result.rejects, result.private) == ((), None)
    assert len(open_shards(tmp_path / "out").entries) == 7
    assert not (tmp_path / "out-private" / "sources.json").exists()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"split_seed": 1}, "split_seed 0 there, 1 now. Choose"),
        ({}, {"items_per_part": 2}, "items_per_part 1 there, 2 now"),
        ({}, {"split_fractions": (0.6, 0.2, 0.2)}, "split_fractions"),
        ({}, {"id_key": b"other"}, "plan: another id key. Choose"),
        ({"reader": "tiny/2"}, {}, "reader tiny/1 there, tiny/2 now"),
        ({"options": {"roi": "gtv"}}, {}, "roi None there, gtv now"),
        ({"class_names": ("nodule",)}, {}, "class_names"),
        ({"items": make_source(5).items}, {}, "num_items 6 there, 5 now"),
        ({"items": tuple(replace(item, split="test") for item in make_source().items)}, {}, "other files, patients or"),
        ({"refused": (("x", Refusal("NOT_CT", "MR")),)}, {}, "other files"),
    ],
)
def test_another_plan_in_the_same_folder_is_refused(tmp_path, changes, options, message):
    run(make_source(), tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        run(make_source(**changes), tmp_path / "out", **options)
    assert content(tmp_path / "out") == before


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds thesis.txt, but no plan.json"):
        run(make_source(), tmp_path)
    with pytest.raises(ConfigError, match="cannot be made"):
        run(make_source(), tmp_path / "thesis.txt" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_plan_is_refused(tmp_path):
    run(make_source(2), tmp_path / "out")
    for text in ("", "{}", "[]"):
        (tmp_path / "out" / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match="damaged"):
            run(make_source(2), tmp_path / "out")


def test_two_runs_do_not_share_a_folder(tmp_path):
    run(make_source(2), tmp_path / "out")
    with (tmp_path / "out" / "plan.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run"):
            run(make_source(2), tmp_path / "out")
    assert run(make_source(2), tmp_path / "out").already_prepared


def test_of_runs_that_begin_at_once_one_gets_the_folder(tmp_path):
    for turn in range(20):
        start, got = threading.Barrier(6), []

        def begin(out: Path, start: threading.Barrier = start, got: list = got) -> None:
            start.wait()
            try:
                got.append(claim(out, {"dataset": "blobs"}))
            except ConfigError as error:
                got.append(str(error))

        threads = [threading.Thread(target=begin, args=(tmp_path / str(turn),)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (mine,) = [file for file in got if not isinstance(file, str)]
        assert ["another run" in told for told in got if told != mine] == [True] * 5
        mine.close()
        assert list(content(tmp_path / str(turn))) == ["plan.json"]


def test_patient_that_the_reader_takes_for_two_is_found(tmp_path):
    items = tuple(Item(f"{split}", f"{split}", split, partial(blob_series, 1)) for split in ("train", "test"))
    with pytest.raises(DataError, match="one patient as two"):
        run(make_source(items=items), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_keys_must_be_unique(tmp_path):
    items = make_source(1).items * 2
    with pytest.raises(DataError, match="2 times"):
        run(make_source(items=items), tmp_path / "out")


def test_empty_parts_are_no_option(tmp_path):
    with pytest.raises(ConfigError, match="at least one"):
        run(make_source(), tmp_path / "out", items_per_part=0)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_time_limits_that_are_none(tmp_path, seconds):
    with pytest.raises(ConfigError, match="item_timeout_s is"):
        run(make_source(), tmp_path / "out", item_timeout_s=seconds)


def test_warnings_are_counted(tmp_path):
    def warned() -> CTSeries:
        return replace(blob_series(3), warnings=("LOCALIZER_DROPPED",))

    result = run(make_source(items=(Item("a", "a", None, warned),)), tmp_path / "out")
    assert result.warnings == {"LOCALIZER_DROPPED": 1}
    assert open_shards(tmp_path / "out").entries[0].warnings == ("LOCALIZER_DROPPED",)
