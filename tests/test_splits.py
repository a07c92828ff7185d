"""Patients and splits."""

from dataclasses import replace

import pytest

from mp3d.data.source import Item
from mp3d.data.splits import assign_splits
from mp3d.errors import ConfigError, DataError

FRACTIONS = (0.7, 0.15, 0.15)


def items(patients: int, split: str | None = None, first: int = 0) -> list[Item]:
    return [
        Item(f"{i}/{series}", f"p{i}", split, lambda: pytest.fail("splits need no pixels"))
        for i in range(first, first + patients)
        for series in range(2)
    ]


def canaries(split: str) -> list[Item]:
    return [replace(item, key=f"CANARY/{item.key}", patient="CANARY") for item in items(1, split)]


def sizes(splits: dict[str, str]) -> list[int]:
    return [list(splits.values()).count(split) for split in ("train", "val", "test")]


@pytest.mark.parametrize(
    ("patients", "expected"),
    [(0, [0, 0, 0]), (1, [1, 0, 0]), (2, [2, 0, 0]), (3, [1, 1, 1]), (4, [2, 1, 1]), (10, [7, 2, 1]), (20, [14, 3, 3])],
)
def test_sizes_are_fair(patients, expected):
    assert sizes(assign_splits(items(patients), FRACTIONS, 0)) == expected


@pytest.mark.parametrize("patients", range(3, 60))
def test_sizes_are_within_one_of_the_fractions_and_none_is_empty(patients):
    got = sizes(assign_splits(items(patients), FRACTIONS, 0))
    assert sum(got) == patients
    assert min(got) >= 1
    assert patients < 7 or max(abs(n - patients * f) for n, f in zip(got, FRACTIONS, strict=True)) < 1


def test_a_split_that_is_not_wanted_stays_empty():
    assert sizes(assign_splits(items(10), (0, 0, 1), 0)) == [0, 0, 10]
    assert sizes(assign_splits(items(2), (0.99, 0.01, 0), 0)) == [1, 1, 0]


def test_draw_depends_on_the_seed_and_not_on_the_order():
    drawn = assign_splits(items(30), FRACTIONS, 0)
    assert drawn == assign_splits(items(30)[::-1], FRACTIONS, 0)
    assert drawn != assign_splits(items(30), FRACTIONS, 1)


def test_official_split_is_kept_also_for_other_series_of_the_patient():
    mixed = [*items(3, "test"), *items(3), *items(4, first=10)]
    splits = assign_splits(mixed, FRACTIONS, 0)
    assert {splits[f"p{i}"] for i in range(3)} == {"test"}
    assert sizes({p: s for p, s in splits.items() if int(p[1:]) >= 10}) == [2, 1, 1]


def test_one_patient_in_two_splits_is_refused_and_not_named():
    told = "one patient is in two splits: item 3 of 6 in train, item 5 in val; mend"
    with pytest.raises(DataError, match=told) as refused:
        assign_splits([*items(1), *canaries("train"), *canaries("val")], FRACTIONS, 0)
    assert "CANARY" not in str(refused.value)


def test_unknown_split_is_refused_and_nobody_named():
    with pytest.raises(DataError, match="item 3 of 4 is in split 'valid'; splits are train, val, test") as refused:
        assign_splits([*items(1), *canaries("valid")], FRACTIONS, 0)
    assert "CANARY" not in str(refused.value)


@pytest.mark.parametrize("fractions", [(0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)])
def test_fractions_are_shares(fractions):
    with pytest.raises(ConfigError, match="sum to 1"):
        assign_splits(items(1), fractions, 0)
