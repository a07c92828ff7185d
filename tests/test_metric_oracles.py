"""Metrics against the libraries of the field: pycocotools, scikit-learn, MONAI."""

from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest

from mp3d.metrics.average_precision import average_precision, mean_average_precision
from mp3d.metrics.calibration import calibration
from mp3d.metrics.classification import roc_auc, roc_curve, threshold_scores, weighted_auc, weighted_threshold_scores
from mp3d.metrics.dice import dice, hausdorff_95, overlap_counts


def made_images(seed: int, num_images: int = 25, num_classes: int = 3):
    """Boxes of several classes, some doubled, some on several lesions, images without lesions or detections, ties."""
    rng = np.random.default_rng(seed)
    images = []
    for index in range(num_images):
        number = 0 if index % 7 == 3 else int(rng.integers(1, 5))
        corners = rng.uniform(0, 120, (number, 2))
        true = np.c_[corners, corners + rng.uniform(10, 60, (number, 2))]
        found = np.repeat(true, 2, axis=0) + rng.normal(0, 2, (2 * number, 4)).clip(-4, 4)
        extra = rng.uniform(0, 120, (0 if index % 5 == 1 else 6, 2))
        boxes = np.r_[found, np.c_[extra, extra + rng.uniform(10, 60, extra.shape)]]
        scores = np.round(rng.uniform(0, 1, len(boxes)), 2 if index % 2 else 6)
        labels = np.r_[
            np.repeat(rng.integers(1, num_classes + 1, number), 2), rng.integers(1, num_classes + 1, len(extra))
        ]
        images.append((true, labels[: 2 * number : 2], boxes, scores, labels))
    return images


def coco_stats(images) -> np.ndarray:
    pycocotools = pytest.importorskip("pycocotools.cocoeval", reason="pycocotools is not installed (make setup)")
    from pycocotools.coco import COCO

    truth, answers = COCO(), []
    marks = [
        (image, *of)
        for image, (true, labels, *_) in enumerate(images)
        for of in zip(true, labels.tolist(), strict=True)
    ]
    truth.dataset = {
        "images": [{"id": image} for image in range(len(images))],
        "categories": [{"id": label} for label in sorted({label for *_, label in marks})],
        "annotations": [
            {"id": i, "image_id": image, "category_id": label, "bbox": xywh(box), "area": 1.0, "iscrowd": 0}
            for i, (image, box, label) in enumerate(marks, 1)
        ],
    }
    truth.createIndex()
    for image, (_, _, boxes, scores, labels) in enumerate(images):
        for box, score, label in zip(boxes, scores.tolist(), labels.tolist(), strict=True):
            answers.append({"image_id": image, "category_id": label, "bbox": xywh(box), "score": score})
    evaluation = pycocotools.COCOeval(truth, truth.loadRes(answers), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    with redirect_stdout(StringIO()):
        evaluation.summarize()
    return evaluation.stats


def xywh(box: np.ndarray) -> list[float]:
    return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_pycocotools(seed: int):
    images = made_images(seed)
    stats = coco_stats(images)
    detections = [(boxes, scores) for _, _, boxes, scores, _ in images]
    truths, labels = [image[0] for image in images], [image[4] for image in images]
    true_labels = [image[1] for image in images]
    assert mean_average_precision(detections, labels, truths, true_labels) == pytest.approx(stats[0], abs=1e-9)
    assert mean_average_precision(detections, labels, truths, true_labels, (0.5,)) == pytest.approx(stats[1], abs=1e-9)
    one_class = [
        (true, np.ones(len(true), int), boxes, scores, np.ones(len(boxes), int)) for true, _, boxes, scores, _ in images
    ]
    assert average_precision(detections, truths) == pytest.approx(coco_stats(one_class)[1], abs=1e-9)


def made_scores(seed: int, ties: bool):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    return (np.round(scores, 1) if ties else scores), labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_two_classes_equal_scikit_learn(seed: int, ties: bool):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (make setup)")
    scores, labels = made_scores(seed, ties)
    assert roc_auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    alarms, found, thresholds = metrics.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(scores, labels), (alarms, found, thresholds), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    said = scores >= 0.5
    of = threshold_scores(scores, labels, 0.5)
    assert of.accuracy == pytest.approx(metrics.accuracy_score(labels, said))
    assert of.sensitivity == pytest.approx(metrics.recall_score(labels, said))
    assert of.specificity == pytest.approx(metrics.recall_score(labels, said, pos_label=0))
    assert of.precision == pytest.approx(metrics.precision_score(labels, said))
    assert of.f1 == pytest.approx(metrics.f1_score(labels, said))
    weights = np.random.default_rng(seed).integers(0, 4, (5, 200))
    for row, value in zip(weights, weighted_auc(scores, labels, weights), strict=True):
        assert value == pytest.approx(metrics.roc_auc_score(labels, scores, sample_weight=row), abs=1e-12)
    weighted = weighted_threshold_scores(scores, labels, 0.5, weights)
    for index, row in enumerate(weights):
        assert weighted["f1"][index] == pytest.approx(metrics.f1_score(labels, said, sample_weight=row))
        assert weighted["precision"][index] == pytest.approx(metrics.precision_score(labels, said, sample_weight=row))
    assert calibration(scores, labels == 1).brier == pytest.approx(metrics.brier_score_loss(labels, scores))


def test_reliability_equals_scikit_learn():
    frame = pytest.importorskip("sklearn.calibration", reason="scikit-learn is not installed (make setup)")
    scores, labels = made_scores(5, ties=False)
    of = calibration(scores, labels == 1)
    share, mean = frame.calibration_curve(labels, scores, n_bins=10)
    filled = of.counts > 0
    np.testing.assert_allclose(of.share_right[filled], share)
    np.testing.assert_allclose(of.mean_score[filled], mean)
    assert of.ece == pytest.approx(float((of.counts[filled] * np.abs(share - mean)).sum() / len(scores)))


@pytest.mark.acceptance
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (5.0, 0.7, 0.9)])
def test_masks_equal_monai(spacing_mm: tuple[float, float, float]):
    """MONAI takes a quarter of a minute to import, hence only among the full counts."""
    metrics = pytest.importorskip("monai.metrics", reason="MONAI is not installed (make setup)")
    import torch

    rng = np.random.default_rng(3)
    z, y, x = np.ogrid[:14, :40, :44]
    for _ in range(4):
        true, ours = (
            ((z - c[0]) / 4) ** 2 + ((y - c[1]) / 11) ** 2 + ((x - c[2]) / 8) ** 2 <= 1
            for c in (rng.uniform((5, 15, 15), (8, 24, 28)) for _ in range(2))
        )
        as_tensors = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (ours, true)]
        theirs = metrics.compute_hausdorff_distance(
            *as_tensors, include_background=True, percentile=95, spacing=list(spacing_mm)
        )
        assert hausdorff_95(ours, true, spacing_mm) == pytest.approx(float(theirs), abs=1e-5)
        overlap = metrics.compute_dice(*as_tensors, include_background=True)
        assert dice(overlap_counts(ours.astype(int), true.astype(int), 1))[0] == pytest.approx(float(overlap), abs=1e-6)
