"""Any recipe so small that it runs through in well under a minute on a CPU and still learns.

Kept: the family and depth of the backbone, norm, strides, head, decoder, losses, kind of clip (window, slab, block,
picture), augmentations and schedule. Shrunk: channels, pixels, batch, epochs. Other: AdamW, whatever the recipe's
optimiser, because nothing else learns in so few steps; one local process; plain made data (``mp3d/data/smoke_world``).
"""

from collections.abc import Callable
from typing import Any

from mp3d.config import DetectionHead, LaunchConfig, SegmentationHead, TrackingConfig, TrainConfig

SUFFIX = "_smoke"
SMOKE_WORLD = "data/smoke"
"""Where smoke sizes look for their shards, which jobs make there if they are missing."""
DETECTION = {
    "fpn_channels": 16,
    "box_features": 32,
    "anchor_sizes_px": ((6, 9), (12, 16), (20, 24), (28, 32), (40, 48)),
    "anchor_ratios": (1.0,),
    "rpn_pre_nms": (50, 50),
    "rpn_post_nms": (30, 20),
    "rpn_samples": 32,
    "box_samples": 32,
    "num_classes": 1,
}


def smoke(config: TrainConfig) -> TrainConfig:
    """The same recipe at smoke size."""
    head, clip = config.model.head, config.clip
    picture = clip.slice_spacing_mm is None
    changes: dict[str, Any] = {
        "name": config.name + SUFFIX,
        "init_from": None,
        "model.width": 0.125,
        "augment.image_sizes": (24, 32) if config.augment.image_sizes else (),
        "clip.image_size": 32,
        "optim.algorithm": "adamw",
        "optim.lr": 3e-3,
        "optim.lr_batch": None,
        "optim.weight_decay": 0.01,
        "optim.warmup_steps": min(2, config.optim.warmup_steps),
        "optim.milestones": (2,),
        "optim.min_lr": min(1e-6, config.optim.min_lr),
        "loop.epochs": 3,
        "loop.batch_size": 4,
        "loop.num_workers": 1,
        "loop.steps_per_epoch": 12,
        "loop.max_validation_clips": None,
        "launch": LaunchConfig(runner="local"),
        "tracking": TrackingConfig(mode="disabled"),
    }
    match head:
        case DetectionHead():
            kind = "objects" if picture else "lesions"
            changes |= {f"model.head.{name}": value for name, value in DETECTION.items()}
            changes["loop.batch_size"] = 2
            changes["loop.steps_per_epoch"] = 30
        case SegmentationHead():
            kind = "objects" if picture else "organs"
            changes["model.head.num_classes"] = 1
            changes["loop.steps_per_epoch"] = 30
        case _:
            kind = "classes" if picture else "nodules"
            changes["model.head.num_classes"] = 2
    if clip.block is not None:  # cubes of 24 mm
        cube = {"num_slices": 16, "image_size": 16, "slice_spacing_mm": 1.5, "pixel_spacing_mm": 1.5}
        changes |= {f"clip.{name}": value for name, value in cube.items()}
        changes["augment.shift_px"] = (1, 2)
    return config.override({"shards": f"{SMOKE_WORLD}/{kind}", **changes})


def smoke_of(recipe: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """The recipe ``..._smoke``."""

    def shrunk() -> TrainConfig:
        return smoke(recipe())

    shrunk.__name__ = recipe.__name__ + SUFFIX
    shrunk.__doc__ = f"{recipe.__name__} at smoke size, on made data; a minute at most on a CPU."
    return shrunk
