"""The prepare command: its help, its plan, its exit codes."""

import json
import re
import sys

import pytest

from jobs import prepare as job
from mp3d import cli
from mp3d.data import READERS
from tests.test_pictures import write


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


def test_dry_run_prints_the_plan_and_writes_nothing(pictures, capsys):
    before = sorted(pictures.iterdir())
    assert call("--dry-run", "pictures", "--root", "in") == 0
    said = capsys.readouterr().out
    assert "train 6 pictures, val 0 pictures, test 0 pictures" in said
    assert f"1 parts into {pictures / 'out'}" in said
    assert sorted(pictures.iterdir()) == before


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
    assert "5 prepared, more refused than allowed" in " ".join(said.split())
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
