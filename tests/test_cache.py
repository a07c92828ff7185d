"""The cache of decoded series: the same clips bit for bit, and nothing but them, whatever happens to its files."""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mp3d.config import ClipConfig
from mp3d.data.batches import read_clip
from mp3d.data.samples import annotated_samples, classified_samples
from mp3d.data.shard import ShardSet, cache, cached, open_shards
from mp3d.errors import ConfigError
from mp3d.session import PlainSession
from mp3d.train import train
from tests.tiny import ct_shards, detector_config, picture_shards

CLIP = ClipConfig(image_size=32)
SERIES_BYTES = 11 * 32 * 32 * 2
SET = "v2-{digest:.16}"


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return open_shards(ct_shards(tmp_path_factory.mktemp("ct") / "shards"))


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    """What a process remembers of caches is gone after each test."""
    yield
    forget()


def forget() -> None:
    cache._open_series.cache_clear()
    cache._full.clear()


def rows_of(shards: ShardSet, number: int = 0) -> list[dict]:
    entry = shards.entries[number]
    rows, slices = shards.read_slices(entry, 0, entry.num_rows)
    assert np.array_equal(slices, [np.frombuffer(row["image"], "<i2").reshape(32, 32) for row in rows])
    return [row | {"image": bytes(row["image"])} for row in rows]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("v*/*"))


@pytest.mark.parametrize("spacing_mm", [None, 2.5, 1.7])
def test_clips_are_the_same_bit_for_bit(ct: ShardSet, tmp_path: Path, spacing_mm: float | None):
    clip = CLIP.override({"slice_spacing_mm": spacing_mm})
    samples = [sample for split in ("train", "val") for group in annotated_samples(ct, split, 1.0) for sample in group]
    for _ in range(2):
        through = cached(ct, tmp_path, 1)
        for sample in samples:
            (mine, (target,), info), (clip_of, (target_of,), info_of) = (
                read_clip(shards, sample, clip) for shards in (through, ct)
            )
            assert torch.equal(mine.slices, clip_of.slices)
            assert mine.key_slices == clip_of.key_slices
            assert target.keys() == target_of.keys()
            assert all(torch.equal(target[key], target_of[key]) for key in target)
            assert info == info_of
        forget()
    assert files(tmp_path) == sorted({sample.entry.file.replace(".parquet", "-0.hu") for sample in samples})


def test_what_is_cached_is_not_read_from_the_shards(ct: ShardSet, tmp_path: Path, monkeypatch):
    through = pickle.loads(pickle.dumps(cached(ct, tmp_path, 1)))
    stored = rows_of(ct)
    assert rows_of(through) == stored
    monkeypatch.setattr(ShardSet, "view_rows", lambda *_: pytest.fail("read from the shards"))
    forget()
    assert rows_of(through) == stored
    entry = through.entries[0]
    with pytest.raises(pytest.fail.Exception):
        through.read_rows(entry, 3, entry.num_rows + 1)


def test_each_slice_is_verified_once_and_no_other_is_touched(ct: ShardSet, tmp_path: Path, monkeypatch):
    through = cached(ct, tmp_path, 1)
    rows_of(through)
    forget()
    seen: list[int] = []
    monkeypatch.setattr(cache, "row_is_intact", lambda row: seen.append(row["z_index"]) is None)
    for start, stop in ((2, 5), (3, 7), (0, 4), (2, 7)):
        through.read_slices(through.entries[0], start, stop)
    assert seen == [2, 3, 4, 5, 6, 0, 1]


def test_one_flipped_bit_anywhere_is_found_and_the_file_made_again(ct: ShardSet, tmp_path: Path):
    through, stored = cached(ct, tmp_path, 1), rows_of(ct)
    rows_of(through)
    path = tmp_path / SET.format(digest=ct.digest) / "part-00000-0.hu"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(0, len(good), 97), *range(SERIES_BYTES - 1, SERIES_BYTES + 8), *range(len(good) - 24, len(good))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        forget()
        with pytest.warns(UserWarning, match=r"part-00000-0.hu is not what was written; it is made again"):
            assert rows_of(through) == stored
        assert rows_of(through) == stored
        assert path.read_bytes() == good


@pytest.mark.parametrize("content", [b"", b"short", bytes(10_000)])
def test_a_file_that_is_none_is_made_again(ct: ShardSet, tmp_path: Path, content: bytes):
    through = cached(ct, tmp_path, 1)
    path = through.cache / "part-00000-0.hu"  # type: ignore[attr-defined]
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="made again"):
        assert rows_of(through) == rows_of(ct)
    assert rows_of(through) == rows_of(ct)
    assert path.stat().st_size > SERIES_BYTES


def test_a_damaged_slice_does_not_matter_to_those_who_do_not_ask_for_it(ct: ShardSet, tmp_path: Path):
    through = cached(ct, tmp_path, 1)
    stored = rows_of(through)
    path = tmp_path / SET.format(digest=ct.digest) / "part-00000-0.hu"
    with path.open("r+b") as file:
        file.seek(SERIES_BYTES - 1)
        file.write(b"\x55")
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows, _ = through.read_slices(through.entries[0], 0, 10)
    assert [bytes(row["image"]) for row in rows] == [row["image"] for row in stored[:10]]


def test_pictures_are_not_cached(tmp_path: Path):
    shards = open_shards(picture_shards(tmp_path / "shards"))
    through = cached(shards, tmp_path / "cache", 1)
    planes = ClipConfig(num_slices=3, slice_spacing_mm=None, image_size=24)
    for sample in classified_samples(shards, "val"):
        assert torch.equal(read_clip(through, sample, planes)[0].slices, read_clip(shards, sample, planes)[0].slices)
    assert files(tmp_path / "cache") == []


def test_files_are_private(ct: ShardSet, tmp_path: Path):
    rows_of(cached(ct, tmp_path / "made" / "cache", 1))
    folder = tmp_path / "made" / "cache"
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.glob("v*"))} == {0o700}


def test_no_folder_no_cache(ct: ShardSet, tmp_path: Path):
    assert cached(ct, None, 1) is ct
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made, written or locked .* on a disk of this node"):
        cached(ct, tmp_path / "file" / "cache", 1)


def test_a_full_cache_says_so_and_the_rest_comes_from_the_shards(ct: ShardSet, tmp_path: Path):
    through = cached(ct, tmp_path, 3 * SERIES_BYTES * 2.5e-9)
    with pytest.warns(UserWarning, match="the cache is full .*GB.* the rest is read from the shards") as told:
        twice = [rows_of(through, i) for i in [*range(8)] * 2]
    assert twice == [rows_of(ct, i) for i in range(8)] * 2
    assert len(told) == 1
    assert 1 <= len(files(tmp_path)) < 8
    assert sum(path.stat().st_size for path in tmp_path.glob("v*/*")) <= 3 * SERIES_BYTES * 2.5


def test_a_full_disk_is_a_full_cache(ct: ShardSet, tmp_path: Path):
    through = cached(ct, tmp_path, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "commit", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.warns(UserWarning, match="No space left on device"):
            assert rows_of(through) == rows_of(ct)
    assert files(tmp_path) == []


def other_set(folder: Path, name: str, age_s: int) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "part-00000-0.hu").write_bytes(bytes(SERIES_BYTES))
    os.utime(folder / name, (10**9 - age_s, 10**9 - age_s))
    return folder / name


def test_data_sets_that_nobody_uses_make_room_the_oldest_first(ct: ShardSet, tmp_path: Path):
    in_use = other_set(tmp_path, "v2-" + "a" * 16, 4000)
    oldest, old, new = (other_set(tmp_path, f"v0-{'bcd'[i] * 16}", 3000 - 1000 * i) for i in range(3))
    foreign = other_set(tmp_path, "thesis", 9000)
    held = os.open(in_use, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    rows_of(cached(ct, tmp_path, SERIES_BYTES * 6e-9))
    os.close(held)
    assert [path.exists() for path in (in_use, oldest, old, new, foreign)] == [True, False, False, True, True]
    assert "part-00000-0.hu" in [path.name for path in (tmp_path / SET.format(digest=ct.digest)).iterdir()]


def test_another_process_that_makes_the_file_is_not_waited_for(ct: ShardSet, tmp_path: Path):
    through = cached(ct, tmp_path, 1)
    aside = tmp_path / SET.format(digest=ct.digest) / ".part-00000-0.hu.aside"
    with aside.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert rows_of(through) == rows_of(ct)
        assert files(tmp_path) == [aside.name]
    assert rows_of(through) == rows_of(ct)
    assert files(tmp_path) == ["part-00000-0.hu"]


READ_ALL = """
import sys
from mp3d.data.shard import cached, open_shards
through = cached(open_shards(sys.argv[1]), sys.argv[2], 1)
"""
COMPARED = """
for _ in range(3):
    for entry in through.entries:
        mine, rows = (shards.read_rows(entry, 0, entry.num_rows) for shards in (through, through.stored))
        assert [row | {"image": bytes(row["image"])} for row in mine] == rows
"""
KILLED = (
    READ_ALL
    + """
import os, signal
from mp3d.data.shard import ShardSet
iter_rows = ShardSet.iter_rows
def stop_in_the_middle(self, entry):
    for number, row in enumerate(iter_rows(self, entry)):
        if number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
ShardSet.iter_rows = stop_in_the_middle
through.read_rows(through.entries[0], 0, 1)
"""
)


def test_a_process_killed_while_it_writes_is_in_nobodys_way(ct: ShardSet, tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(ct.folder), str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert files(tmp_path) == [".part-00000-0.hu.aside"]
    through = cached(ct, tmp_path, 1)
    assert rows_of(through, 1) == rows_of(ct, 1)
    assert rows_of(through) == rows_of(ct)
    assert files(tmp_path) == ["part-00000-0.hu", "part-00001-0.hu"]


def test_several_processes_share_a_cache(ct: ShardSet, tmp_path: Path):
    command = [sys.executable, "-W", "error", "-c", READ_ALL + COMPARED, str(ct.folder), str(tmp_path)]
    readers = [subprocess.Popen(command) for _ in range(4)]
    assert [reader.wait() for reader in readers] == [0] * 4
    assert files(tmp_path) == [f"part-{i:05d}-0.hu" for i in range(8)]


def test_training_through_a_cache_is_the_same_training(ct: ShardSet, tmp_path: Path):
    losses = []
    for name, folder in (("without", None), ("with", str(tmp_path / "cache"))):
        config = detector_config(ct.folder, tmp_path, name, loop__epochs=1, launch__cache_dir=folder)
        (tmp_path / name).mkdir()
        losses.append(train(config, PlainSession(tmp_path / name, keep=1, device=torch.device("cpu"))))
    assert losses[0] == losses[1]
    assert files(tmp_path / "cache")


def test_the_cache_is_no_part_of_what_a_run_is(ct: ShardSet, tmp_path: Path):
    config = detector_config(ct.folder, tmp_path)
    assert config.override({"launch.cache_dir": "/scratch"}).identity() == config.identity()
