"""FROC under weights of images: bootstrap intervals, strata, and the paired test between two models.

A matching is cut down to what moves its curve, its false positives and its finds, in order of score. Every replicate is
then two cumulative sums over the same events with other weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mp3d.errors import DataError
from mp3d.metrics.bootstrap import NUM_REPLICATES, Interval, interval, patient_weights
from mp3d.metrics.froc import Matching, block_ends, read_at
from mp3d.metrics.protocols import FrocProtocol

CHUNK = 32
"""Replicates at a time, so that those of 100,000 events take 50 MB."""


@dataclass(frozen=True, eq=False)
class Events:
    """False positives and finds, in order of score.

    Attributes:
        image: of each event; ``score`` likewise.
        is_find: a lesion is found; else it is a false positive.
        lesions_per_image: how many there are to find.
    """

    image: Int[np.ndarray, " e"]
    score: Float[np.ndarray, " e"]
    is_find: Bool[np.ndarray, " e"]
    lesions_per_image: Int[np.ndarray, " images"]


@dataclass(frozen=True)
class FrocIntervals:
    """95 % intervals of a :class:`~mp3d.metrics.froc.FrocResult`: at its rates, and of the mean."""

    sensitivity_at: dict[float, Interval]
    mean_sensitivity: Interval


class PairedTest(NamedTuple):
    """Two models on the same images.

    Attributes:
        difference: of the second one's mean sensitivity from the first one's.
        interval: of the difference, by resampling patients.
        p_value: chance of such a difference, in either direction, if the models' answers for a patient could be
            swapped.
    """

    difference: float
    interval: Interval
    p_value: float


def events_of(matching: Matching, lesions: Bool[np.ndarray, " t"] | None = None) -> Events:
    """
    Args:
        lesions: which true boxes count; None: all.
    """
    counted = np.ones(matching.num_lesions, bool) if lesions is None else lesions
    found = counted & (matching.found_at < len(matching.scores))
    false_at = np.flatnonzero(matching.is_false_positive)
    at = np.r_[false_at, matching.found_at[found]]
    image = np.r_[matching.image[false_at], matching.lesion_image[found]]
    is_find = np.r_[np.zeros(len(false_at), bool), np.ones(int(found.sum()), bool)]
    order = np.argsort(at, kind="stable")
    return Events(
        image[order],
        matching.scores[at[order]],
        is_find[order],
        np.bincount(matching.lesion_image[counted], minlength=matching.num_images),
    )


def sensitivities(
    events: Events, weights: Int[np.ndarray, "r images"], protocol: FrocProtocol
) -> Float[np.ndarray, "r points"]:
    """Sensitivity at the protocol's rates under each row of weights; NaN where a row has no lesion."""
    ends = block_ends(events.score) if protocol.equal_scores == "together" else None
    sampled = np.full((len(weights), len(protocol.fps_per_image)), np.nan)
    for start in range(0, len(weights), CHUNK):
        rows = weights[start : start + CHUNK]
        of_event = rows[:, events.image]
        num_images, num_lesions = rows.sum(1), rows @ events.lesions_per_image
        false = np.cumsum(np.where(events.is_find, 0, of_event), axis=1)
        found = np.cumsum(np.where(events.is_find, of_event, 0), axis=1)
        for row in np.flatnonzero(num_lesions):
            sampled[start + row] = _read(
                false[row] / num_images[row], found[row] / num_lesions[row], ends, protocol.fps_per_image
            )
    return sampled


def mean_over(sampled: Float[np.ndarray, "r points"], protocol: FrocProtocol) -> Float[np.ndarray, " r"]:
    """The protocol's mean of what :func:`sensitivities` gives."""
    return sampled[:, [protocol.fps_per_image.index(fps) for fps in protocol.mean_over]].mean(1)


def froc_intervals(
    matching: Matching,
    patients: Sequence[str],
    protocol: FrocProtocol,
    lesions: Bool[np.ndarray, " t"] | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> FrocIntervals:
    """
    Args:
        patients: of each image.
        lesions: as of :func:`events_of`.
    """
    sampled = sensitivities(events_of(matching, lesions), patient_weights(patients, num_replicates, seed), protocol)
    columns = zip(protocol.fps_per_image, sampled.T, strict=True)
    return FrocIntervals({fps: interval(column) for fps, column in columns}, interval(mean_over(sampled, protocol)))


def stratum_sensitivities(
    matching: Matching, lesions: Bool[np.ndarray, " t"], protocol: FrocProtocol
) -> dict[float, float]:
    """Sensitivity among these lesions only, at the false positives of all images: at one operating point, that is."""
    sampled = sensitivities(events_of(matching, lesions), np.ones((1, matching.num_images), np.int32), protocol)
    return dict(zip(protocol.fps_per_image, sampled[0].tolist(), strict=True))


def paired_test(
    first: Matching,
    second: Matching,
    patients: Sequence[str],
    protocol: FrocProtocol,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> PairedTest:
    """Whether two models differ in mean sensitivity: a permutation test over patients, and a bootstrap interval.

    A permutation swaps all answers for some of the patients. Scores of two models need not mean the same, so a score is
    replaced by the false positives above it in its own model, which leaves each model's curve as it is.

    Raises:
        DataError: the two are not of the same images and lesions.
    """
    ours, theirs = events_of(first), events_of(second)
    if len(patients) != first.num_images or not np.array_equal(ours.lesions_per_image, theirs.lesions_per_image):
        raise DataError("a paired test needs two models judged on the same images with the same lesions")
    weights = patient_weights(patients, num_replicates, seed)
    ones = np.ones((1, first.num_images), np.int32)

    def mean(events: Events, weights: np.ndarray) -> np.ndarray:
        return mean_over(sensitivities(events, weights, protocol), protocol)

    difference = float((mean(theirs, ones) - mean(ours, ones))[0])
    spread = mean(theirs, weights) - mean(ours, weights)

    pooled, of_second = _pooled(ours, theirs)
    names, of_image = np.unique(list(patients), return_inverse=True)
    swapped = np.random.default_rng(seed).integers(0, 2, (num_replicates, len(names)), np.int32)[:, of_image]
    means = []
    for swap in (swapped, 1 - swapped):
        # an event counts where its model's answer stands: events of the second model lie behind the images of the first
        doubled = np.concatenate([1 - swap, swap], axis=1)
        means.append(_mean_of_doubled(pooled, of_second, doubled, first.num_images, protocol))
    chance = np.abs(means[1] - means[0])
    as_large = int((chance >= abs(difference) - 1e-12).sum())
    return PairedTest(difference, interval(spread), (1 + as_large) / (1 + num_replicates))


def _pooled(ours: Events, theirs: Events) -> tuple[Events, Bool[np.ndarray, " e"]]:
    """The events of two models in one order: by the false positives above each in its own model."""
    above = np.concatenate([np.cumsum(~events.is_find) for events in (ours, theirs)])
    of_second = np.r_[np.zeros(len(ours.image), bool), np.ones(len(theirs.image), bool)]
    is_find = np.r_[ours.is_find, theirs.is_find]
    order = np.lexsort((is_find, above))  # a false positive before the finds that follow it
    image, score = np.r_[ours.image, theirs.image], -above.astype(float)
    return Events(image[order], score[order], is_find[order], ours.lesions_per_image), of_second[order]


def _mean_of_doubled(
    pooled: Events, of_second: np.ndarray, weights: np.ndarray, num_images: int, protocol: FrocProtocol
) -> Float[np.ndarray, " r"]:
    """Mean sensitivity where each event has the weight of its image in its own model; every image is there once."""
    events = Events(
        pooled.image + num_images * of_second,
        pooled.score,
        pooled.is_find,
        np.r_[pooled.lesions_per_image, pooled.lesions_per_image],
    )
    return mean_over(sensitivities(events, weights, protocol), protocol)


def _read(fps: np.ndarray, sensitivity: np.ndarray, ends: np.ndarray | None, rates: tuple[float, ...]) -> list[float]:
    if ends is not None:
        fps, sensitivity = np.r_[0.0, fps[ends]], np.r_[0.0, sensitivity[ends]]
    return [read_at(fps, sensitivity, rate) for rate in rates]
