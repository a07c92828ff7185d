"""What the authors' code does by mistake: mended by default, and done again, number by number, where a switch asks.

Each mistake is written out here in plain loops from its description (CSPR: ``label_smooth_loss.py``,
``loss_from_acs.py``, ``base_dataset.py``), with nothing of ours.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mp3d.config import ClassificationHead, ClipConfig, ModelConfig, SegmentationHead
from mp3d.evaluation import ClassifiedCase
from mp3d.evaluation.case_scores import chosen_threshold, classification_scores
from mp3d.models import ClipClassifier
from mp3d.models.segmentation_losses import mask_losses
from mp3d.recipes.volumes import lidc_segmentation_paper
from mp3d.sample import Clip, Target

SMOOTHING, CLASSES = 0.1, 5


def classifier_loss(over_batch: str, count: int) -> tuple[float, list[list[float]], list[int]]:
    """The loss of a classifier, the logits that it had, the labels."""
    torch.manual_seed(0)
    head = ClassificationHead(num_classes=CLASSES, label_smoothing=SMOOTHING).override({"loss_over_batch": over_batch})
    clip = ClipConfig(num_slices=3, slice_spacing_mm=None, image_size=32)
    model = ClipClassifier(ModelConfig(backbone="mp3d18ba", width=0.0625, head=head), clip)
    clips = [Clip(torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8), (1,)) for _ in range(count)]
    labels = [index % CLASSES for index in range(count)]
    loss = model(clips, [Target(label=torch.tensor(label)) for label in labels])["loss_classification"]
    logits = [prediction["logits"].tolist() for prediction in model.eval()(clips)]
    return loss.item(), logits, labels


@pytest.mark.parametrize("count", [1, 3, 8])
def test_label_smoothing_summed_over_the_batch(count: int):
    theirs, logits, labels = classifier_loss("sum", count)
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        for number, value in enumerate(row):
            share = (1 - SMOOTHING if number == label else 0) + SMOOTHING / CLASSES
            total -= share * (value - normaliser)
    assert theirs == pytest.approx(total, rel=1e-5)
    mended, _, _ = classifier_loss("mean", count)
    assert mended == pytest.approx(total / count, rel=1e-5), "a sum multiplies the rate by the clips of a worker"


def example() -> tuple[Tensor, Tensor]:
    """Logits of two classes and masks, of one clip of two slices, wider than high."""
    torch.manual_seed(1)
    return torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randint(0, 2, (2, 3, 4))


def switched(loss: str, **changes) -> dict[str, float]:
    head = lidc_segmentation_paper().model.head
    assert isinstance(head, SegmentationHead)
    logits, masks = example()
    losses = mask_losses(logits, masks, head.override({"loss": loss, **changes}), [2])
    return {name: value.item() for name, value in losses.items()}


def test_the_softmax_over_the_wrong_axis_and_the_weights_that_nobody_reads():
    """log_softmax over the last axis, the columns of the picture, and a mean over all elements; weights 1 and 0.5
    whatever is configured (1 and 0.3).
    """
    logits, masks = example()
    cross_entropy, intersection, both = 0.0, [0.0, 0.0], [0.0, 0.0]
    for plane, rows in zip(logits.tolist(), masks.tolist(), strict=True):
        for number in range(2):
            for y, columns in enumerate(plane[number]):
                normaliser = math.log(sum(math.exp(value) for value in columns))
                for x, value in enumerate(columns):
                    true = rows[y][x] == number
                    cross_entropy -= (value - normaliser) * true / logits.numel()
                    share = math.exp(value) / sum(math.exp(plane[other][y][x]) for other in range(2))
                    intersection[number] += share * true
                    both[number] += share + true
    dice = sum((2 * i + 1) / (b + 1) for i, b in zip(intersection, both, strict=True)) / 2
    theirs = switched("lidc_authors")
    assert theirs["loss_cross_entropy"] == pytest.approx(cross_entropy)
    assert theirs["loss_dice"] == pytest.approx(0.5 * (1 - dice))
    assert switched("lidc_authors", cross_entropy_weight=7.0, dice_weight=7.0) == theirs
    mended = switched("mended")
    assert mended["loss_dice"] == pytest.approx(0.3 * (1 - dice))
    right = 0.0
    for plane, rows in zip(logits.tolist(), masks.tolist(), strict=True):
        for y, row in enumerate(rows):
            for x, label in enumerate(row):
                values = [plane[number][y][x] for number in range(2)]
                right += (math.log(sum(math.exp(value) for value in values)) - values[label]) / masks.numel()
    assert mended["loss_cross_entropy"] == pytest.approx(right)


def cases(seed: int, shift: float) -> list[ClassifiedCase]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 40)
    logits = np.stack([np.zeros(40), rng.normal(0, 1, 40) + 1.5 * labels + shift], axis=1)
    return [
        ClassifiedCase("p", f"s{i}", int(label), row) for i, (label, row) in enumerate(zip(labels, logits, strict=True))
    ]


def test_the_threshold_picked_on_the_test_set():
    """Of 0, 0.1 .. 0.9 the one with the highest sum of sensitivity and specificity on the cases that are judged."""
    judged, other = cases(1, 0.0), cases(2, -2.0)
    found = []
    for tenth in range(10):
        right = {0: 0, 1: 0}
        for case in judged:
            probability = 1 / (1 + math.exp(float(case.logits[0] - case.logits[1])))
            right[case.label] += int((probability >= tenth / 10) == bool(case.label))
        totals = [sum(case.label == label for case in judged) for label in (0, 1)]
        found.append(right[0] / totals[0] + right[1] / totals[1])
    theirs = classification_scores(judged)
    assert theirs["threshold"] == pytest.approx(found.index(max(found)) / 10)
    assert theirs["sensitivity"] + theirs["specificity"] == pytest.approx(max(found))
    chosen = chosen_threshold(other)
    assert chosen not in [tenth / 10 for tenth in range(10)]
    assert classification_scores(judged, chosen)["threshold"] == chosen
