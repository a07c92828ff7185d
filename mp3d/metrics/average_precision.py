"""Average precision of one class by the COCO rule (``pycocotools/cocoeval.py``), at one IoU threshold."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mp3d.errors import DataError
from mp3d.metrics.boxes import box_iou
from mp3d.metrics.froc import Detections

RECALL_POINTS = np.linspace(0, 1, 101)
"""Where COCO reads the precision."""
COCO_IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""Over which COCO takes the mean."""
CHUNK = 32
"""Replicates at a time, for the sake of memory."""


def average_precision(
    detections: Sequence[Detections],
    truths: Sequence[Float[np.ndarray, "_ 4"]],
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> float:
    """Mean, over 101 recall levels, of the best precision at that recall or a higher one.

    Args:
        detections: for each image its boxes and scores, in any order; the ``max_detections`` best of an image count.
        truths: for each image its true boxes, ``(0, 4)`` where it has none.

    Raises:
        DataError: there is no true box at all (COCO gives -1 then).
    """
    image, hits = _ranked_hits(detections, truths, iou_threshold, max_detections)
    lesions = np.array([len(true_boxes) for true_boxes in truths])
    return float(_average_precisions(image, hits, lesions, np.ones((1, len(truths)), np.int64))[0])


def average_precision_replicates(
    detections: Sequence[Detections],
    truths: Sequence[Float[np.ndarray, "_ 4"]],
    weights: Int[np.ndarray, "r images"],
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> Float[np.ndarray, " r"]:
    """:func:`average_precision` under each row of weights of the images; NaN where a row has no true box."""
    image, hits = _ranked_hits(detections, truths, iou_threshold, max_detections)
    lesions = np.array([len(true_boxes) for true_boxes in truths])
    chunks = [weights[start : start + CHUNK] for start in range(0, len(weights), CHUNK)]
    return np.concatenate([_average_precisions(image, hits, lesions, chunk) for chunk in chunks])


def mean_average_precision(
    detections: Sequence[Detections],
    detected_labels: Sequence[Int[np.ndarray, " _"]],
    truths: Sequence[Float[np.ndarray, "_ 4"]],
    true_labels: Sequence[Int[np.ndarray, " _"]],
    iou_thresholds: Sequence[float] = COCO_IOU_THRESHOLDS,
) -> float:
    """Mean over thresholds and over the classes that have a true box; COCO's mAP but for its crowds, which are no
    boxes here.

    Args:
        detected_labels: class of each detection, image by image, as ``true_labels`` of the true boxes.

    Raises:
        DataError: there is no true box at all.
    """
    classes = np.unique(np.concatenate([np.zeros(0, int), *true_labels]))
    if len(classes) == 0:
        raise DataError(f"average precision is undefined: {len(truths)} images hold no true box")
    found = []
    for each in classes:
        images = [
            ((boxes[labels == each], scores[labels == each]), true_boxes[true == each])
            for (boxes, scores), labels, true_boxes, true in zip(
                detections, detected_labels, truths, true_labels, strict=True
            )
            if (labels == each).any() or (true == each).any()
        ]
        of_class, true_of_class = [image[0] for image in images], [image[1] for image in images]
        found += [average_precision(of_class, true_of_class, threshold) for threshold in iou_thresholds]
    return float(np.mean(found))


def _ranked_hits(
    detections: Sequence[Detections], truths: Sequence[np.ndarray], iou_threshold: float, max_detections: int
) -> tuple[np.ndarray, np.ndarray]:
    """Image of each detection in order of score, and whether it finds a lesion of its own."""
    if sum(len(true_boxes) for true_boxes in truths) == 0:
        raise DataError(f"average precision is undefined: {len(truths)} images hold no true box")
    all_scores, all_hits, images = [], [], []
    for number, ((boxes, scores), true_boxes) in enumerate(zip(detections, truths, strict=True)):
        order = np.argsort(-scores, kind="stable")[:max_detections]
        all_scores.append(scores[order])
        all_hits.append(_hits(boxes[order], true_boxes, iou_threshold))
        images.append(np.full(len(order), number))
    order = np.argsort(-np.concatenate(all_scores), kind="stable")
    return np.concatenate(images)[order], np.concatenate(all_hits)[order]


def _average_precisions(
    image: np.ndarray, hits: np.ndarray, lesions: np.ndarray, weights: Int[np.ndarray, "r images"]
) -> Float[np.ndarray, " r"]:
    num_lesions = weights @ lesions
    values = np.where(num_lesions > 0, 0.0, np.nan)
    if len(hits) == 0:
        return values
    of_each = weights[:, image]
    num_hits = np.cumsum(of_each * hits, axis=1)
    precision = num_hits / np.maximum(np.cumsum(of_each, axis=1), 1)
    best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    for row in np.flatnonzero(num_lesions):
        recall = num_hits[row] / num_lesions[row]
        index = np.searchsorted(recall, RECALL_POINTS, side="left")
        reached = index < len(recall)
        values[row] = np.where(reached, best_from_here[row, np.minimum(index, len(recall) - 1)], 0).mean()
    return values


def _hits(boxes: np.ndarray, true_boxes: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Which boxes, in the order given, find a true box of their own: the free one that they overlap most."""
    hits = np.zeros(len(boxes), dtype=bool)
    if len(true_boxes) == 0:
        return hits
    iou = box_iou(boxes[:, None].astype(np.float64), true_boxes[None].astype(np.float64))
    for row in range(len(boxes)):
        best = len(true_boxes) - 1 - int(np.argmax(iou[row, ::-1]))  # of equal ones the last, as in COCO
        if iou[row, best] >= iou_threshold:
            hits[row] = True
            iou[:, best] = -1  # taken
    return hits
