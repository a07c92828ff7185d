"""What a configuration leaves to the training data, found before the run starts: anchors.

A run never holds the wish, only what came of it: the numbers stand in its configuration and in its checkpoints, and
the same command on the same shards finds the same numbers when it goes on.
"""

from collections.abc import Callable

import numpy as np

from mp3d.config import DetectionHead, TrainConfig
from mp3d.data.shard import open_shards
from mp3d.data.survey import read_boxes
from mp3d.errors import DataError
from mp3d.models.anchor_fit import anchors_of, coverage, evenly_spread, fit_anchors, placed_iou

REPORTED_BOXES = 5000
"""Over which the printed overlaps are told."""
WORTHWHILE = 0.01
"""Gain in mean best IoU over the validation boxes, below which given anchors are kept."""


def fit_to_data(config: TrainConfig, say: Callable[[str], None] = print) -> TrainConfig:
    """The configuration with its anchors fitted to the boxes of the training split, if it asks for that.

    Boxes are scaled as the model's first part scales the clips: to each size that training draws from. Where the fitted
    anchors meet the boxes of the validation split hardly better than the given ones, or worse, as after a fit to a
    handful of patients, the given ones are kept.

    Args:
        say: is told how well both meet the boxes of either split.

    Raises:
        DataError: no shards, or a split without boxes.
    """
    head = config.model.head
    if not isinstance(head, DetectionHead) or head.anchors == "given":
        return config
    train, val = _boxes(config, "train"), _boxes(config, "val")
    given = anchors_of(head)
    fitted = fit_anchors(train, given)
    say(f"anchors fitted to {config.shards}: {fitted.sizes_px} px, height over width {fitted.ratios}")
    gain = 0.0
    for split, boxes in (("train", train), ("val", val)):
        sample = evenly_spread(boxes, REPORTED_BOXES)
        before, after = (coverage(placed_iou(sample, anchors)) for anchors in (given, fitted))
        say(
            f"  {split}: mean best IoU {before.mean_iou:.3f} as given, {after.mean_iou:.3f} fitted; "
            f"boxes at 0.7 {before.at_70:.1%}, {after.at_70:.1%}; at 0.5 {before.at_50:.1%}, {after.at_50:.1%}"
        )
        gain = after.mean_iou - before.mean_iou
    if gain < WORTHWHILE:
        say(f"  the given anchors are kept: on val the fitted ones gain {gain:.3f}, less than {WORTHWHILE}")
        fitted = given
    return config.override(
        {
            "model.head.anchors": "given",
            "model.head.anchor_sizes_px": fitted.sizes_px,
            "model.head.anchor_ratios": fitted.ratios,
        }
    )


def _boxes(config: TrainConfig, split: str) -> np.ndarray:
    """Widths and heights at every size at which the network reads the split."""
    boxes = read_boxes(open_shards(config.shards), split)
    if len(boxes) == 0:
        raise DataError(f"split {split!r} of {config.shards} has no box; set model.head.anchors to given")
    sizes = config.augment.image_sizes if split == "train" else ()
    return np.concatenate([boxes.widths_heights_at(size) for size in sizes or (config.clip.image_size,)])
