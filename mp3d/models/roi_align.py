"""RoIAlign and the first layer behind it on a CPU, many times faster than torchvision's; the same numbers.

torchvision's kernel for CPUs reads a channel at a time from maps that must be brought into that order first. Here a
cell of the channels-last maps is a row of a table, a bin of a box a *bag* of sixteen rows (2 x 2 samples, each mixed
from four cells), and ``embedding_bag`` adds them up: one call for all boxes, levels and key slices. It is used where
nothing is trained; a GPU and training have torchvision's.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from mp3d.models.folded import PIXEL_BATCH

ROI_SIZE = 7
SAMPLES = 2
"""Per bin and axis."""
ROI_LEVELS = ("0", "1", "2", "3")
ROI_STRIDES = (4, 8, 16, 32)


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's on P2..P5, with its scales and levels fixed."""

    def __init__(self) -> None:
        super().__init__(list(ROI_LEVELS), output_size=ROI_SIZE, sampling_ratio=SAMPLES)
        # torchvision would infer the scales from its first batch, and wrongly where much of a small picture is padding.
        self.scales = [1 / stride for stride in ROI_STRIDES]
        self.map_levels = initLevelMapper(2, 5, self.canonical_scale, self.canonical_level)

    def forward(
        self, x: Mapping[str, Float[Tensor, "k c _ _"]], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Float[Tensor, "r c 7 7"]:
        """Args: ``boxes``, xyxy in pixels, one tensor for each key slice. On a CPU the answer is channels-last."""
        maps = [x[level] for level in ROI_LEVELS]
        if maps[0].device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(cast(dict[str, Tensor], x), boxes, image_shapes)
        return _align(maps, boxes, cast(Tensor, self.map_levels(boxes)))


class RoIMLP(TwoMLPHead):
    """torchvision's two layers, of which the first takes channels-last features as they are.

    A layer is a 7 x 7 convolution of what it sees, and that a 1 x 1 one of pixels with 49 times the channels: oneDNN's
    are on some processors twice as fast as a product of matrices, and on none slower.
    """

    def forward(self, x: Float[Tensor, "r c 7 7"]) -> Float[Tensor, "r f"]:
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        weight = self.fc6.weight.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1)
        x = x.permute(0, 2, 3, 1).flatten(1)
        whole = len(x) // PIXEL_BATCH * PIXEL_BATCH
        hidden = [F.linear(x[whole:], weight, self.fc6.bias)]
        if whole:
            pixels = x[:whole].unflatten(0, (PIXEL_BATCH, -1)).transpose(1, 2).unsqueeze(3)
            convolved = F.conv2d(pixels, weight[:, :, None, None], self.fc6.bias)
            hidden = [convolved.squeeze(3).transpose(1, 2).flatten(0, 1), *hidden]
        return F.relu(self.fc7(F.relu(torch.cat(hidden))))


def _align(
    maps: Sequence[Float[Tensor, "k c _ _"]], boxes: Sequence[Float[Tensor, "_ 4"]], levels: Int64[Tensor, " r"]
) -> Float[Tensor, "r c 7 7"]:
    """One bag for each bin of each box, in a table of all cells of all maps."""
    num_slices, channels = maps[0].shape[:2]
    table = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels).float() for level in maps])
    heights, widths = (torch.tensor([level.shape[axis] for level in maps])[levels] for axis in (2, 3))
    cells = torch.tensor([level.shape[2] * level.shape[3] for level in maps])
    first = torch.cumsum(cells * num_slices, 0) - cells * num_slices
    of_slice = torch.repeat_interleave(torch.arange(num_slices), torch.tensor([len(each) for each in boxes]))
    x1, y1, x2, y2 = (torch.cat(list(boxes)).float() / torch.tensor(ROI_STRIDES)[levels, None]).unbind(1)
    rows, row_shares = _bins(y1, y2, heights)
    columns, column_shares = _bins(x1, x2, widths)
    start = (first[levels] + of_slice * cells[levels])[:, None, None, None, None]
    lines = start + rows[:, :, None, :, None] * widths[:, None, None, None, None]
    bags = (lines + columns[:, None, :, None, :]).flatten(3).flatten(0, 2)
    shares = (row_shares[:, :, None, :, None] * column_shares[:, None, :, None, :]).flatten(3).flatten(0, 2)
    features = F.embedding_bag(bags, table, mode="sum", per_sample_weights=shares)
    return features.view(len(levels), ROI_SIZE, ROI_SIZE, channels).permute(0, 3, 1, 2)


def _bins(
    low: Float[Tensor, " r"], high: Float[Tensor, " r"], cells: Int64[Tensor, " r"]
) -> tuple[Int64[Tensor, "r 7 4"], Float[Tensor, "r 7 4"]]:
    """Along one axis, the cells that each bin of a box mixes, and with which shares.

    As in torchvision's kernel (``aligned=False``): a box is at least one cell long, a sample up to a cell outside the
    map counts as on its border, and one further out as zero.
    """
    samples = torch.arange(ROI_SIZE * SAMPLES, dtype=low.dtype) + 0.5
    places = low[:, None] + samples * ((high - low).clamp(min=1) / (ROI_SIZE * SAMPLES))[:, None]
    last = (cells - 1)[:, None]
    inside = (places >= -1) & (places <= cells[:, None])
    places = torch.minimum(places.clamp(min=0), last.to(places.dtype))
    below = places.long()
    above = torch.minimum(below + 1, last)
    share = places - below
    shares = torch.stack([1 - share, share], 2) * (inside / SAMPLES)[:, :, None]
    shape = (ROI_SIZE, 2 * SAMPLES)
    return torch.stack([below, above], 2).flatten(1).unflatten(1, shape), shares.flatten(1).unflatten(1, shape)
