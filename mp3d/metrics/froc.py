"""FROC: sensitivity against false positives per image, by the rules of a protocol (:mod:`mp3d.metrics.protocols`).

The detections of all images are pooled and taken in descending order of score. In 3DCE, MULAN, AlignShift and MP3D one
that overlaps no true box of its image by the threshold is a false positive; otherwise it finds every true box that it
overlaps so, which may be several at once; one that overlaps only boxes found before is neither.

Differs from the authors' code: of equal scores, whose order theirs leaves undefined (an unstable sort), the false
positives come first, and what is found is found when all of them are in, so that no order of images and boxes changes
the curve and no point of it needs a threshold that there is not; beyond the end of the curve the last sensitivity is
repeated as in MULAN (3DCE extrapolates, the MP3D port leaves those points out); before its start it is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from mp3d.errors import DataError
from mp3d.metrics.protocols import MP3D_PORT, FrocProtocol

Detections = tuple[Float[np.ndarray, "_ corners"], Float[np.ndarray, " _"]]
"""Boxes of one image, xyxy in pixels (or xyzxyz in voxels), and their scores."""


@dataclass(frozen=True, eq=False)
class Matching:
    """Detections of all images in descending order of score, of equal scores the false positives first.

    Attributes:
        scores: one for each detection; so are ``image`` and ``is_false_positive``.
        found_at: for each true box, in order of the images, the place of the last detection with the score of the one
            that finds it; the number of detections where none does.
        lesion_image: the image of each true box.
    """

    scores: Float[np.ndarray, " d"]
    image: Int[np.ndarray, " d"]
    is_false_positive: Bool[np.ndarray, " d"]
    found_at: Int[np.ndarray, " t"]
    lesion_image: Int[np.ndarray, " t"]
    num_images: int

    @property
    def num_lesions(self) -> int:
        return len(self.found_at)


@dataclass(frozen=True, eq=False)
class FrocResult:
    """A FROC curve and the points that are quoted from it.

    Attributes:
        fps_per_image: false positives per image after each detection, ascending; one entry for each detection.
        sensitivity: share of the true boxes found by then.
        thresholds: the score of that detection, descending.
        sensitivity_at: at each of ``protocol.fps_per_image``, linear between the curve's points.
        threshold_at: the lowest score to keep so that false positives per image stay within each of these; NaN where
            even the best detection is too many (or there is none).
        mean_sensitivity: over ``protocol.mean_over``.
    """

    protocol: FrocProtocol
    fps_per_image: Float[np.ndarray, " detections"]
    sensitivity: Float[np.ndarray, " detections"]
    thresholds: Float[np.ndarray, " detections"]
    sensitivity_at: dict[float, float]
    threshold_at: dict[float, float]
    mean_sensitivity: float
    num_images: int
    num_lesions: int

    @property
    def curve(self) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
        """False positives per image and sensitivity where the protocol has points to read between."""
        if self.protocol.equal_scores == "false positives first":
            return self.fps_per_image, self.sensitivity
        ends = block_ends(self.thresholds)
        return np.r_[0.0, self.fps_per_image[ends]], np.r_[0.0, self.sensitivity[ends]]

    @property
    def last_fps_per_image(self) -> float:
        """Where the curve ends; sensitivities quoted beyond it repeat the last one."""
        return float(self.fps_per_image[-1]) if len(self.fps_per_image) else 0.0


def froc(
    detections: Sequence[Detections], truths: Sequence[np.ndarray], protocol: FrocProtocol = MP3D_PORT
) -> FrocResult:
    """The FROC curve of one set of images.

    Args:
        detections: for each image its boxes and scores, in any order.
        truths: for each image its true boxes, ``(0, 4)`` (in space ``(0, 6)``) where it has none.

    Raises:
        DataError: no image, no true box at all (sensitivity is undefined then), or a score that is not a number.
    """
    return read_curve(match(detections, truths, protocol), protocol)


def match(detections: Sequence[Detections], truths: Sequence[np.ndarray], protocol: FrocProtocol) -> Matching:
    """Which detection finds what; arguments and errors as of :func:`froc`."""
    image, boxes, scores = _pool(detections)
    truth_counts = np.array([len(each) for each in truths], dtype=np.int64)
    if len(detections) != len(truths):
        raise ValueError(f"{len(detections)} lists of detections for {len(truths)} images; there must be one for each")
    if truth_counts.sum() == 0:
        raise DataError(
            f"sensitivity is undefined: {len(truths)} images hold no true box; evaluate a split that has lesions"
        )
    if not np.isfinite(scores).all():
        raise DataError("a detection's score is not a finite number; the model has probably diverged")

    # Every pair of a detection and a true box of the same image, as two index arrays.
    pairs_per_detection = truth_counts[image]
    detection = np.repeat(np.arange(len(scores)), pairs_per_detection)
    first_pair = np.cumsum(pairs_per_detection) - pairs_per_detection
    first_truth = (np.cumsum(truth_counts) - truth_counts)[image]
    truth = np.arange(len(detection)) + np.repeat(first_truth - first_pair, pairs_per_detection)

    true_boxes = np.concatenate(truths).astype(np.float64)
    overlap = protocol.overlap(boxes[detection], true_boxes[truth])
    near = overlap >= protocol.threshold
    detection, truth, overlap = detection[near], truth[near], overlap[near]
    order = _ranked(scores, boxes, detection, overlap)
    place = np.empty(len(scores), np.int64)
    place[order] = np.arange(len(scores))
    image, scores, detection = image[order], scores[order], place[detection]
    found_at = np.full(len(true_boxes), len(scores))
    if protocol.further_hits == "ignored":
        is_hit = np.bincount(detection, minlength=len(scores)) > 0
        np.minimum.at(found_at, truth, detection)
    else:
        by_corners = np.empty(len(true_boxes), np.int64)
        by_corners[np.lexsort(true_boxes.T)] = np.arange(len(true_boxes))
        first = np.lexsort((-by_corners[truth], -overlap, detection))
        is_hit = _match_one_to_one(detection[first], truth[first], found_at, len(scores))
    ends = block_ends(scores)
    block = np.searchsorted(ends, np.arange(len(scores) + 1))
    order = np.lexsort((is_hit, block[:-1]))
    found_at = np.r_[ends, len(scores)][block[found_at]]
    lesion_image = np.repeat(np.arange(len(truths)), truth_counts)
    return Matching(scores, image[order], ~is_hit[order], found_at, lesion_image, len(truths))


def read_curve(matching: Matching, protocol: FrocProtocol) -> FrocResult:
    """The curve of a matching, and the protocol's points on it."""
    num_detections = len(matching.scores)
    found = np.bincount(matching.found_at, minlength=num_detections)[:num_detections]
    fps_per_image = np.cumsum(matching.is_false_positive) / matching.num_images
    sensitivity = np.cumsum(found) / matching.num_lesions
    ends = block_ends(matching.scores)
    result = FrocResult(
        protocol=protocol,
        fps_per_image=fps_per_image,
        sensitivity=sensitivity,
        thresholds=matching.scores,
        sensitivity_at={},
        threshold_at={
            fps: _lowest_score(fps_per_image[ends], matching.scores[ends], fps) for fps in protocol.fps_per_image
        },
        mean_sensitivity=0.0,
        num_images=matching.num_images,
        num_lesions=matching.num_lesions,
    )
    at = {fps: read_at(*result.curve, fps) for fps in protocol.fps_per_image}
    mean = float(np.mean([at[fps] for fps in protocol.mean_over]))
    return replace(result, sensitivity_at=at, mean_sensitivity=mean)


def read_at(fps_per_image: np.ndarray, sensitivity: np.ndarray, fps: float) -> float:
    """Linear interpolation; where several points share one false positive count, the highest sensitivity there.

    That is what ``scipy.interpolate.interp1d`` does inside the curve. Outside it the first and the last value are
    repeated; a curve that does not start at 0 false positives starts with one, and so with a sensitivity of 0.
    """
    return float(np.interp(fps, fps_per_image, sensitivity)) if len(fps_per_image) else 0.0


def block_ends(scores: Float[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """The last place of each run of equal scores."""
    return np.flatnonzero(np.diff(scores, append=-np.inf))


def _pool(detections: Sequence[Detections]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image index, box and score of every detection; float64, so that the given precision decides nothing."""
    if not detections:
        raise DataError("there is no image to evaluate; the split is empty")
    counts = [len(scores) for _, scores in detections]
    if counts != [len(boxes) for boxes, _ in detections]:
        raise ValueError("every detection needs one box and one score; an image has more of one than of the other")
    image = np.repeat(np.arange(len(detections)), counts)
    boxes = np.concatenate([boxes for boxes, _ in detections]).astype(np.float64)
    return image, boxes, np.concatenate([scores for _, scores in detections]).astype(np.float64)


def _ranked(scores: np.ndarray, boxes: np.ndarray, detection: np.ndarray, overlap: np.ndarray) -> Int[np.ndarray, " d"]:
    """The detections by descending score; of equal scores the one first that overlaps a true box most, then by their
    corners. What is equal in all of this may change places.

    Args:
        detection: of each pair with a true box that is near enough, with its ``overlap``.
    """
    most = np.zeros(len(scores))
    np.maximum.at(most, detection, overlap)
    return np.lexsort((*boxes.T, -most, -scores))


def _match_one_to_one(
    detection: np.ndarray, truth: np.ndarray, found_at: np.ndarray, num_detections: int
) -> Bool[np.ndarray, " d"]:
    """In order of score, each detection takes the free true box that it overlaps most, of equal ones that of the larger
    corners (COCO's loop: the last that is listed); fills ``found_at``.

    Args:
        detection: of each pair with a ``truth`` that is near enough, in the order in which they are to be tried.
    """
    is_hit = np.zeros(num_detections, dtype=bool)
    for found, true in zip(detection.tolist(), truth.tolist(), strict=True):
        if not is_hit[found] and found_at[true] == num_detections:
            is_hit[found] = True
            found_at[true] = found
    return is_hit


def _lowest_score(fps_per_image: np.ndarray, scores: np.ndarray, fps: float) -> float:
    """Lowest score of which *all* detections from it on stay within ``fps``; equal scores stand or fall together."""
    within = int(np.searchsorted(fps_per_image, fps, side="right"))
    return float(scores[within - 1]) if within else float("nan")
