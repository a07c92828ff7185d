"""Another view of the same slices: rotated, magnified and moved in the plane, with the boxes and masks on them.

Coordinates are continuous, in pixels from the upper left edge, x before y; all slices of a clip are seen alike.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mp3d.config import UNKNOWN, AugmentConfig
from mp3d.data.series import AIR_HU
from mp3d.sample import Target


@dataclass(frozen=True)
class View:
    """Where a point comes to lie: rotated about the middle of the picture, magnified, moved.

    Attributes:
        angle_deg: positive turns the x axis towards the y axis: clockwise, as a picture is shown.
        shift: of the result, in pixels along x and y.
    """

    angle_deg: float = 0.0
    zoom: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def rotation(self) -> Float[np.ndarray, "2 2"]:
        angle = np.deg2rad(self.angle_deg)
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def draw_view(
    config: AugmentConfig, rng: np.random.Generator, size: tuple[int, int], boxes: Float[Tensor, "b 4"]
) -> View:
    """A random view in which every box stays whole: moved towards the middle, and magnified less, where it must be.

    Args:
        size: rows and columns of the picture.
    """
    height, width = size
    angle = float(rng.uniform(-config.rotation_deg, config.rotation_deg))
    zoom, wish = float(rng.uniform(*config.zoom)), rng.uniform(-1, 1, 2)
    canvas = np.array([width, height], float)
    lowest, highest = np.zeros(2), canvas
    if len(boxes):
        placed = viewed_boxes(boxes, View(angle), size).double().numpy()
        extent = placed[:, 2:].max(0) - placed[:, :2].min(0)
        zoom = min(zoom, float((canvas / extent).min()))
        placed = viewed_boxes(boxes, View(angle, zoom), size).double().numpy()
        lowest, highest = placed[:, :2].min(0), placed[:, 2:].max(0)
    shift = wish * abs(zoom - 1) * canvas / 2
    if len(boxes):
        shift = np.minimum(np.maximum(shift, -lowest), canvas - highest)
    return View(angle, zoom, (float(shift[0]), float(shift[1])))


def viewed(slices: Tensor, targets: list[Target], view: View) -> tuple[Tensor, list[Target]]:
    """Slices ``(d, h, w)`` in bilinear interpolation, masks by the nearest pixel; beyond the picture is air (black in
    colour planes), of which nobody said what it is.
    """
    if view == View():
        return slices, targets
    height, width = slices.shape[-2:]
    back = view.rotation.T / view.zoom
    moved = -back @ np.array(view.shift)
    theta = torch.tensor(
        [
            [back[0, 0], back[0, 1] * height / width, moved[0] * 2 / width],
            [back[1, 0] * width / height, back[1, 1], moved[1] * 2 / height],
        ],
        dtype=torch.float32,
    )
    grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
    fill = AIR_HU if slices.dtype == torch.int16 else 0
    seen = _sampled(slices, grid, "bilinear", fill).round_().to(slices.dtype)
    changed = []
    for target in targets:
        other = target.copy()
        if "boxes" in other:
            other["boxes"] = _clipped(viewed_boxes(other["boxes"], view, (height, width)), (height, width))
        if "mask" in other:
            other["mask"] = _sampled(other["mask"][None], grid, "nearest", UNKNOWN)[0].to(other["mask"].dtype)
        changed.append(other)
    return seen, changed


def viewed_boxes(boxes: Float[Tensor, "b 4"], view: View, size: tuple[int, int]) -> Float[Tensor, "b 4"]:
    """The box of what a box holds, taken for an ellipse that fills it: the corners of a box are seldom lesion, and
    those of a rotated one would make it grow.
    """
    middle = boxes.new_tensor([size[1] / 2, size[0] / 2])
    rotation = torch.from_numpy(view.rotation).to(boxes)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - middle
    centres = view.zoom * centres @ rotation.T + middle + boxes.new_tensor(view.shift)
    halves = (boxes[:, 2:] - boxes[:, :2]) / 2
    halves = view.zoom * (halves.square() @ rotation.square().T).sqrt()
    return torch.cat([centres - halves, centres + halves], dim=1)


def _clipped(boxes: Float[Tensor, "b 4"], size: tuple[int, int]) -> Float[Tensor, "b 4"]:
    limit = boxes.new_tensor([size[1], size[0]] * 2)
    return torch.minimum(boxes.clamp(min=0), limit)


def _sampled(planes: Tensor, grid: Tensor, mode: str, fill: float) -> Float[Tensor, "d h w"]:
    """``fill`` beyond the picture: taken off before, put back after."""
    values = planes.float().sub_(fill)
    return F.grid_sample(values[None], grid, mode=mode, padding_mode="zeros", align_corners=False)[0].add_(fill)
