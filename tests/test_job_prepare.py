"""The prepare command: its help, its plan, its exit codes."""

import json
import re
import sys

import pytest

from jobs import prepare as job
from mp3d import cli
from mp3d.data import READERS
from mp3d.data.splits import assign_splits
from mp3d.data.volumes import read_volumes
from tests.test_passport import made_series, made_shards
from tests.test_pictures import write
from tests.test_volumes import VOLUME, image_of, write_case


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    for i in range(6):
        write(tmp_path / "in" / "train" / "ab"[i % 2] / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MP3D_ROOT", raising=False)
    return tmp_path


def call(*argv: str) -> int:
    return cli.run(lambda: job.main(["--out", "out", "--runner", "local", *argv]))


def test_prepares_and_knows_it_the_second_time(pictures, capsys):
    assert call("pictures", "--root", "in") == 0
    said = capsys.readouterr().out
    assert "1/1 parts, 6 rows, 0 refused" in said
    assert f"prepared: {pictures / 'out'}" in said
    assert json.loads((pictures / "out" / "manifest.json").read_text())["class_names"] == ["a", "b"]
    assert call("pictures", "--root", "in") == 0
    assert "already prepared, nothing to do" in capsys.readouterr().out


def test_rejects_are_named_on_a_terminal_only_and_decide_the_exit_code(pictures, capsys, monkeypatch):
    write(pictures / "in" / "train" / "a" / "broken.jpg", b"no picture")
    assert call("pictures", "--root", "in") == 5
    log = capsys.readouterr()
    assert re.search(r"refused: [0-9a-f]{16}: BAD_IMAGE: no JPEG", log.out)
    assert "broken" not in log.out + log.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call("pictures", "--root", "in") == 5
    said = capsys.readouterr()
    assert "refused: train/a/broken.jpg: BAD_IMAGE: no JPEG" in said.out
    assert str(pictures / "out-private" / "sources.json") in said.out
    assert "1 were refused, --allowed-rejects is 0" in said.err
    assert call("--allowed-rejects", "1", "pictures", "--root", "in") == 0


def test_report_writes_the_data_passport_also_of_what_stands_already(pictures, capsys):
    assert call("--report", "pictures", "--root", "in") == 0
    said = capsys.readouterr().out
    assert f"data passport: {pictures / 'out' / 'passport.html'}" in said
    written = {name: (pictures / "out" / name).read_bytes() for name in ("passport.json", "passport.html")}
    assert json.loads(written["passport.json"])["splits"]["train"]["images_per_class"] == {"a": 3, "b": 3}
    for name in written:
        (pictures / "out" / name).unlink()
    assert call("--report", "pictures", "--root", "in") == 0
    assert "already prepared, nothing to do" in capsys.readouterr().out
    assert {name: (pictures / "out" / name).read_bytes() for name in written} == written
    assert call("pictures", "--root", "in") == 0
    assert (pictures / "out" / "passport.json").exists()


def test_a_passport_of_what_is_written_anew_goes(pictures, capsys):
    write(pictures / "in" / "train" / "a" / "broken.jpg", b"no picture")
    assert call("--report", "pictures", "--root", "in") == 5
    assert json.loads((pictures / "out" / "passport.json").read_text())["rejects"]["by_reason"] == {"BAD_IMAGE": 1}
    write(pictures / "in" / "train" / "a" / "broken.jpg")
    assert call("--retry-rejects", "pictures", "--root", "in") == 0
    assert not list((pictures / "out").glob("passport.*"))


def test_what_is_in_two_data_sets_is_told_with_exit_code_3(pictures, capsys):
    (pictures / "other" / "test" / "x").mkdir(parents=True)
    copied = pictures / "other" / "test" / "x" / "renamed.jpg"
    copied.write_bytes((pictures / "in" / "train" / "a" / "0.jpg").read_bytes())
    assert cli.run(lambda: job.main(["--out", "held", "--runner", "local", "pictures", "--root", "other"])) == 0
    assert call("--report", "--compare", "held", "pictures", "--root", "in") == 3
    log = capsys.readouterr()
    assert "leak: images of train that are also in test of pictures" in log.err
    assert "renamed" not in log.out + log.err
    leaks = json.loads((pictures / "out" / "passport.json").read_text())["leaks"]
    assert leaks["found"]
    assert "renamed" not in (pictures / "out" / "passport.html").read_text()


def test_what_cannot_be_compared_is_told_with_exit_code_3(tmp_path, capsys):
    made_shards(tmp_path / "mine", [(made_series("a", fill=1), "test")])
    made_shards(tmp_path / "theirs", [(made_series("b", fill=2), "train")], key=b"another" * 4)
    assert cli.run(lambda: job.report(tmp_path / "mine", [tmp_path / "theirs"])) == 3
    assert "patients cannot be compared with made: prepared with another id key" in capsys.readouterr().err
    assert (tmp_path / "mine" / "passport.html").exists()


def test_the_table_of_anchors_is_printed(capsys):
    overlaps = {"mean_iou": 0.7016, "at_50": 0.9996, "at_70": 0.509}
    split = {"boxes": 4889, "centred": overlaps, "placed": overlaps | {"mean_iou": 0.661}}
    job.print_anchors({"shown_split": "val", "sets": [{"name": "MP3D", "splits": {"val": split}}]})
    job.print_anchors(None)  # no box anywhere
    head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:5] == ["anchors,", "4889", "boxes", "of", "val"]
    assert row == ["MP3D", "0.702", "1.000", "0.509", "0.661", "1.000", "0.509"]


def test_compare_belongs_to_the_report(pictures, capsys):
    assert call("--compare", "held", "pictures", "--root", "in") == 2
    assert "give --report too" in capsys.readouterr().err
    assert not (pictures / "out").exists()
    assert call("--report", "--compare", "held", "pictures", "--root", "in") == 3
    assert "no prepared data set" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(pictures, capsys):
    before = sorted(pictures.iterdir())
    assert call("--dry-run", "pictures", "--root", "in") == 0
    said = capsys.readouterr().out
    assert "train 6 pictures, val 0 pictures, test 0 pictures" in said
    assert f"1 parts into {pictures / 'out'}" in said
    assert sorted(pictures.iterdir()) == before


def test_a_split_that_stayed_empty_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MP3D_ROOT", raising=False)
    for number in range(3):
        write_case(tmp_path / "in" / f"patient {number}", image_of(VOLUME.hu), image_of(VOLUME.hu * 0))
    options = ["volumes", "--root"]
    assert call(*options, "in") == 0
    assert "note: no" not in capsys.readouterr().out
    assert call("--out", "one", *options, "in/patient 0") == 0
    assert "no patient fell into val and test: only 1 patient is told apart; see" in capsys.readouterr().out
    assert call("--out", "all", "--split-fractions", "1", "0", "0", *options, "in/patient 0") == 0
    assert "note: no" not in capsys.readouterr().out
    splits = assign_splits(read_volumes(tmp_path / "in").items, (0.7, 0.15, 0.15), 0)
    (patient,) = [patient for patient, split in splits.items() if split == "val"]
    (tmp_path / "in" / patient / "CT_image.nii.gz").write_bytes(b"broken")
    assert call("--out", "broken", *options, "in") == 5
    assert "note: val stayed empty: every patient that fell into it was refused" in capsys.readouterr().out


def test_official_splits_without_one_are_no_news(pictures, capsys):
    assert call("pictures", "--root", "in") == 0
    assert "note: no" not in capsys.readouterr().out


def test_another_plan_and_missing_data_have_their_exit_codes(pictures, capsys):
    assert call("pictures", "--root", "in") == 0
    assert call("--split-seed", "1", "pictures", "--root", "in") == 2
    assert "split_seed 0 there, 1 now" in capsys.readouterr().err
    assert call("pictures", "--root", "none") == 3
    assert "none is no folder" in capsys.readouterr().err


def test_misspelt_words_are_answered_with_the_near_one(pictures, capsys):
    assert call("deeplesoin", "--root", "in") == 2
    assert "did you mean 'deeplesion'?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        call("pictures", "--root", "in", "--pictures-per-itm", "3")
    assert "--pictures-per-item" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        call()
    assert "pictures" in capsys.readouterr().err


def test_help_lists_readers_and_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        job.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in READERS)
    assert "more refused than allowed" in " ".join(said.split())
    assert "--allowed-rejects" in said


@pytest.mark.parametrize("name", READERS)
def test_every_reader_has_a_readable_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        job.main(["--out", "out", name, "--help"])
    said = capsys.readouterr().out
    assert "--root PATH" in said
    assert "(required)" in said


def test_a_name_that_is_no_text_can_be_printed(pictures, capsysbinary, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    (pictures / "in" / "train" / "a" / "caf\udce9.jpg").write_bytes(b"")
    assert call("pictures", "--root", "in") == 5
    assert b"caf\\udce9.jpg: BAD_IMAGE" in capsysbinary.readouterr().out
