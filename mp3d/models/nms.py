"""Non-maximum suppression where not one list of boxes after the other is to be worked off: the best few alone on a CPU,
many lists at once on a GPU. The answers are torchvision's.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import batched_nms

LARGEST_OVERLAP_TABLE = 2**25
"""Most overlaps of boxes in memory at a time, some 20 bytes each for a moment."""
ROUNDS_BETWEEN_LOOKS = 4
"""Looking whether anything changed waits for a GPU."""


def best_after_nms(
    boxes: Float[Tensor, "b 4"], scores: Float[Tensor, " b"], groups: Int64[Tensor, " b"], iou: float, count: int
) -> Int64[Tensor, " k"]:
    """The first ``count`` of what non-maximum suppression keeps within each group, best first, equal scores in order.

    A box is suppressed by better ones only, so the best few are tried alone, then twice as many, until enough are left.
    """
    order = scores.argsort(descending=True, stable=True)
    tried = 2 * count
    while True:
        best = order[:tried]
        kept = batched_nms(boxes[best], scores[best], groups[best], iou)
        if len(kept) >= count or tried >= len(order):
            return best[kept[:count]]
        tried *= 2


def kept_by_nms(boxes: Float[Tensor, "k b 4"], usable: Bool[Tensor, "k b"], iou: float) -> Bool[Tensor, "k b"]:
    """Which of ``k`` lists of boxes, each in descending order of scores, non-maximum suppression keeps of the usable.

    A box is kept if no kept one before it overlaps it by more than ``iou``. Said of all boxes at once and again until
    nothing changes, this is the greedy answer: after n rounds the first n boxes have theirs for good.
    """
    kept = []
    at_once = max(LARGEST_OVERLAP_TABLE // max(boxes.shape[1], 1) ** 2, 1)
    for some, good in zip(boxes.split(at_once), usable.split(at_once), strict=True):
        suppresses = (overlaps_within(some) > iou).triu(1).float()
        kept_now, before = good, torch.zeros_like(good)
        while not torch.equal(kept_now, before):
            for _ in range(ROUNDS_BETWEEN_LOOKS):
                before = kept_now
                kept_now = good & (torch.bmm(before[:, None].float(), suppresses)[:, 0] == 0)
        kept.append(kept_now)
    return torch.cat(kept)


def overlaps_within(boxes: Float[Tensor, "k b 4"]) -> Float[Tensor, "k b b"]:
    """IoU of all pairs of a list."""
    x1, y1, x2, y2 = boxes.unbind(2)
    areas = (x2 - x1) * (y2 - y1)
    common = torch.minimum(x2[:, :, None], x2[:, None]).sub_(torch.maximum(x1[:, :, None], x1[:, None])).clamp_(min=0)
    common *= torch.minimum(y2[:, :, None], y2[:, None]).sub_(torch.maximum(y1[:, :, None], y1[:, None])).clamp_(min=0)
    return common / (areas[:, :, None] + areas[:, None] - common)
