"""Random changes of one training clip and its truth. Every function draws from the generator it is given."""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mp3d.config import AugmentConfig
from mp3d.sample import Clip, Target

SHORTER_SIDE = 8 / 7
"""Of a picture over that of the square in its middle: 256 over 224."""


def augment(
    clip: Clip, targets: list[Target], config: AugmentConfig, rng: np.random.Generator, square: int | None = None
) -> tuple[Clip, list[Target]]:
    """Apply what the config asks for; ``targets`` is per key slice and follows the order of ``clip.key_slices``.

    Args:
        square: pixels of the side of a random crop; None: that of the picture.
    """
    slices, key_slices = clip.slices, clip.key_slices
    if config.crop_scale is not None:
        slices, targets = random_resized_crop(slices, targets, config.crop_scale, rng, square)
    if config.shuffle_planes:
        slices = slices[torch.from_numpy(rng.permutation(len(slices)))]
    if rng.random() < config.horizontal_flip:
        slices, targets = slices.flip(-1), [mirrored(target, slices.shape[-1]) for target in targets]
    if rng.random() < config.z_flip:
        slices, targets = slices.flip(0), targets[::-1]
        key_slices = tuple(len(slices) - 1 - key for key in reversed(key_slices))
    return Clip(slices, key_slices), targets


def mirrored(target: Target, width: int) -> Target:
    """Left and right swapped: with half-open boxes ``x' = width - x``."""
    changed = target.copy()
    if "boxes" in changed:
        x1, y1, x2, y2 = changed["boxes"].unbind(1)
        changed["boxes"] = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    if "mask" in changed:
        changed["mask"] = changed["mask"].flip(-1)
    return changed


def random_resized_crop(
    planes: Tensor,
    targets: list[Target],
    scale: tuple[float, float],
    rng: np.random.Generator,
    square: int | None = None,
) -> tuple[Tensor, list[Target]]:
    """A random part of a picture and its masks, brought to one size. Boxes stay as they are: a detector's pictures are
    not cropped.

    Args:
        planes: ``(3, h, w)`` uint8.
        scale: least and greatest area of the part, as a share of the picture.
        square: pixels of the side of what it becomes, its sides up to 4:3 apart before; None: as large as the picture,
            its aspect ratio up to 4:3 away from the picture's.
    """
    height, width = planes.shape[-2:]
    side = np.sqrt(rng.uniform(*scale) * height * width)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))) * (1 if square else width / height)
    crop_height = min(height, max(1, round(float(side / np.sqrt(ratio)))))
    crop_width = min(width, max(1, round(float(side * np.sqrt(ratio)))))
    top = int(rng.integers(height - crop_height + 1))
    left = int(rng.integers(width - crop_width + 1))
    size = [square, square] if square else [height, width]
    return _cropped(planes, targets, (top, left, crop_height, crop_width), size)


def middle_square(planes: Tensor, targets: list[Target], size: int) -> tuple[Tensor, list[Target]]:
    """The square in the middle of a picture and its masks: 7/8 of the shorter side, brought to ``size`` pixels."""
    height, width = planes.shape[-2:]
    side = max(1, round(min(height, width) / SHORTER_SIDE))
    part = ((height - side) // 2, (width - side) // 2, side, side)
    return _cropped(planes, targets, part, [size, size])


def _cropped(
    planes: Tensor, targets: list[Target], part: tuple[int, int, int, int], size: list[int]
) -> tuple[Tensor, list[Target]]:
    """``part`` is top, left, height and width."""
    cropped = []
    for target in targets:
        changed = target.copy()
        if "mask" in changed:
            nearest = InterpolationMode.NEAREST_EXACT
            changed["mask"] = F.resized_crop(changed["mask"][None], *part, size, interpolation=nearest)[0]
        cropped.append(changed)
    return F.resized_crop(planes, *part, size, antialias=True), cropped
