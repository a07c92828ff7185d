"""What a configuration leaves to the training data, found before the run starts: anchors.

A run never holds the wish, only what came of it: the numbers stand in its configuration and in its checkpoints, and
the same command on the same shards finds the same numbers when it goes on.
"""

from collections.abc import Callable

import numpy as np

from mp3d.config import DetectionHead, TrainConfig
from mp3d.data.shard import open_shards
from mp3d.data.survey import BoxTable, read_boxes
from mp3d.errors import DataError
from mp3d.models.anchor_fit import anchors_of, coverage, evenly_spread, fit_anchors, placed_iou

REPORTED_BOXES = 5000
"""Over which the printed overlaps are told."""


def fit_to_data(config: TrainConfig, say: Callable[[str], None] = print) -> TrainConfig:
    """The configuration with its anchors fitted to the boxes of the training split, if it asks for that.

    Boxes are scaled as the model's first part scales the clips: to each size that training draws from.

    Args:
        say: is told how well the anchors meet the boxes of training and validation, before and after.

    Raises:
        DataError: no shards, or no box in the training split.
    """
    head = config.model.head
    if not isinstance(head, DetectionHead) or head.anchors == "given":
        return config
    shards = open_shards(config.shards)
    boxes = {split: read_boxes(shards, split) for split in ("train", "val")}
    if len(boxes["train"]) == 0:
        raise DataError(f"split 'train' of {config.shards} has no box; anchors cannot be fitted to it")
    image_sizes = {"train": config.augment.image_sizes or (config.clip.image_size,), "val": (config.clip.image_size,)}
    seen = {split: _at_sizes(boxes[split], image_sizes[split]) for split in boxes}
    given = anchors_of(head)
    fitted = fit_anchors(seen["train"], given)
    say(f"anchors fitted to {len(boxes['train'])} boxes: {fitted.sizes_px} px, height over width {fitted.ratios}")
    for split, widths_heights in seen.items():
        if len(widths_heights):
            sample = evenly_spread(widths_heights, REPORTED_BOXES)
            before, after = (coverage(placed_iou(sample, anchors)) for anchors in (given, fitted))
            say(
                f"  {split}: mean best IoU {before.mean_iou:.3f} -> {after.mean_iou:.3f}, of the boxes "
                f"{before.at_70:.1%} -> {after.at_70:.1%} at 0.7, {before.at_50:.1%} -> {after.at_50:.1%} at 0.5"
            )
    return config.override(
        {
            "model.head.anchors": "given",
            "model.head.anchor_sizes_px": fitted.sizes_px,
            "model.head.anchor_ratios": fitted.ratios,
        }
    )


def _at_sizes(boxes: BoxTable, image_sizes: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([boxes.widths_heights_at(size) for size in image_sizes])
