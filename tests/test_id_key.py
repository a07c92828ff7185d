"""The key of the hashed ids."""

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from mp3d.data.id_key import ENVIRONMENT_VARIABLE, id_key_path, load_id_key
from mp3d.errors import ConfigError


def test_key_is_made_once_and_private(tmp_path):
    path = tmp_path / "new" / "id_key"
    key = load_id_key(path)
    assert len(key) == 32
    assert load_id_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [child.name for child in path.parent.iterdir()] == ["id_key"]
    assert load_id_key(tmp_path / "other") != key


def test_many_that_start_at_once_get_one_key(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: load_id_key(tmp_path / "id_key"), range(32)))
    assert len(keys) == 1


def test_where_the_key_is(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "named"))
    assert id_key_path(tmp_path / "given") == tmp_path / "given"
    assert id_key_path(None) == tmp_path / "named"
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert id_key_path(None) == tmp_path / ".config" / "mp3d" / "id_key"


@pytest.mark.parametrize("content", [b"", b"abcd", b"x" * 64, bytes(range(128, 160))])
def test_a_file_that_is_no_key_is_refused(tmp_path, content):
    path = tmp_path / "id_key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="--id-key-file"):
        load_id_key(path)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--id-key-file"):
        load_id_key(tmp_path / "file" / "id_key")
