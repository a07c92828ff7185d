"""RoIAlign on a CPU, many times faster than torchvision's; the same numbers.

torchvision's kernel for CPUs reads a channel at a time from maps that must be brought into that order first. Here a
cell of the channels-last maps is a row of a table, a bin of a box a *bag* of rows (each of its samples is mixed from
four cells), and ``embedding_bag`` adds them up: for all levels and key slices at once. It is used where nothing is
trained; a GPU and training have torchvision's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

ROI_SIZE = 7
ROI_STRIDES = (4, 8, 16, 32)
"""Of P2..P5, from which boxes are read; P6 only proposes."""
Boxes = Float[Tensor, "_ 4"]


def bag_roi_align(
    maps: Sequence[Float[Tensor, "k c _ _"]],
    boxes: Sequence[Boxes],
    levels: Int64[Tensor, " r"],
    samples: int,
    aligned: bool,
) -> Float[Tensor, "r c 7 7"]:
    """The features of boxes, channels-last.

    Args:
        maps: of the strides above.
        boxes: xyxy in pixels, one tensor for each of the ``k`` key slices.
        levels: of all boxes in that order, which map each is read from.
        samples: per bin and axis; 0 as many as cells.
        aligned: shifted by half a pixel, as the cells of a map lie.
    """
    num_slices, channels = maps[0].shape[:2]
    table = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels).float() for level in maps])
    heights, widths = (torch.tensor([level.shape[axis] for level in maps])[levels] for axis in (2, 3))
    cells = torch.tensor([level.shape[2] * level.shape[3] for level in maps])
    first = torch.cumsum(cells * num_slices, 0) - cells * num_slices
    of_slice = torch.repeat_interleave(torch.arange(num_slices), torch.tensor([len(each) for each in boxes]))
    start = first[levels] + of_slice * cells[levels]
    corners = torch.cat(list(boxes)).float() / torch.tensor(ROI_STRIDES)[levels, None] - (0.5 if aligned else 0.0)
    x1, y1, x2, y2 = corners.unbind(1)
    tall, wide = (high - low if aligned else (high - low).clamp(min=1) for low, high in ((y1, y2), (x1, x2)))
    num_rows, num_columns = (
        torch.full_like(levels, samples) if samples else torch.ceil(size / ROI_SIZE).long() for size in (tall, wide)
    )
    features = table.new_empty(len(levels), ROI_SIZE * ROI_SIZE, channels)
    most = torch.maximum(num_rows, num_columns).clamp(min=1)
    for count in most.unique().tolist():  # bags of one size; few boxes are much longer than the cells of their level
        here = (most == count).nonzero()[:, 0]
        rows, row_shares = _bins(y1[here], tall[here], heights[here], num_rows[here], count)
        columns, column_shares = _bins(x1[here], wide[here], widths[here], num_columns[here], count)
        lines = start[here, None, None] + rows * widths[here, None, None]
        bags = lines[:, :, None, :, None] + columns[:, None, :, None, :]
        shares = row_shares[:, :, None, :, None] * column_shares[:, None, :, None, :]
        summed = F.embedding_bag(
            bags.flatten(3).flatten(0, 2), table, mode="sum", per_sample_weights=shares.flatten(3).flatten(0, 2)
        )
        features[here] = summed.view(len(here), ROI_SIZE * ROI_SIZE, channels)
    return features.view(len(levels), ROI_SIZE, ROI_SIZE, channels).permute(0, 3, 1, 2)


def _bins(
    low: Float[Tensor, " r"],
    size: Float[Tensor, " r"],
    cells: Int64[Tensor, " r"],
    counts: Int64[Tensor, " r"],
    most: int,
) -> tuple[Int64[Tensor, "r 7 _"], Float[Tensor, "r 7 _"]]:
    """Along one axis, the cells that each bin of a box mixes, and with which shares: up to ``most`` samples.

    As in torchvision's kernel: a sample up to a cell outside the map counts as on its border, and one further out as
    zero.
    """
    sample = torch.arange(most)
    given = counts.clamp(min=1)[:, None, None]
    steps = torch.arange(ROI_SIZE)[:, None] + (sample + 0.5) / given
    places = low[:, None, None] + steps * (size / ROI_SIZE)[:, None, None]
    border, last = cells[:, None, None], (cells - 1)[:, None, None]
    counted = (places >= -1) & (places <= border) & (sample < counts[:, None, None])
    places = torch.minimum(places.clamp(min=0), last.to(places.dtype))
    below = places.long()
    above = torch.minimum(below + 1, last)
    share = places - below
    shares = torch.stack([1 - share, share], 3) * (counted / given)[..., None]
    return torch.stack([below, above], 3).flatten(2), shares.flatten(2)
