"""Walking a folder."""

import os
import socket
from pathlib import Path

import pytest

from mp3d.data.files import walk
from mp3d.errors import DataError


def test_sorted_with_links_followed_and_each_folder_once(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.dcm").touch()
    (elsewhere / "a.dcm").touch()
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "z.dcm").touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "sub" / "loop").symlink_to(root)
    assert [path.relative_to(root).as_posix() for path in walk(root)] == ["z.dcm", "linked/a.dcm", "linked/b.dcm"]


def test_files_of_a_folder_come_before_those_of_its_subfolders(tmp_path: Path) -> None:
    for name in ("c/a", "a/b/z", "a/a", "a/b.x", "b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)] == ["b", "a/a", "a/b.x", "a/b/z", "c/a"]


def test_what_is_no_file_is_passed_over_and_what_cannot_be_reached_is_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket must be short
    os.mkfifo("pipe.dcm")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.dcm")
        Path("device.dcm").symlink_to("/dev/zero")
        Path("linked pipe.dcm").symlink_to("pipe.dcm")
        Path("nowhere.dcm").symlink_to("absent")
        Path("circle.dcm").symlink_to("circle.dcm")
        assert [path.name for path in walk(tmp_path)] == ["circle.dcm", "nowhere.dcm"]


def test_a_folder_that_cannot_be_listed_stands_for_its_files(tmp_path: Path, monkeypatch) -> None:
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.dcm").touch()

    def scandir(path: Path, real=os.scandir):
        if Path(path).name == "closed":
            raise PermissionError(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)] == ["closed", "open/a.dcm"]


def test_folders_deeper_than_any_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(50):
        os.mkdir("d" * 100)
        os.chdir("d" * 100)
    (found,) = walk(tmp_path)
    assert len(str(found)) > 4000


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        list(walk(tmp_path / "absent"))
