"""Files as the authors and torchvision released them, with made values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

FASTER_RCNN = {
    **{f"neck.lateral_convs.{i}.conv.weight": (32, channels, 1, 1) for i, channels in enumerate((64, 128, 256, 512))},
    **{f"neck.lateral_convs.{i}.conv.bias": (32,) for i in range(4)},
    **{f"neck.fpn_convs.{i}.conv.weight": (32, 32, 3, 3) for i in range(4)},
    **{f"neck.fpn_convs.{i}.conv.bias": (32,) for i in range(4)},
    "rpn_head.rpn_conv.weight": (32, 32, 3, 3), "rpn_head.rpn_conv.bias": (32,),
    "rpn_head.rpn_cls.weight": (3, 32, 1, 1), "rpn_head.rpn_cls.bias": (3,),
    "rpn_head.rpn_reg.weight": (12, 32, 1, 1), "rpn_head.rpn_reg.bias": (12,),
    "bbox_head.shared_fcs.0.weight": (64, 32 * 49), "bbox_head.shared_fcs.0.bias": (64,),
    "bbox_head.shared_fcs.1.weight": (64, 64), "bbox_head.shared_fcs.1.bias": (64,),
    "bbox_head.fc_cls.weight": (81, 64), "bbox_head.fc_cls.bias": (81,),
    "bbox_head.fc_reg.weight": (324, 64), "bbox_head.fc_reg.bias": (324,),
}  # fmt: skip
"""The parts of a detector of MMDetection 1 behind a backbone of basic blocks, narrow, for the 80 classes of COCO."""


def made_state(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A value for each name, positive as variances are; counters count."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.tensor(7)
        if key.endswith("num_batches_tracked")
        else torch.rand(shape, generator=generator).mul(0.1).to(dtype)
        for key, shape in shapes.items()
    }


def wrapped(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """As mmcv saves it."""
    momentum = {0: {"momentum_buffer": torch.zeros(3)}}
    return {
        "meta": {"epoch": 24, "iter": 175_000, "mmcv_version": "0.4.3", "CLASSES": ("person", "bicycle")},
        "state_dict": {prefix + key: value for key, value in state.items()},
        "optimizer": {"state": momentum, "param_groups": [{"lr": 0.02, "params": [0]}]},
    }


def save(content: Any, path: Path, old: bool = False) -> Path:
    """In the format of today, or of torch before 1.6, which the authors had."""
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path
