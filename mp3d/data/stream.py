"""Which sample stands at which place of a run: a pure function of the seed.

The stream is endless shuffled passes over a split, cut into global batches and dealt to the ranks. So every rank has
the same number of steps whatever the shards look like, and a resumed run goes on with the very next sample without any
stored state.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from mp3d.data.samples import Sample

PICTURE_GROUPS_MIXED = 8
"""Row groups of pictures that are shuffled together: random order, and each group is read about once a pass."""
POSITIVES, SPARE, ORDER = 0, 1, 2
"""What a pass draws, each from a generator of its own."""


@dataclass(frozen=True)
class Place:
    """A place in the training stream: which sample, and the number that seeds its augmentation."""

    sample: int
    position: int


class Stream:
    """An endless stream of shuffled passes over the samples; ``place(i)`` is a pure function of the seed.

    A pass has as many positives as there are, and ``negatives`` times as many of the spare ones, drawn anew each time.
    Without ``kind`` it holds every positive once.

    Args:
        kind: what a sample is balanced by, such as its patient: every kind then comes equally often, and within a kind
            every sample before one comes again. Of positives and of spare ones alike.
    """

    def __init__(
        self,
        positives: Sequence[Sample],
        spare: Sequence[Sample],
        *,
        negatives: float,
        seed: int,
        kind: Callable[[Sample], Hashable] | None = None,
    ) -> None:
        self.samples = [*positives, *spare]
        self.num_positives = len(positives)
        self.num_spare = min(len(spare), round(negatives * len(positives)))
        self.seed = seed
        self._balanced = None
        if kind is not None:
            numbers = range(len(self.samples))
            self._balanced = (
                _by_kind(numbers[: self.num_positives], [kind(sample) for sample in positives]),
                _by_kind(numbers[self.num_positives :], [kind(sample) for sample in spare]),
            )
        self._pass = lru_cache(maxsize=2)(self._shuffled_pass)

    def __len__(self) -> int:
        """Samples in one pass."""
        return self.num_positives + self.num_spare

    def place(self, position: int) -> Place:
        number, offset = divmod(position, len(self))
        return Place(int(self._pass(number)[offset]), position)

    def _shuffled_pass(self, number: int) -> Int[np.ndarray, "n"]:
        rng = np.random.default_rng([self.seed, number])
        if self._balanced is None:
            spare = rng.permutation(len(self.samples) - self.num_positives)[: self.num_spare] + self.num_positives
            chosen = np.concatenate([np.arange(self.num_positives), spare])
        else:
            parts = zip(self._balanced, (self.num_positives, self.num_spare), (POSITIVES, SPARE), strict=True)
            chosen = np.concatenate(
                [
                    _balanced(groups, range(number * count, (number + 1) * count), [self.seed, part])
                    for groups, count, part in parts
                ]
            )
        if self.samples[0].entry.spacing_mm is not None:
            return rng.permutation(chosen)
        return np.concatenate(list(_locally_shuffled([(i, self.samples[i]) for i in chosen.tolist()], rng)))


def _by_kind(numbers: Iterable[int], kinds: Iterable[Hashable]) -> list[Int[np.ndarray, "_"]]:
    groups: dict[Hashable, list[int]] = {}
    for number, kind in zip(numbers, kinds, strict=True):
        groups.setdefault(kind, []).append(number)
    return [np.array(group) for group in groups.values()]


def _balanced(groups: list[Int[np.ndarray, "_"]], turns: range, seed: list[int]) -> Int[np.ndarray, "n"]:
    """Samples of a stretch of an endless sequence of rounds, each of which takes one of every group in random order; a
    group goes through its own in random order, again and again.
    """
    chosen: list[int] = []
    orders: dict[int, np.ndarray] = {}
    shuffled: dict[tuple[int, int], np.ndarray] = {}
    for turn in turns:
        number, place = divmod(turn, len(groups))
        if number not in orders:
            orders = {number: np.random.default_rng([*seed, ORDER, number]).permutation(len(groups))}
        which = int(orders[number][place])
        lap, step = divmod(number, len(groups[which]))
        if (which, lap) not in shuffled:
            shuffled[which, lap] = np.random.default_rng([*seed, which, lap]).permutation(groups[which])
        chosen.append(int(shuffled[which, lap][step]))
    return np.array(chosen, dtype=np.intp)


def _locally_shuffled(samples: list[tuple[int, Sample]], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Pictures: row groups in random order, a few of them mixed at a time, so that none is read over and over."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, sample in samples:
        groups.setdefault((sample.entry.series, sample.row // sample.entry.rows_per_group), []).append(index)
    order = [list(groups.values())[i] for i in rng.permutation(len(groups))]
    for start in range(0, len(order), PICTURE_GROUPS_MIXED):
        yield rng.permutation(np.concatenate(order[start : start + PICTURE_GROUPS_MIXED]))
