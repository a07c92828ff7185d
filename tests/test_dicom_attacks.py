"""Files made to harm or mislead a reader get their verdict, in ten seconds and a gigabyte, and take no other down."""

import multiprocessing
import resource
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.dicom import group_series, load_volume
from mp3d.errors import Refusal
from tests.dicom_attacks import ATTACKS, TRAPS
from tests.dicom_files import ct_slices, made_volume, to_bytes

TRUTH = made_volume(shape=(5, 33, 37))
SECONDS, MEMORY_BYTES = 10, 2**30
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def verdict(files: Path | Mapping[str, bytes]) -> str:
    """``hu``, or the reasons of what was refused; anything else is a fault of the reader."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_judge_apart, args=(files, sender))
    process.start()
    sender.close()
    told = receiver.poll(SECONDS)
    try:
        return receiver.recv() if told else f"no answer in {SECONDS} s"
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _judge_apart(files: Path | Mapping[str, bytes], sender: Connection) -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer, texts = _judge(files)
    told = " ".join([*texts, *(str(warning.message) for warning in caught)]).lower()
    if "canary" in told or "1.2.826" in told:
        answer = "it names somebody"
    elif "memoryerror" in told:
        answer = f"more than {MEMORY_BYTES >> 20} MiB"
    sender.send(answer)


def _judge(files: Path | Mapping[str, bytes]) -> tuple[str, list[str]]:
    """The verdict and all that was said."""
    refused: list[Refusal] = []
    try:
        listing = group_series(files)
        refused += [refusal for _, refusal in listing.refused]
        volumes = [load_volume(series)[0].hu for series in listing.series]
        if [len(hu) for hu in volumes] != [len(TRUTH.hu) - ("4.dcm" in dict(listing.refused))]:
            return "good slices are missing", []
        if not np.array_equal(volumes[0], TRUTH.hu[: len(volumes[0])]):
            return "wrong Hounsfield units", []
    except Refusal as refusal:
        refused.append(refusal)
    except BaseException as error:
        return f"{type(error).__name__} was not caught", []
    return " ".join(refusal.reason for refusal in refused) or "hu", [str(refusal) for refusal in refused]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good series."""
    folder = tmp_path / "canary"
    folder.mkdir()
    for z, ds in enumerate(ct_slices(TRUTH)):
        (folder / f"{z}.dcm").write_bytes(to_bytes(ds))
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_in_place_of_the_last_slice(folder: Path, name: str):
    attack, expected = ATTACKS[name]
    (folder / "4.dcm").write_bytes(attack(ct_slices(TRUTH)[4]))
    assert verdict(folder) == expected
    assert verdict({path.name: path.read_bytes() for path in folder.iterdir()}) == expected


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_beside_the_slices(folder: Path, name: str):
    build, expected = TRAPS[name]
    build(folder)
    assert verdict(folder) == expected


def test_the_judge_sees_what_is_right_and_what_is_wrong(folder: Path):
    assert verdict(folder) == "hu"
    other = ct_slices(TRUTH)[4]
    other.PixelData = bytes(2) + other.PixelData[2:]
    (folder / "4.dcm").write_bytes(to_bytes(other))
    assert verdict(folder) == "wrong Hounsfield units"
    for name in ("2.dcm", "3.dcm", "4.dcm"):
        (folder / name).unlink()
    assert verdict(folder) == "TOO_FEW_SLICES"
    assert verdict({}) == "good slices are missing"
