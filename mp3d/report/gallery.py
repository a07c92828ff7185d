"""Which key slices an evaluation report shows: lesions found, lesions missed, false positives."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mp3d.evaluation import KeySliceResult
from mp3d.metrics.protocols import FrocProtocol


@dataclass(frozen=True, eq=False)
class Exhibit:
    """One key slice worth looking at.

    Attributes:
        focus: the box it is shown for, xyxy in pixels.
        score: of the detection in question, or None where there is none.
        iou: its overlap with the lesion in question; for a false positive, with the nearest one.
        verdict: the finding in words, without scores and overlaps.
        kind: of the lesion, "" where it is not known.
        detection: index in the result of the one in question.
    """

    result: KeySliceResult
    focus: np.ndarray
    score: float | None
    iou: float
    verdict: str
    kind: str = ""
    detection: int | None = None

    @property
    def size_mm(self) -> tuple[float, float]:
        """Width and height of the focus."""
        _, row_mm, column_mm = self.result.spacing_mm
        x1, y1, x2, y2 = self.focus
        return float((x2 - x1) * column_mm), float((y2 - y1) * row_mm)


@dataclass(frozen=True, eq=False)
class Gallery:
    """Up to a few exhibits of each kind, and how many there are in all.

    Of false positives that overlap one lesion only the most confident is an exhibit, but all of them are counted.
    """

    found: list[Exhibit]
    missed: list[Exhibit]
    false_positives: list[Exhibit]
    num_found: int
    num_missed: int
    num_false_positives: int


def choose_exhibits(
    results: Sequence[KeySliceResult], threshold: float, protocol: FrocProtocol, num_each: int = 6
) -> Gallery:
    """Most confident hits, largest missed lesions and most confident false positives, different series first.

    Args:
        threshold: detections below this score are not reported; NaN: none is.
    """
    found, missed = [], []
    false_positives: dict[tuple, list[Exhibit]] = defaultdict(list)
    for result in results:
        reported = result.scores >= threshold
        iou = protocol.overlap(result.boxes[:, None], result.true_boxes[None])
        for lesion in range(len(result.true_boxes)):
            exhibit = _lesion(result, lesion, iou[:, lesion], reported, protocol.threshold)
            (found if exhibit.verdict == "found" else missed).append(exhibit)
        best_iou = iou.max(axis=1, initial=0)
        for i in np.flatnonzero(reported & (best_iou < protocol.threshold)):
            score, nearest = float(result.scores[i]), float(best_iou[i])
            exhibit = Exhibit(result, result.boxes[i], score, nearest, "false positive", detection=int(i))
            around = _lesion_key(result, int(iou[i].argmax())) if best_iou[i] > 0 else (id(exhibit),)
            false_positives[around].append(exhibit)
    shown = [_most_confident(exhibits) for exhibits in false_positives.values()]
    return Gallery(
        found=_spread(found, lambda each: each.score or 0.0)[:num_each],
        missed=_spread(missed, lambda each: each.size_mm[0] * each.size_mm[1])[:num_each],
        false_positives=_spread(shown, lambda each: each.score or 0.0)[:num_each],
        num_found=len(found),
        num_missed=len(missed),
        num_false_positives=sum(map(len, false_positives.values())),
    )


def _lesion_key(result: KeySliceResult, lesion: int) -> tuple:
    """The same for the boxes of one lesion on several slices, where that is known."""
    instance = int(result.true_instances[lesion])
    return (result.series, instance) if instance else (result.series, None, result.z_index, lesion)


def _most_confident(exhibits: Sequence[Exhibit]) -> Exhibit:
    best = max(exhibits, key=lambda each: each.score or 0.0)
    number = len(exhibits)
    return best if number == 1 else replace(best, verdict=f"false positive, best of {number} around one lesion")


def _lesion(
    result: KeySliceResult, lesion: int, iou: np.ndarray, reported: np.ndarray, iou_threshold: float
) -> Exhibit:
    box, kind = result.true_boxes[lesion], result.true_types[lesion]

    def exhibit(index: int, verdict: str) -> Exhibit:
        return Exhibit(result, box, float(result.scores[index]), float(iou[index]), verdict, kind, index)

    hits = iou >= iou_threshold
    if (hits & reported).any():
        return exhibit(int(np.argmax(np.where(hits & reported, result.scores, -1))), "found")
    if hits.any():
        return exhibit(int(np.argmax(np.where(hits, result.scores, -1))), "missed: below the threshold")
    if iou.max(initial=0) > 0:
        return exhibit(int(np.argmax(iou)), "missed: overlap too small")
    return Exhibit(result, box, None, 0.0, "missed: no detection there", kind)


def _spread(exhibits: list[Exhibit], key: Callable[[Exhibit], float]) -> list[Exhibit]:
    """Descending by ``key``, but the best of every series before the second best of any."""
    seen = Counter[str]()
    ranked = []
    for exhibit in sorted(exhibits, key=key, reverse=True):
        ranked.append((seen[exhibit.result.series], exhibit))
        seen[exhibit.result.series] += 1
    return [exhibit for _, exhibit in sorted(ranked, key=lambda each: each[0])]
