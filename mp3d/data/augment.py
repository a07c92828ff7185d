"""Random changes of one training clip and its truth. Every function draws from the generator it is given."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mp3d.config import AugmentConfig
from mp3d.data.blocks import turned
from mp3d.data.view import View, draw_view, viewed
from mp3d.sample import Clip, Target

SHORTER_SIDE = 8 / 7
"""Of a picture over that of the square in its middle: 256 over 224."""


MIN_VISIBLE = 0.3
"""Share of a box that a crop must leave for it to stay."""


def augment(
    clip: Clip,
    targets: list[Target],
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    window: tuple[float, float] = (-1024.0, 1050.0),
    square: int | None = None,
) -> tuple[Clip, list[Target]]:
    """Apply what the config asks for; ``targets`` is per key slice and follows the order of ``clip.key_slices``.

    Args:
        window: of HU; what contrast, brightness and noise are measured by. Colour planes have 0..255.
        square: pixels of the side of a random crop; None: that of the picture.
    """
    slices, key_slices = clip.slices, clip.key_slices
    if config.crop_scale is not None:
        slices, targets = random_resized_crop(slices, targets, config.crop_scale, rng, square)
    if config.rotation_deg or config.zoom != (1.0, 1.0):
        boxes = torch.cat([target.get("boxes", torch.zeros(0, 4)) for target in targets])
        view = draw_view(config, rng, (slices.shape[-2], slices.shape[-1]), boxes)
        slices, targets = viewed(slices, targets, view)
    if config.shuffle_planes:
        slices = slices[torch.from_numpy(rng.permutation(len(slices)))]
    if rng.random() < config.horizontal_flip:
        slices, targets = slices.flip(-1), [mirrored(target, slices.shape[-1]) for target in targets]
    if rng.random() < config.z_flip:
        slices, targets = slices.flip(0), targets[::-1]
        key_slices = tuple(len(slices) - 1 - key for key in reversed(key_slices))
    return Clip(other_intensities(slices, config, rng, window), key_slices), targets


def augment_block(
    hu: Int16[np.ndarray, "d h w"],
    masks: UInt8[np.ndarray, "d h w"],
    config: AugmentConfig,
    rng: np.random.Generator,
    window: tuple[float, float],
) -> tuple[Int16[Tensor, "d h w"], UInt8[Tensor, "d h w"]]:
    """A block with its masks: quarter turns, flips, a rotation in the plane, intensities. Where it lies and how large
    it is seen was decided when it was read (:func:`mp3d.data.blocks.draw_placement`).
    """
    turned_hu, turned_masks = turned(hu, masks, config, rng)
    slices, truth = torch.from_numpy(turned_hu), torch.from_numpy(turned_masks)
    if config.rotation_deg:
        view = View(float(rng.uniform(-config.rotation_deg, config.rotation_deg)))
        slices, targets = viewed(slices, [Target(mask=plane) for plane in truth], view)
        truth = torch.stack([target["mask"] for target in targets])
    return other_intensities(slices, config, rng, window), truth


def other_intensities(
    slices: Tensor, config: AugmentConfig, rng: np.random.Generator, window: tuple[float, float]
) -> Tensor:
    """Contrast, brightness and noise, in the type that was given."""
    if (config.contrast, config.brightness, config.noise) == ((1.0, 1.0), 0.0, 0.0):
        return slices
    low, high = window if slices.dtype == torch.int16 else (0.0, 255.0)
    middle, span = (low + high) / 2, high - low
    values = (slices.float() - middle) * float(rng.uniform(*config.contrast))
    values += middle + span * float(rng.uniform(-config.brightness, config.brightness))
    if config.noise:
        drawn = rng.standard_normal(tuple(slices.shape), dtype=np.float32)
        values += span * config.noise * torch.from_numpy(drawn)
    limits = torch.iinfo(slices.dtype)
    return values.round_().clamp_(limits.min, limits.max).to(slices.dtype)


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
    """A random part of a picture with its masks and boxes, brought to one size.

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
        if "boxes" in changed:
            boxes, kept = _cut(changed["boxes"], part, size)
            changed["boxes"] = boxes
            if "labels" in changed:
                changed["labels"] = changed["labels"][kept]
        if "mask" in changed:
            nearest = InterpolationMode.NEAREST_EXACT
            changed["mask"] = F.resized_crop(changed["mask"][None], *part, size, interpolation=nearest)[0]
        cropped.append(changed)
    return F.resized_crop(planes, *part, size, antialias=True), cropped


def _cut(
    boxes: Float[Tensor, "b 4"], part: tuple[int, int, int, int], size: list[int]
) -> tuple[Float[Tensor, "k 4"], Bool[Tensor, "b"]]:
    """Boxes in the resized part, and which of the given ones they are."""
    top, left, height, width = part
    corner, limit = boxes.new_tensor([left, top] * 2), boxes.new_tensor([width, height] * 2)
    inside = torch.minimum((boxes - corner).clamp(min=0), limit)
    kept = _areas(inside) >= MIN_VISIBLE * _areas(boxes)
    scale = boxes.new_tensor([size[1] / width, size[0] / height] * 2)
    return inside[kept] * scale, kept


def _areas(boxes: Float[Tensor, "b 4"]) -> Float[Tensor, "b"]:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
