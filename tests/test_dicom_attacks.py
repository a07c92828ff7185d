"""Files made to harm or mislead a reader get their verdict within the limits of a file, and take no other down."""

import resource
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.decode import Limits, Pool
from mp3d.data.dicom import group_series, load_volume
from mp3d.errors import Refusal
from tests.dicom_attacks import ATTACKS, TRAPS
from tests.dicom_files import ct_slices, made_volume, to_bytes
from tests.worker_memory import peak_worker_bytes

TRUTH = made_volume(shape=(5, 33, 37))
SECONDS, MEMORY_BYTES = 5, 2**30


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Workers whose limit is processor time: what the wall clock allows depends on what else a machine does."""
    with Pool(limits=Limits(wall_s=60.0)) as pool:
        yield pool


def verdict(files: Path | Mapping[str, bytes], pool: Pool) -> str:
    """``hu``, or the reasons of what was refused; anything else is a fault of the reader."""
    started, before = time.process_time(), peak_bytes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer, texts = _judge(files, pool)
    told = " ".join([*texts, *(str(warning.message) for warning in caught)]).lower()
    if "canary" in told or "1.2.826" in told:
        return "it names somebody"
    if max(peak_bytes() - before, peak_worker_bytes()) > MEMORY_BYTES:
        return f"more than {MEMORY_BYTES >> 20} MiB"
    return answer if time.process_time() - started < SECONDS else f"no answer in {SECONDS} s"


def peak_bytes() -> int:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _judge(files: Path | Mapping[str, bytes], pool: Pool) -> tuple[str, list[str]]:
    """The verdict and all that was said."""
    refused: list[Refusal] = []
    try:
        listing = group_series(files, pool=pool)
        refused += [refusal for _, refusal in listing.refused]
        volumes = [load_volume(series, pool=pool)[0].hu for series in listing.series]
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
def test_an_attack_in_place_of_the_last_slice(folder: Path, name: str, pool: Pool):
    attack, expected = ATTACKS[name]
    (folder / "4.dcm").write_bytes(attack(ct_slices(TRUTH)[4]))
    assert verdict(folder, pool) == expected
    assert verdict({path.name: path.read_bytes() for path in folder.iterdir()}, pool) == expected


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_beside_the_slices(folder: Path, name: str, pool: Pool):
    build, expected = TRAPS[name]
    build(folder)
    assert verdict(folder, pool) == expected


def test_the_judge_sees_what_is_right_and_what_is_wrong(folder: Path, pool: Pool):
    assert verdict(folder, pool) == "hu"
    other = ct_slices(TRUTH)[4]
    other.PixelData = bytes(2) + other.PixelData[2:]
    (folder / "4.dcm").write_bytes(to_bytes(other))
    assert verdict(folder, pool) == "wrong Hounsfield units"
    for name in ("2.dcm", "3.dcm", "4.dcm"):
        (folder / name).unlink()
    assert verdict(folder, pool) == "TOO_FEW_SLICES"
    assert verdict({}, pool) == "good slices are missing"
