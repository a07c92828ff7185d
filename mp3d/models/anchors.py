"""Anchors of the region proposal network.

Differs from torchvision in three ways. The strides of the five levels are fixed at 4 to 64 pixels; torchvision divides
the padded picture by the map and gets 48 instead of 64 for the last level of 96 pixels. The anchors are float32;
torchvision takes the precision of the maps, and bfloat16 rounds a corner at 300 pixels to an even number. And corners
are not rounded to whole pixels, as in MMDetection 2: a size of 13 is 13, not 12.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from mp3d.config import DetectionHead
from mp3d.errors import ConfigError
from mp3d.models.anchor_fit import STRIDES


class PyramidAnchors(AnchorGenerator):
    """torchvision's anchors, centred on the upper left corners of the cells, on fixed strides and in float32."""

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Float[Tensor, "a 4"]:
        """Around the origin, every ratio (height over width) at every size, the ratios outermost."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (sizes / root[:, None]).flatten(), (sizes * root[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grid_sizes = [list(feature_map.shape[-2:]) for feature_map in feature_maps]
        strides = [[torch.tensor(stride)] * 2 for stride in STRIDES]
        anchors = torch.cat(self.grid_anchors(grid_sizes, strides))
        return [anchors] * len(image_list.image_sizes)


def build_anchor_generator(head: DetectionHead) -> PyramidAnchors:
    """The anchors that the config names, every ratio at every size.

    Raises:
        ConfigError: not five tuples of sizes, one for each level, of the same length; or no ratio.
    """
    sizes = head.anchor_sizes_px
    if len(sizes) != len(STRIDES) or not all(len(level) == len(sizes[0]) > 0 for level in sizes):
        raise ConfigError(
            f"model.head.anchor_sizes_px is {sizes}; it needs {len(STRIDES)} tuples of the same length, "
            "one for each level P2..P6"
        )
    if not head.anchor_ratios:
        raise ConfigError("model.head.anchor_ratios is empty; it needs at least one ratio (height over width)")
    return PyramidAnchors(sizes, (head.anchor_ratios,) * len(sizes))
