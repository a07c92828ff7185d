"""A detector judged by lesions in space: boxes on slices are linked, and the 3D boxes held against the true ones.

Made for the fully annotated sub-volumes of DeepLesion, where nothing that is found may be a lesion that nobody marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import numpy as np
from jaxtyping import Float

from mp3d.evaluation.prediction_file import Predictions
from mp3d.evaluation.results import KeySliceResult
from mp3d.lesions import LinkedLesion, link_boxes, reach_in_slices, without_parts
from mp3d.metrics.froc import FrocResult, match, read_curve
from mp3d.metrics.froc_replicates import FrocIntervals, froc_intervals
from mp3d.metrics.protocols import LENS_3D

LINKED_FROM = 0.05
"""Score of the boxes that are linked: below it MULAN keeps none, and chains of them would tie lesions together."""


@dataclass(frozen=True, eq=False)
class Lesions3D:
    """FROC of 3D boxes per series or sub-volume."""

    result: FrocResult
    intervals: FrocIntervals
    num_linked: int
    num_boxes: int
    least_score: float = LINKED_FROM


def judge_lesions_3d(predictions: Predictions, num_replicates: int, seed: int) -> Lesions3D | None:
    """None where no lesion is true; of predictions for all slices.

    Where the data do not say which boxes are of one lesion, the true boxes are linked by the same rule.
    """
    found, true, patients, num_boxes = [], [], [], 0
    for _, records in groupby(predictions.records, key=attrgetter("series")):
        series: list[KeySliceResult] = list(records)
        lesions = link_series(series, predictions.grid_spacing_mm)
        boxes = np.array([lesion.box for lesion in lesions]).reshape(-1, 6)
        found.append((boxes, np.array([lesion.score for lesion in lesions])))
        true.append(true_boxes_3d(series))
        patients.append(series[0].patient)
        num_boxes += sum(len(lesion.members) for lesion in lesions)
    if not sum(map(len, true)):
        return None
    matching = match(found, true, LENS_3D)
    return Lesions3D(
        read_curve(matching, LENS_3D),
        froc_intervals(matching, patients, LENS_3D, None, num_replicates, seed),
        num_linked=len(matching.scores),
        num_boxes=num_boxes,
    )


def link_series(
    series: Sequence[KeySliceResult], grid_spacing_mm: float | None, from_score: float = LINKED_FROM
) -> list[LinkedLesion]:
    """The boxes on the slices of one series as lesions."""
    keep = [result.scores >= from_score for result in series]
    kept = list(zip(series, keep, strict=True))
    linked = link_boxes(
        boxes=np.concatenate([result.boxes[which] for result, which in kept]),
        slices=np.concatenate([np.full(int(which.sum()), result.z_index) for result, which in kept]),
        scores=np.concatenate([result.scores[which] for result, which in kept]),
        labels=np.concatenate([result.labels[which] for result, which in kept]),
        reach=reach_in_slices(series[0].spacing_mm[0], grid_spacing_mm),
    )
    return without_parts(linked)


def true_boxes_3d(series: Sequence[KeySliceResult]) -> Float[np.ndarray, "n 6"]:
    """``x1 y1 z1 x2 y2 z2``: x and y in pixels, half-open, z as slice numbers, both included."""
    boxes = np.concatenate([result.true_boxes for result in series])
    slices = np.concatenate([np.full(len(result.true_boxes), result.z_index) for result in series])
    instances = np.concatenate([result.true_instances for result in series])
    if len(instances) and not instances.all():
        labels = np.concatenate([result.true_labels for result in series])
        linked = link_boxes(boxes, slices, np.ones(len(boxes)), labels)
        return np.array([lesion.box for lesion in linked]).reshape(-1, 6)
    found = []
    for instance in np.unique(instances).tolist():
        own, numbers = boxes[instances == instance], slices[instances == instance]
        found.append(np.r_[own[:, :2].min(0), numbers.min(), own[:, 2:].max(0), numbers.max()])
    return np.array(found, float).reshape(-1, 6)
