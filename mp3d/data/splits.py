"""Which patient is in which split; no patient is ever in two."""

import math
from collections.abc import Sequence
from hashlib import blake2b

from mp3d.data.source import Item
from mp3d.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")

SplitFractions = tuple[float, float, float]
"""Shares of the patients in train, val and test."""


def assign_splits(items: Sequence[Item], fractions: SplitFractions, seed: int) -> dict[str, str]:
    """The split of every patient.

    A split that the data set itself gives is kept. All other patients are put in an order that depends on the seed and
    their own name only, and cut by the fractions; with enough patients every split with a fraction above 0 gets one.

    Raises:
        ConfigError: the fractions are no shares of 1.
        DataError: the data set puts one patient in two splits, or in one that is not of :data:`SPLITS`; the message
            counts items in the order given and names none.
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ConfigError(f"split fractions are {fractions}; they must be shares of train, val and test that sum to 1")
    official: dict[str, tuple[int, str]] = {}
    for number, item in enumerate(items, 1):  # keys may name patients, and messages go into logs
        if item.split is None:
            continue
        if item.split not in SPLITS:
            known = ", ".join(SPLITS)
            raise DataError(f"item {number} of {len(items)} is in split {item.split!r}; splits are {known}")
        first, split = official.setdefault(item.patient, (number, item.split))
        if split != item.split:
            raise DataError(
                f"one patient is in two splits: item {first} of {len(items)} in {split}, item {number} in "
                f"{item.split}; mend the splits of the data set"
            )
    drawn = sorted({item.patient for item in items} - official.keys(), key=lambda patient: _place(patient, seed))
    names = [name for name, size in zip(SPLITS, _sizes(len(drawn), fractions), strict=True) for _ in range(size)]
    return {patient: split for patient, (_, split) in official.items()} | dict(zip(drawn, names, strict=True))


def _place(patient: str, seed: int) -> tuple[bytes, str]:
    return blake2b(f"{seed}/{patient}".encode(errors="surrogateescape")).digest(), patient


def _sizes(count: int, fractions: SplitFractions) -> list[int]:
    """Largest-remainder rounding, then at least one for each wanted split if there are enough."""
    shares = [count * fraction for fraction in fractions]
    sizes = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (sizes[i] - shares[i], i))
    for i in by_remainder[: count - sum(sizes)]:
        sizes[i] += 1
    wanted = [i for i, fraction in enumerate(fractions) if fraction > 0]
    if count >= len(wanted):
        for i in wanted:
            if sizes[i] == 0:
                sizes[sizes.index(max(sizes))] -= 1
                sizes[i] = 1
    return sizes
