"""The data passport: its numbers by hand, planted leaks, damaged files, and a page that needs nothing beside it."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from mp3d.data.intensity import Intensities, sample_intensities
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.shard import (
    Origin,
    PartWriter,
    Reject,
    entry_as_dict,
    hashed_id,
    open_shards,
    series_rows,
    write_manifest,
)
from mp3d.data.survey import read_boxes
from mp3d.errors import DataError
from mp3d.models.anchor_fit import PUBLISHED, centred_iou, coverage
from mp3d.report import Passport, write_passport
from mp3d.report.passport import FITTED
from tests.test_report import Outline, table_rows
from tests.tiny import ct_shards, picture_shards

KEY = b"passport" * 4


def made_series(
    name: str, boxes: Sequence[tuple[float, float, float, float]] = (), *, fill: int = 0, spacing_mm: float = 2.0
) -> CTSeries:
    """Four slices of 40 rows and 50 columns of one value but for one bright column; slice 1 has the boxes, 2 has none,
    of 0 and 3 nothing is known.
    """
    hu = np.full((4, 40, 50), fill, np.int16)
    hu[:, :, 0] = 1000
    box = np.array(boxes, np.float32).reshape(-1, 4)
    truths = (Truth(), Truth(box, np.arange(len(box)) % 2 + 1), Truth(np.zeros((0, 4), np.float32)), Truth())
    return CTSeries(f"patient {name}", f"study {name}", f"series {name}", Volume(hu, affine_of(spacing_mm)), truths)


def affine_of(spacing_mm: float) -> np.ndarray:
    return np.diag([0.5, 0.8, spacing_mm, 1.0])


def made_shards(out: Path, series: Sequence[tuple[CTSeries, str]], *, key: bytes = KEY, **changes: object) -> Path:
    """A data set with whatever splits, which ``prepare`` would refuse to write; one file for all."""
    out.mkdir(parents=True)
    with PartWriter(out / "part-00000.parquet") as writer:
        for each, split in series:
            writer.append(series_rows(each, split, Origin("made", "tiny/1", key)), each.warnings)
    assert writer.file
    content = {
        "dataset": "made",
        "reader": "tiny/1",
        "reader_options": {"keep": True},
        "class_names": ["nodule", "mass"],
        "num_items": len(series),
        "notes": ["3 things were not used"],
        "id_key": hashed_id("which key", key),
        "files": [asdict(writer.file)],
        "series": [entry_as_dict(entry) for entry in writer.entries],
        "rejects": [asdict(Reject("ab" * 8, "NOT_CT", "1 files of another modality"))],
    }
    write_manifest(out, {name: value for name, value in (content | changes).items() if value is not None})
    return out


def three_patients(out: Path, **changes) -> Path:
    return made_shards(
        out,
        [
            (made_series("a", [(0, 0, 10, 20), (10, 10, 40, 20)], fill=-100), "train"),
            (replace(made_series("b", fill=50, spacing_mm=4), patient="patient a"), "train"),
            (made_series("c", [(5, 5, 15, 15)], fill=7), "val"),
        ],
        **changes,
    )


def numbers(passport: Passport) -> dict:
    return json.loads(passport.json.read_text())


@pytest.fixture(scope="module")
def passport(tmp_path_factory: pytest.TempPathFactory) -> Passport:
    return write_passport(three_patients(tmp_path_factory.mktemp("passport") / "shards"))


@pytest.fixture(scope="module")
def page(passport: Passport) -> str:
    return passport.html.read_text(encoding="utf-8")


def test_counts_of_each_split(passport: Passport):
    splits = numbers(passport)["splits"]
    assert splits["train"] == {
        "patients": 1, "studies": 2, "series": 2, "rows": 8, "searched_rows": 4, "key_rows": 1, "boxes": 2,
        "instances": 0, "boxes_per_class": {"nodule": 1, "mass": 1}, "images_per_class": {},
    }  # fmt: skip
    assert (splits["val"]["patients"], splits["val"]["boxes_per_class"]) == (1, {"nodule": 1, "mass": 0})
    assert list(splits) == ["train", "val"]


def test_boxes_of_one_object_are_told(tmp_path: Path):
    series = made_series("a", [(0, 0, 10, 20), (10, 10, 40, 20)])
    box = np.array([[1, 1, 9, 9]], np.float32)
    truths = (
        replace(series.truths[1], instances=np.array([4, 7])),
        Truth(box, np.ones(1, np.int64), instances=np.array([4])),
        *series.truths[2:],
    )
    shards = made_shards(tmp_path / "s", [(replace(series, truths=truths), "train"), (made_series("b"), "val")])
    passport = write_passport(shards)
    counts = numbers(passport)["splits"]
    assert (counts["train"]["boxes"], counts["train"]["instances"], counts["val"]["instances"]) == (3, 2, 0)
    assert ["train", "1", "1", "1", "4", "3", "2", "3", "2"] in table_rows(passport.html.read_text())


def test_spacing_and_size(passport: Passport):
    train = numbers(passport)["geometry"]["train"]
    assert train["image_sizes"] == [{"rows": 40, "columns": 50, "count": 2}]
    spacing = train["slice_spacing_mm"]
    assert (spacing["count"], spacing["min"], spacing["p50"], spacing["mean"], spacing["max"]) == (2, 2, 3, 3, 4)
    assert (train["row_spacing_mm"]["p50"], train["column_spacing_mm"]["p50"]) == (0.8, 0.5)
    assert (train["height_mm"]["min"], train["height_mm"]["max"]) == (8, 16)
    assert train["slices_per_series"]["p50"] == 4


def test_hounsfield_units(passport: Passport):
    """Of the pixels of train 49 % are -100, 49 % are 50 and 2 % are 1000."""
    train = numbers(passport)["intensities"]["train"]
    assert (train["unit"], train["sampled_rows"], train["min"], train["max"]) == ("HU", 8, -100, 1000)
    assert (train["p1"], train["p25"], train["p50"], train["p95"], train["p99"]) == (-100, -100, 50, 50, 1000)
    mean = 0.49 * -100 + 0.49 * 50 + 0.02 * 1000
    assert train["mean"] == pytest.approx(mean)
    variance = 0.49 * (-100 - mean) ** 2 + 0.49 * (50 - mean) ** 2 + 0.02 * (1000 - mean) ** 2
    assert train["std"] == pytest.approx(variance**0.5, abs=1e-5)


def test_percentiles_are_values_that_occur():
    of = Intensities("HU", 1, -3, np.array([1, 0, 0, 2, 1]))
    assert [of.percentile(percent) for percent in (0, 1, 25, 26, 75, 76, 100)] == [-3, -3, -3, 0, 0, 1, 1]


def test_sampled_rows_are_spread_over_the_split(tmp_path: Path):
    series = [(made_series(str(value), fill=value), "train") for value in range(5)]
    found = sample_intensities(open_shards(made_shards(tmp_path / "s", series)), "train", at_most=3)
    assert found.num_rows == 3
    assert set(found.values[found.counts > 0]) == {0, 2, 4, 1000}, "the first, the middle and the last row"


def test_boxes_in_pixels_and_millimetres(passport: Passport):
    train = numbers(passport)["boxes"]["train"]
    roots = [200**0.5, 300**0.5]
    assert (train["size_px"]["min"], train["size_px"]["max"]) == pytest.approx(roots, abs=1e-5)
    assert train["size_px"]["mean"] == pytest.approx(sum(roots) / 2, abs=1e-5)
    scale = (0.5 * 0.8) ** 0.5
    assert (train["size_mm"]["min"], train["size_mm"]["max"]) == pytest.approx([scale * r for r in roots], abs=1e-5)
    ratio = train["height_over_width"]
    assert (ratio["count"], ratio["min"], ratio["max"]) == (2, pytest.approx(1 / 3, abs=1e-5), 2)


def test_anchors_at_512_pixels(passport: Passport):
    anchors = numbers(passport)["anchors"]
    assert (anchors["image_size_px"], anchors["shown_split"]) == (512, "val")
    by_name = {each["name"]: each for each in anchors["sets"]}
    assert list(by_name) == [*PUBLISHED, FITTED]
    columns, rows = 512 / 50, 410 / 40  # the shorter side is rounded to whole pixels
    boxes = np.array([[10 * columns, 20 * rows], [30 * columns, 10 * rows]])
    expected = coverage(centred_iou(boxes, PUBLISHED["MP3D"]))
    assert by_name["MP3D"]["splits"]["train"]["boxes"] == 2
    assert by_name["MP3D"]["splits"]["train"]["centred"] == pytest.approx(asdict(expected), abs=1e-6)
    assert set(by_name[FITTED]["splits"]) == {"train", "val"}
    assert [len(level) for level in by_name[FITTED]["sizes_px"]] == [2] * 5


def test_what_the_manifest_says_stands_there(passport: Passport):
    content = numbers(passport)
    shards = open_shards(passport.json.parent)
    assert content["digests"]["manifest"] == shards.digest
    assert [file["sha256"] for file in content["digests"]["files"]] == [
        json.loads((shards.folder / "manifest.json").read_text())["files"][0]["sha256"]
    ]
    assert content["data_set"]["reader_options"] == {"keep": True}
    assert content["rejects"]["by_reason"] == {"NOT_CT": 1}
    assert content["rejects"]["list"][0]["source"] == "ab" * 8


def test_the_same_shards_have_the_same_passport(passport: Passport, tmp_path: Path):
    again = write_passport(three_patients(tmp_path / "again"))
    assert again.json.read_bytes() == passport.json.read_bytes()
    assert again.html.read_bytes() == passport.html.read_bytes()


def test_the_files_are_for_their_owner(passport: Passport):
    assert {file.stat().st_mode & 0o777 for file in (passport.json, passport.html)} == {0o600}
    assert not list(passport.json.parent.glob(".*.aside"))


class TestPage:
    def test_needs_nothing_beside_itself(self, page: str):
        outline = Outline(page)  # every tag is closed
        assert all(image["src"].startswith("data:image/png;base64,") for image in outline.all("img"))
        assert all(image["alt"] for image in outline.all("img"))
        assert len(outline.all("img")) == 4
        assert {name for name, _ in outline.elements} & {"script", "link", "iframe", "object", "form", "a"} == set()
        assert not re.search(r"https?://|url\(|@import|\bon\w+=", page)

    def test_says_what_the_numbers_say(self, page: str):
        text = " ".join(Outline(page).text.split())
        assert "2 patients 3 CT series 12 slices 3 boxes on 2 key slices 1 files or series refused" in text
        assert "No leak was found. Nothing is in two splits of this data set." in text
        rows = table_rows(page)
        assert ["train", "1", "2", "2", "8", "4", "1", "2"] in rows
        assert ["mass", "1", "0"] in rows
        assert any(row[:2] == ["NOT_CT", "1"] and "Another modality" in row[2] for row in rows)
        assert "3 things were not used" in text
        assert ["reader option keep", "True"] in rows

    def test_escapes_what_comes_from_outside(self, tmp_path: Path):
        shards = three_patients(tmp_path / "s", dataset="<b>made</b>", class_names=["<i>one</i>", "two"])
        page = write_passport(shards).html.read_text(encoding="utf-8")
        assert "<b>made" not in page
        assert "<i>one" not in page
        assert "<i>one</i>" in Outline(page).text

    def test_legends_have_a_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Matplotlib's search for the best one is slow on many values, and warns of it."""

        def search(*_: object) -> None:
            raise AssertionError("a legend without a place")

        monkeypatch.setattr(Legend, "_find_best_position", search)
        write_passport(three_patients(tmp_path / "s"))

    def test_no_legend_covers_a_panel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        drawn: list[Figure] = []
        monkeypatch.setattr("mp3d.report.passport_figures.png_bytes", lambda figure: drawn.append(figure) or b"")
        write_passport(three_patients(tmp_path / "s"))
        histograms = [figure for figure in drawn if figure.legends]
        assert len(histograms) == 3  # the fourth figure has curves, all of which begin at the top
        for figure in histograms:
            figure.draw_without_rendering()
            (legend,) = figure.legends
            assert [text.get_text() for text in legend.get_texts()] == ["train", "val"]
            assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
            assert all(axes.get_legend() is None for axes in figure.axes)

    def test_of_pictures(self, tmp_path: Path):
        passport = write_passport(picture_shards(tmp_path / "pictures"))
        page = passport.html.read_text(encoding="utf-8")
        text = " ".join(Outline(page).text.split())
        assert "32 pictures 2 classes 0 boxes on 0 pictures 0 files or series refused" in text
        assert ["dark", "12", "4"] in table_rows(page)
        assert "There are none." in text
        content = numbers(passport)
        assert content["splits"]["train"]["images_per_class"] == {"dark": 12, "bright": 12}
        assert content["intensities"]["train"]["unit"] == "grey"
        assert content["anchors"] is None

    def test_without_training_boxes_nothing_is_fitted(self, tmp_path: Path):
        series = [(made_series("a"), "train"), (made_series("b", [(5, 5, 15, 15)]), "test")]
        anchors = numbers(write_passport(made_shards(tmp_path / "s", series)))["anchors"]
        assert [each["name"] for each in anchors["sets"]] == list(PUBLISHED)
        assert anchors["shown_split"] == "test"

    def test_warns_of_a_fit_that_does_not_carry_over(self, tmp_path: Path):
        series = [
            (made_series("a", [(0, 0, 40, 40), (0, 0, 32, 32)]), "train"),
            (made_series("b", [(0, 0, 1.5, 1.5)]), "val"),
        ]
        passport = write_passport(made_shards(tmp_path / "s", series))
        assert numbers(passport)["anchors"]["fitted_is_worse_on"] == ["val"]
        assert "On val the fitted anchors are worse" in passport.html.read_text()


def test_prepared_shards_tell_their_key_and_share_nothing(tmp_path: Path):
    mine, pictures = ct_shards(tmp_path / "ct"), picture_shards(tmp_path / "pictures")
    passport = write_passport(mine, [pictures])
    assert (passport.leaks, passport.not_compared) == ((), ())
    assert numbers(passport)["digests"]["id_key"] == json.loads((mine / "plan.json").read_text())["id_key"]


@pytest.mark.parametrize("place", [0.3, 0.999])
def test_one_flipped_bit_is_found_and_no_passport_written(tmp_path: Path, place: float):
    part = three_patients(tmp_path / "s") / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[int(place * len(content))] ^= 1
    part.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000\.parquet is not what was written"):
        write_passport(tmp_path / "s")
    assert not list((tmp_path / "s").glob("passport.*"))


def test_a_damaged_page_of_boxes_is_found_by_who_reads_nothing_else(tmp_path: Path):
    shards = open_shards(three_patients(tmp_path / "s"))
    part = shards.folder / "part-00000.parquet"
    group = pq.read_metadata(part).row_group(0)
    columns = {group.column(number).path_in_schema: group.column(number) for number in range(group.num_columns)}
    content = bytearray(part.read_bytes())
    last = columns["boxes.list.element"]
    content[last.data_page_offset + last.total_compressed_size - 1] ^= 1
    part.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000\.parquet: .*run jobs/prepare\.py again"):
        read_boxes(shards, "train")
    assert len(read_boxes(shards, "val")) == 1


def test_a_missing_file_and_a_folder_without_shards(tmp_path: Path):
    (three_patients(tmp_path / "s") / "part-00000.parquet").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        write_passport(tmp_path / "s")
    with pytest.raises(DataError, match="no prepared data set"):
        write_passport(tmp_path)
