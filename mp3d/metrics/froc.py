"""FROC on key slices: sensitivity against false positives per image (MP3D port, ``lesion.py``; 3DCE; MULAN).

The detections of all images are pooled and taken in descending order of score. One that overlaps no true box of its
image by the IoU threshold is a false positive; otherwise it finds every true box that it overlaps so, which may be
several at once. One that overlaps only boxes found before is neither a hit nor a false positive.

Published figures differ by protocol more than by method, so a :class:`FrocProtocol` is part of every result.

Differs from the authors' code: equal scores keep their order (theirs is undefined, an unstable sort); beyond the end of
the curve the last sensitivity is repeated as in MULAN (3DCE extrapolates, the MP3D port leaves those points out);
before its start it is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mp3d.errors import DataError
from mp3d.metrics.boxes import box_iou

Detections = tuple[Float[np.ndarray, "_ 4"], Float[np.ndarray, " _"]]
"""Boxes of one image, xyxy in pixels, and their scores."""


@dataclass(frozen=True)
class FrocProtocol:
    """The rules behind a FROC figure.

    Attributes:
        name: how the protocol is called in outputs.
        iou_threshold: a true box is found from this overlap on.
        plus_one: IoU with widths of ``x2 - x1 + 1``.
        fps_per_image: where the sensitivity is read, ascending.
        mean_over: those of them that enter the mean.
    """

    name: str
    iou_threshold: float
    plus_one: bool
    fps_per_image: tuple[float, ...]
    mean_over: tuple[float, ...]

    def __post_init__(self) -> None:
        if not set(self.mean_over) <= set(self.fps_per_image):
            raise ValueError(f"mean_over {self.mean_over} must be among fps_per_image {self.fps_per_image}")


MP3D_PORT = FrocProtocol(
    name="MP3D port",
    iou_threshold=0.5,
    plus_one=False,
    fps_per_image=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    mean_over=(0.5, 1.0, 2.0, 4.0),
)
"""The authors' port to MMDetection 2 (``lesion.py``): no extra pixel. Our default."""

THREE_DCE_MULAN = FrocProtocol(
    name="3DCE/MULAN",
    iou_threshold=0.5,
    plus_one=True,
    fps_per_image=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    mean_over=(0.5, 1.0, 2.0, 4.0),
)
"""3DCE, MULAN, AlignShift, A3D and SATr: one extra pixel in every width and height."""


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
    def last_fps_per_image(self) -> float:
        """Where the curve ends; sensitivities quoted beyond it repeat the last one."""
        return float(self.fps_per_image[-1]) if len(self.fps_per_image) else 0.0


def froc(
    detections: Sequence[Detections], truths: Sequence[Float[np.ndarray, "_ 4"]], protocol: FrocProtocol = MP3D_PORT
) -> FrocResult:
    """The FROC curve of one set of images.

    Args:
        detections: for each image its boxes and scores, in any order.
        truths: for each image its true boxes, ``(0, 4)`` where it has none.

    Raises:
        DataError: no image, no true box at all (sensitivity is undefined then), or a score that is not a number.
    """
    image, boxes, scores = _pool(detections)
    truth_counts = np.array([len(each) for each in truths], dtype=np.int64)
    num_images, num_lesions = len(truths), int(truth_counts.sum())
    if len(detections) != num_images:
        raise ValueError(f"{len(detections)} lists of detections for {num_images} images; there must be one for each")
    if num_lesions == 0:
        raise DataError(
            f"sensitivity is undefined: {num_images} images hold no true box; evaluate a split that has lesions"
        )
    if not np.isfinite(scores).all():
        raise DataError("a detection's score is not a finite number; the model has probably diverged")

    order = np.argsort(-scores, kind="stable")
    image, boxes, scores = image[order], boxes[order], scores[order]

    # Every pair of a detection and a true box of the same image, as two index arrays.
    pairs_per_detection = truth_counts[image]
    detection = np.repeat(np.arange(len(scores)), pairs_per_detection)
    first_pair = np.cumsum(pairs_per_detection) - pairs_per_detection
    first_truth = (np.cumsum(truth_counts) - truth_counts)[image]
    truth = np.arange(len(detection)) + np.repeat(first_truth - first_pair, pairs_per_detection)

    true_boxes = np.concatenate(truths).astype(np.float64)
    overlaps = box_iou(boxes[detection], true_boxes[truth], protocol.plus_one) >= protocol.iou_threshold
    is_false_positive = np.bincount(detection[overlaps], minlength=len(scores)) == 0
    # The rank of the first detection that finds each true box; past the end where none does.
    found_by = np.full(num_lesions, len(scores))
    np.minimum.at(found_by, truth[overlaps], detection[overlaps])

    fps_per_image = np.cumsum(is_false_positive) / num_images
    sensitivity = np.cumsum(np.bincount(found_by, minlength=len(scores))[: len(scores)]) / num_lesions
    sensitivity_at = {fps: _read_curve(fps_per_image, sensitivity, fps) for fps in protocol.fps_per_image}
    return FrocResult(
        protocol=protocol,
        fps_per_image=fps_per_image,
        sensitivity=sensitivity,
        thresholds=scores,
        sensitivity_at=sensitivity_at,
        threshold_at={fps: _lowest_score(fps_per_image, scores, fps) for fps in protocol.fps_per_image},
        mean_sensitivity=float(np.mean([sensitivity_at[fps] for fps in protocol.mean_over])),
        num_images=num_images,
        num_lesions=num_lesions,
    )


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


def _read_curve(fps_per_image: np.ndarray, sensitivity: np.ndarray, fps: float) -> float:
    """Linear interpolation; where several points share one false positive count, the highest sensitivity there.

    That is what ``scipy.interpolate.interp1d`` does inside the curve. Outside it the first and the last value are
    repeated; a curve that does not start at 0 false positives starts with one, and so with a sensitivity of 0.
    """
    if len(fps_per_image) == 0:
        return 0.0
    return float(np.interp(fps, fps_per_image, sensitivity))


def _lowest_score(fps_per_image: np.ndarray, scores: np.ndarray, fps: float) -> float:
    """Lowest score of which *all* detections from it on stay within ``fps``; equal scores stand or fall together."""
    block_ends = np.flatnonzero(np.diff(scores, append=-np.inf))
    within = int(np.searchsorted(fps_per_image[block_ends], fps, side="right"))
    return float(scores[block_ends[within - 1]]) if within else float("nan")
