"""Walking a folder."""

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


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        list(walk(tmp_path / "absent"))
