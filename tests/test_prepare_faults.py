"""Preparing that is stopped or goes wrong in the middle: kills, full disks, time limits, damaged files."""

import errno
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.part import Part, finished, prepare_part, run_here
from mp3d.data.series import CTSeries
from mp3d.data.shard import MANIFEST, Origin, hashed_id, open_shards
from mp3d.data.source import Item
from mp3d.errors import DataError, ResourceError
from tests.test_prepare import KEY, broken_source, content, make_source, run
from tests.tiny import blob_series


def give_up(error: BaseException) -> CTSeries:
    raise error


def ray_signal() -> SystemExit:
    """What Ray raises where a worker is told to end."""
    error = SystemExit(1)
    error.ray_terminate_msg = b"The process receives a SIGTERM."  # type: ignore[attr-defined]
    return error


class Panic(BaseException):
    """As the extensions of some libraries raise it."""


def test_a_reader_that_ends_the_program_is_a_failed_reader(tmp_path):
    errors = (SystemExit(), SystemExit(2), Panic(), MemoryError())
    bad = tuple(Item(f"Smith/{i}", "Smith", None, partial(give_up, error)) for i, error in enumerate(errors))
    source = make_source()
    result = run(replace(source, items=(*bad, *source.items)), tmp_path / "out")
    assert [reject.detail.split()[0] for _, reject in result.rejects] == ["SystemExit"] * 2 + ["Panic", "MemoryError"]
    assert {reject.reason for _, reject in result.rejects} == {"READER_FAILED"}
    assert len(open_shards(tmp_path / "out").entries) == 6


def mortal(flag: Path, times: int, index: int) -> CTSeries:
    """Ends its process so many times."""
    deaths = int(flag.read_text()) if flag.exists() else 0
    if deaths < times:
        flag.write_text(str(deaths + 1))
        raise KeyboardInterrupt  # in this process nothing else gets past the reader's boundary
    return blob_series(index)


def test_an_item_that_ends_its_process_again_and_again_is_refused_by_name(tmp_path):
    times = (0, 99, 2, 99, 3)
    items = tuple(Item(str(i), str(i), None, partial(mortal, tmp_path / str(i), n, i)) for i, n in enumerate(times))
    out = tmp_path / "out"
    out.mkdir()
    part = Part(0, items, ("train",) * 5, out, Origin("d", "r/1", KEY))
    deaths = 0
    while finished(part) is None:
        try:
            assert prepare_part(part, repeated=True) == (22, 3)
        except KeyboardInterrupt:
            deaths += 1
            (out / ".part-00000.parquet.1234.aside").write_bytes(b"half a part")
    assert deaths == 3 + 2 + 3 + 3
    report = finished(part)
    assert report is not None
    assert [(reject.source, reject.reason) for reject in report.rejects] == [
        (hashed_id(key, KEY), "READER_CRASHED") for key in ("1", "3", "4")
    ]
    assert list(content(out)) == ["part-00000.json", "part-00000.parquet"]
    # who is not repeated is not refused either: killed by the user, it goes on
    with pytest.raises(KeyboardInterrupt):
        prepare_part(part)


@pytest.mark.parametrize("lost", ["a part", "a row"])
def test_rows_that_the_runner_loses_are_found(tmp_path, monkeypatch, lost):
    def losing(parts):
        for number, (rows, rejects) in enumerate(run_here(parts)):
            if number != 3 or lost == "a row":
                yield rows - (number == 3), rejects

    monkeypatch.setattr("mp3d.data.prepare.run_here", losing)
    with pytest.raises(DataError, match=r"tasks told of \d parts with \d+ rows, 6 with 66 stand on the disk"):
        run(make_source(6), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(signal.SIGTERM), ray_signal()])
def test_stop_signals_are_no_rejects(tmp_path, stop):
    source = make_source(2)
    with pytest.raises(type(stop)):
        run(replace(source, items=(*source.items, Item("x", "x", None, partial(give_up, stop)))), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert not [name for name in content(tmp_path / "out") if name.startswith(".")]


@pytest.mark.parametrize("killed_after", [0, 1, 4])
def test_killed_and_repeated_gives_the_same_bytes(tmp_path, killed_after):
    run(broken_source(), tmp_path / "whole")

    def kill(done: int, *_: int) -> None:
        if done == killed_after:
            raise SystemExit("killed")

    with pytest.raises(SystemExit):
        run(broken_source(), tmp_path / "cut", progress=kill)
    with pytest.raises(DataError, match="was cut off"):
        open_shards(tmp_path / "cut")
    (tmp_path / "cut" / ".part-00004.parquet.1234.aside").write_bytes(b"half a part")
    told: list[tuple[int, ...]] = []
    result = run(broken_source(), tmp_path / "cut", progress=lambda *numbers: told.append(numbers))
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert not result.already_prepared
    assert [numbers[:2] for numbers in told] == [(done, 9) for done in range(killed_after, 10)]
    assert told[-1] == (9, 9, 66, 4)


def full() -> CTSeries:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("file", ["plan.json", "part-00003.parquet", "part-00003.json", "sources.json", MANIFEST])
def test_full_disk_is_said_and_the_same_command_goes_on(tmp_path, monkeypatch, file):
    run(broken_source(), tmp_path / "whole")

    def replace_or_fail(self: Path, target: Path, rename=Path.replace) -> Path:
        return full() if Path(target).name == file else rename(self, target)  # type: ignore[return-value]

    def link_or_fail(self: Path, target: Path, link=Path.hardlink_to) -> None:
        full() if self.name == file else link(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_fail)
        patch.setattr(Path, "hardlink_to", link_or_fail)
        with pytest.raises(ResourceError, match="no room is left to write into .*No space left on device.*goes on"):
            run(broken_source(), tmp_path / "cut")
    left = content(tmp_path / "cut")
    assert left.items() <= content(tmp_path / "whole").items(), "whole files or none"
    assert MANIFEST not in left
    run(broken_source(), tmp_path / "cut")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize("file", ["part-00003.parquet", "part-00003.json", "sources.json", MANIFEST])
def test_folder_that_can_no_longer_be_written_is_said_and_the_same_command_goes_on(tmp_path, monkeypatch, file):
    def replace_or_fail(self: Path, target: Path, rename=Path.replace) -> Path:
        if Path(target).name == file:
            raise OSError(errno.EROFS, "Read-only file system")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_fail)
        with pytest.raises(ResourceError, match="cannot be written .Read-only file system.*goes on"):
            run(broken_source(), tmp_path / "cut")
    run(broken_source(), tmp_path / "cut")
    run(broken_source(), tmp_path / "whole")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: give_up(PermissionError(errno.EPERM, "not permitted")))
    run(make_source(2), tmp_path / "out")
    assert run(make_source(2), tmp_path / "out").already_prepared


def test_full_disk_in_the_middle_of_a_part_leaves_nothing_of_it(tmp_path):
    run(make_source(), tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))  # a part has 20 KiB
    try:
        with pytest.raises(ResourceError, match="no room"):
            run(make_source(), tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(content(tmp_path / "cut")) == ["plan.json"]
    run(make_source(), tmp_path / "cut")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_full_disk_is_no_fault_of_the_item_that_met_it(tmp_path):
    source = make_source(2)
    with pytest.raises(ResourceError, match="no room"):
        run(replace(source, items=(*source.items, Item("x", "x", None, full))), tmp_path / "out")
    assert "part-00002.json" not in content(tmp_path / "out")


@pytest.mark.parametrize("damage", ["part-00003.parquet", "part-00003.json", MANIFEST])
@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_finished_folder_that_lost_a_file_is_mended(tmp_path, damage, how):
    run(broken_source(), tmp_path / "out")
    before = content(tmp_path / "out")
    path = tmp_path / "out" / damage
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(before[damage][: -30 if how == "cut" else 0])
    assert not run(broken_source(), tmp_path / "out").already_prepared
    assert content(tmp_path / "out") == before


def hang(stubborn: bool) -> CTSeries:
    """The stubborn one goes on after the first time it is told to stop."""
    try:
        time.sleep(60)
    except BaseException:
        if not stubborn:
            raise
    time.sleep(60)
    raise AssertionError


def test_an_item_that_never_ends_is_refused_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("mp3d.data.time_limit.REMIND_S", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    source = make_source()
    bad = tuple(Item(f"Smith/{i}", "Smith", None, partial(hang, stubborn)) for i, stubborn in enumerate([False, True]))
    result = run(replace(source, items=(*bad, *source.items)), tmp_path / "out", item_timeout_s=1.5)
    assert [(key, reject.reason) for key, reject in result.rejects] == [(f"Smith/{i}", "READER_OVERDUE") for i in "01"]
    assert "took more than 1.5 s" in result.rejects[0][1].detail
    assert len(open_shards(tmp_path / "out").entries) == 6
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_no_signal_can_interrupt_ends_its_process():
    code = (
        "import signal, time; from mp3d.data.time_limit import time_limit\n"
        "with time_limit(0.2, end_process=True): pass\n"
        "time.sleep(0.8); print('alive', flush=True)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "with time_limit(0.2, end_process=True): time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "alive\n", "")


def test_one_flipped_bit_in_what_is_told_of_a_part_is_found_and_mended(tmp_path):
    """Of a sidecar that was altered nothing comes into the manifest; bits of pixels are found when they are read."""
    run(make_source(), tmp_path / "out")
    before = content(tmp_path / "out")
    path = tmp_path / "out" / "part-00003.json"
    rng = np.random.default_rng(0)
    for place in range(0, len(before[path.name]) - 1, 29):
        bad = bytearray(before[path.name])
        bad[place] ^= 1 << int(rng.integers(7))
        path.write_bytes(bad)
        run(make_source(), tmp_path / "out")
        assert content(tmp_path / "out") == before
