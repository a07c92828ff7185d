"""What the data passport finds in two splits: patients, series, images, under whatever name."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.leaks import shared_within, traces
from mp3d.data.series import Truth, Volume
from mp3d.data.shard import (
    Origin,
    PartWriter,
    entry_as_dict,
    hashed_id,
    open_shards,
    picture_rows,
    write_manifest,
)
from mp3d.data.survey import survey
from mp3d.report import write_passport
from tests.test_passport import KEY, affine_of, made_series, made_shards, numbers
from tests.test_report import Outline
from tests.tiny import picture_batch


class TestLeaks:
    def test_a_patient_in_two_splits(self, tmp_path: Path):
        other_scan = replace(made_series("z", fill=9), patient="patient a")
        shards = made_shards(tmp_path / "s", [(made_series("a"), "train"), (other_scan, "test")])
        passport = write_passport(shards)
        assert passport.leaks == ("patients of train that are also in test: 1",)
        within = numbers(passport)["leaks"]["within"]
        assert [(each["kind"], each["ids"]) for each in within] == [("patients", [hashed_id("patient a", KEY)])]
        text = " ".join(Outline(passport.html.read_text()).text.split())
        assert f"There is a leak. patients of train that are also in test: 1 ({hashed_id('patient a', KEY)})" in text

    def test_a_scan_under_two_names(self, tmp_path: Path):
        shards = made_shards(tmp_path / "s", [(made_series("a", fill=3), "val"), (made_series("b", fill=3), "test")])
        passport = write_passport(shards)
        assert passport.leaks == ("images of val that are also in test: 1",)
        assert numbers(passport)["leaks"]["within"][0]["ids"] == [hashed_id("series a", KEY)]

    @pytest.mark.parametrize(
        "changed",
        [
            lambda hu: hu[::-1],  # as after the repair of a header that said another orientation
            lambda hu: hu[:, ::-1, ::-1],
            lambda hu: hu.transpose(0, 2, 1),
            lambda hu: hu[3:],  # fewer slices were published
            lambda hu: np.concatenate([hu[2:], np.full((6, *hu.shape[1:]), -1024, np.int16)]),
        ],
    )
    def test_a_scan_under_two_names_that_was_turned_or_cut(self, tmp_path: Path, changed):
        hu = np.random.default_rng(0).normal(40, 60, (10, 40, 50)).astype(np.int16)
        scans = [
            (replace(made_series(name), volume=Volume(stack, affine_of(2)), truths=(Truth(),) * len(stack)), split)
            for name, stack, split in [
                ("a", hu, "val"),
                ("b", np.ascontiguousarray(changed(hu)), "test"),
                ("c", hu + np.int16(1), "train"),
            ]
        ]
        passport = write_passport(made_shards(tmp_path / "s", scans))
        assert passport.leaks == ("images of val that are also in test: 1",)
        assert numbers(passport)["leaks"]["within"][0]["ids"] == [hashed_id("series a", KEY)]

    def test_scans_that_show_nothing_are_not_the_same(self, tmp_path: Path):
        empty = [
            replace(made_series(name), volume=Volume(np.zeros((4, 40, 50), np.int16), affine_of(2))) for name in "ab"
        ]
        passport = write_passport(made_shards(tmp_path / "s", [(empty[0], "val"), (empty[1], "test")]))
        assert passport.leaks == ()

    def test_between_data_sets(self, tmp_path: Path):
        mine = made_shards(tmp_path / "mine", [(made_series("a", fill=1), "train"), (made_series("b", fill=2), "test")])
        theirs = [(made_series("a", fill=5), "train"), (replace(made_series("b", fill=6), series="other"), "train")]
        passport = write_passport(mine, [made_shards(tmp_path / "theirs", theirs)])
        digest = open_shards(tmp_path / "theirs").digest[:8]
        assert passport.leaks == (
            f"patients of test that are also in train of made {digest}: 1",
            f"studies of test that are also in train of made {digest}: 1",
        )
        (between,) = numbers(passport)["leaks"]["between"]
        assert between["same_key"]
        found = {(each["kind"], each["split"], each["other_split"]): each["is_leak"] for each in between["shared"]}
        assert found == {
            ("patients", "train", "train"): False, ("patients", "test", "train"): True,
            ("studies", "train", "train"): False, ("studies", "test", "train"): True,
            ("series", "train", "train"): False,
        }  # fmt: skip
        assert "(the same split: no leak)" in passport.html.read_text()

    def test_with_another_id_key_only_images_are_compared(self, tmp_path: Path):
        mine = made_shards(tmp_path / "mine", [(made_series("a", fill=1), "test"), (made_series("b", fill=2), "val")])
        others = [(made_series("a", fill=1), "train"), (made_series("b", fill=3), "train")]
        passport = write_passport(mine, [made_shards(tmp_path / "theirs", others, key=b"other" * 8)])
        assert [line.split(" of ")[0] for line in passport.leaks] == ["images"]
        assert passport.not_compared == ("made: prepared with another id key",)
        assert "Patients and series cannot be compared: prepared with another id key." in passport.html.read_text()

    def test_a_manifest_that_does_not_say_which_key(self, tmp_path: Path):
        mine = made_shards(tmp_path / "mine", [(made_series("a"), "test")])
        passport = write_passport(mine, [made_shards(tmp_path / "old", [(made_series("b"), "train")], id_key=None)])
        assert passport.not_compared == ("made: a manifest without the id key's print",)

    def test_pictures_are_told_by_their_content(self, tmp_path: Path):
        pictures = picture_batch("train", 4).pictures
        out = tmp_path / "pictures"
        out.mkdir()
        origin = Origin("shades", "tiny/1", KEY)
        with PartWriter(out / "part-00000.parquet") as writer:
            writer.append(picture_rows(pictures[:3], "train", origin))
            writer.append(picture_rows([replace(pictures[1], name="renamed"), pictures[3]], "val", origin))
        assert writer.file
        write_manifest(
            out,
            {
                "dataset": "shades", "class_names": ["dark", "bright"], "rejects": [], "files": [asdict(writer.file)],
                "series": [entry_as_dict(entry) for entry in writer.entries],
            },
        )  # fmt: skip
        shards = open_shards(out)
        (found,) = shared_within(traces(shards, survey(shards)))
        assert (found.kind, found.split, found.other_split) == ("images", "train", "val")
        assert found.ids == (hashed_id(pictures[1].name, KEY),)
