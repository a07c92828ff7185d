"""One contract for all readers: tiny files in the true format, read, prepared and read back."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest

from mp3d.data import READERS
from mp3d.data.dicom_folder import read_dicom
from mp3d.data.series import CTSeries, Truth
from mp3d.data.source import Item, PictureBatch, Source
from mp3d.data.splits import SPLITS
from mp3d.errors import Refusal
from tests.reader_contract import check_reader
from tests.reader_worlds import MAKERS


@pytest.mark.parametrize("name", READERS)
def test_a_reader_keeps_to_the_contract(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if name not in MAKERS:
        pytest.fail(f"the reader {name!r} has no world in tests/reader_worlds.py: write one and add it to MAKERS")
    root = tmp_path / "CANARY raw"
    root.mkdir()
    check_reader(resolve_name(READERS[name]), MAKERS[name](root), root, monkeypatch)


def test_no_world_without_reader():
    assert MAKERS.keys() <= READERS.keys()


def changed(root: Path, change: Callable[[Item], Item]) -> Source:
    """A reader that does one thing differently."""
    source = read_dicom(root)
    return replace(source, items=tuple(map(change, source.items)))


def load_changed(item: Item, change: Callable[[CTSeries], CTSeries]) -> CTSeries:
    series = item.load()
    assert isinstance(series, CTSeries)
    return change(series)


def unchanged(series: CTSeries) -> CTSeries:
    return series


def unsearched_where_empty(series: CTSeries) -> CTSeries:
    found = (truth if truth.mask is not None and truth.mask.any() else Truth() for truth in series.truths)
    return replace(series, truths=tuple(found))


def label_of_no_class(series: CTSeries) -> CTSeries:
    return replace(
        series,
        truths=tuple(
            truth if truth.labels is None else replace(truth, labels=np.full_like(truth.labels, 2))
            for truth in series.truths
        ),
    )


def other_pixels_each_time(series: CTSeries) -> CTSeries:
    series.volume.hu[0, 0, 0] = next(NUMBERS)
    return series


def mirrored(series: CTSeries) -> CTSeries:
    affine = series.volume.affine @ np.diag([-1.0, 1, 1, 1])
    return replace(series, volume=replace(series.volume, affine=affine))


def other_patient(series: CTSeries) -> CTSeries:
    return replace(series, patient="another")


def unlisted_warning(series: CTSeries) -> CTSeries:
    return replace(series, warnings=("UNHEARD_OF",))


def load_from_working_folder(item: Item) -> CTSeries | PictureBatch:
    if not Path(item.key).exists():
        raise Refusal("UNREADABLE", "the file cannot be opened")
    return item.load()


NUMBERS = count()
WRONG_SERIES = (
    unsearched_where_empty,
    label_of_no_class,
    other_pixels_each_time,
    mirrored,
    other_patient,
    unlisted_warning,
)
WRONG_ITEMS: dict[str, Callable[[Item], Item]] = {
    "a key that changes": lambda item: replace(item, key=f"{item.key}{next(NUMBERS)}"),
    "an absolute key": lambda item: replace(item, key=f"/data/{item.key}"),
    "a load that cannot travel": lambda item: replace(item, load=lambda: item.load()),
    "a relative path": lambda item: replace(item, load=partial(load_from_working_folder, item)),
    "a patient in two splits": lambda item: replace(item, patient="one", split=SPLITS[int(item.patient[-1]) % 3]),
}


def test_the_contract_accepts_what_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So it is the changes below that it notices."""
    root = tmp_path / "raw"
    root.mkdir()
    read = partial(changed, change=lambda item: replace(item, load=partial(load_changed, item, unchanged)))
    check_reader(read, MAKERS["dicom"](root), root, monkeypatch)


@pytest.mark.parametrize("change", WRONG_SERIES)
def test_the_contract_notices_a_wrong_series(change: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "raw"
    root.mkdir()
    read = partial(changed, change=lambda item: replace(item, load=partial(load_changed, item, change)))
    with pytest.raises(AssertionError):
        check_reader(read, MAKERS["dicom"](root), root, monkeypatch)


@pytest.mark.parametrize("what", WRONG_ITEMS)
def test_the_contract_notices_a_wrong_item(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "raw"
    root.mkdir()
    with pytest.raises((AssertionError, AttributeError)):  # pickle raises the second
        check_reader(partial(changed, change=WRONG_ITEMS[what]), MAKERS["dicom"](root), root, monkeypatch)
