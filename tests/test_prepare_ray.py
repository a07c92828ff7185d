"""Ray Data and the plain loop write the same bytes."""

import errno
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mp3d.data.pictures import read_picture_folders
from mp3d.data.prepare import prepare
from mp3d.data.series import CTSeries
from mp3d.data.source import Item, Source
from mp3d.errors import ResourceError
from tests.test_pictures import jpeg, write
from tests.tiny import blob_series

KEY = b"k" * 32


def made_source(root: Path) -> Source:
    """Seven batches of pictures, one of which has a broken picture, and an item whose reader fails."""
    for i in range(70):
        write(root / "train" / "ab"[i % 2] / f"{i}.jpg", jpeg(i)[: -60 if i == 13 else None])
    source = read_picture_folders(root, pictures_per_item=10)
    bad = Item("secret", "secret", "train", partial(os.listdir, root / "none"))  # type: ignore[arg-type]
    return replace(source, items=(*source.items[:3], bad, *source.items[3:]))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_and_local_runner_write_the_same_bytes(tmp_path):
    source = made_source(tmp_path / "in")
    told: list[tuple[int, ...]] = []
    results = {
        runner: prepare(
            source,
            tmp_path / runner,
            id_key=KEY,
            runner=runner,
            items_per_part=2,
            progress=lambda *numbers: told.append(numbers),
        )
        for runner in ("ray", "local")
    }
    contents = [{p.name: p.read_bytes() for p in (tmp_path / runner).iterdir()} for runner in ("ray", "local")]
    assert contents[0] == contents[1]
    assert {"plan.json", "manifest.json", "part-00003.json", "part-00003.parquet"} <= contents[0].keys()
    assert [reject.reason for _, reject in results["ray"].rejects] == [r.reason for _, r in results["local"].rejects]
    assert sorted(reject.reason for _, reject in results["ray"].rejects) == ["BAD_IMAGE", "READER_FAILED"]
    assert told[:5] == told[5:]
    assert told[4] == (4, 4, 69, 2)
    # a part that is lost is made again, by the other runner, and nothing else is
    (tmp_path / "ray" / "part-00002.parquet").unlink()
    prepare(source, tmp_path / "ray", id_key=KEY, runner="local", items_per_part=2)
    assert {p.name: p.read_bytes() for p in (tmp_path / "ray").iterdir()} == contents[0]


def full() -> CTSeries:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_full_disk_of_a_task_arrives_as_our_error(tmp_path):
    source = made_source(tmp_path / "in")
    source = replace(source, items=(*source.items, Item("x", "x", "train", full)))
    with pytest.raises(ResourceError, match=r"no room is left.*\(.*No space left on device\)"):
        prepare(source, tmp_path / "out", id_key=KEY, runner="ray")
    assert not (tmp_path / "out" / "manifest.json").exists()


def end_the_process(flag: Path | None) -> CTSeries:
    """Always, or only the first time."""
    if flag is None or not flag.exists():
        if flag is not None:
            flag.touch()
        os._exit(3)
    return blob_series(7)


def give_up(error: BaseException) -> CTSeries:
    raise error


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_no_reader_stops_the_others_whatever_it_does(tmp_path):
    good = tuple(Item(f"good {i}", f"good {i}", "train", partial(blob_series, i)) for i in range(6))
    bad = (
        Item("always", "always", "train", partial(end_the_process, None)),
        Item("once", "once", "train", partial(end_the_process, tmp_path / "flag")),
        Item("exit", "exit", "train", partial(give_up, SystemExit(1))),
        Item("hang", "hang", "train", partial(time.sleep, 600)),  # type: ignore[arg-type]
        Item("memory", "memory", "train", partial(give_up, MemoryError())),
    )
    source = Source("blobs", "tiny/1", ("lesion",), (*good[:3], *bad, *good[3:]))
    result = prepare(source, tmp_path / "out", id_key=KEY, runner="ray", items_per_part=4, item_timeout_s=5.0)
    assert [(key, reject.reason) for key, reject in result.rejects] == [
        ("always", "READER_CRASHED"),
        ("exit", "READER_FAILED"),
        ("hang", "READER_OVERDUE"),
        ("memory", "READER_FAILED"),
    ]
    assert result.counts["train"]["series"] == 7
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        *(f"part-0000{i}.{kind}" for i in range(3) for kind in ("json", "parquet")),
        "plan.json",
    ]
