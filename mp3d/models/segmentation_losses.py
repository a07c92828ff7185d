"""Losses of masks: cross-entropy and soft Dice, as they are meant and as the authors' code has them.

The originals are ``soft_dice_loss.py`` (LiTS) and ``loss_from_acs.py`` (LIDC) of CSPR's ``medseg``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mp3d.config import UNKNOWN, SegmentationHead
from mp3d.models.sync_batch_norm import summed_over_workers

AUTHORS_LIDC_WEIGHTS = (1.0, 0.5)
"""Of cross-entropy and Dice: the default of a function that never gets the configured ones."""


def mask_losses(
    logits: Float[Tensor, "k c h w"],
    masks: Int64[Tensor, "k h w"],
    head: SegmentationHead,
    keys_per_clip: Sequence[int],
    *,
    over_workers: bool = False,
) -> dict[str, Tensor]:
    """``loss_cross_entropy`` and ``loss_dice``, weighted; a clip of which no pixel is known adds 0.

    Args:
        logits: float32, one map per key slice in clip order, the background first.
        masks: classes, or ``UNKNOWN``.
        keys_per_clip: key slices of each clip.
        over_workers: a Dice over the batch is one over the batches of all workers, all of which compute it.
    """
    known = masks != UNKNOWN
    truth = F.one_hot(masks.where(known, torch.zeros_like(masks)), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    weights = (head.cross_entropy_weight, head.dice_weight)
    if head.loss == "lidc_authors":
        weights = AUTHORS_LIDC_WEIGHTS
        cross_entropy = -_mean(
            F.log_softmax(logits, dim=-1) * truth, known.unsqueeze(1).expand_as(truth), keys_per_clip
        )
    else:
        cross_entropy = _mean(-(F.log_softmax(logits, dim=1) * truth).sum(1), known, keys_per_clip)
    dice = 1 - soft_dice(logits.softmax(1), truth, known, head, keys_per_clip, over_workers=over_workers)
    return {"loss_cross_entropy": weights[0] * cross_entropy, "loss_dice": weights[1] * dice}


def soft_dice(
    probabilities: Float[Tensor, "k c h w"],
    truth: Float[Tensor, "k c h w"],
    known: Bool[Tensor, "k h w"],
    head: SegmentationHead,
    keys_per_clip: Sequence[int],
    *,
    over_workers: bool = False,
) -> Float[Tensor, ""]:
    """Mean over clips (or the one batch) and classes of twice the intersection over the sum of both."""
    counted = known.unsqueeze(1)
    intersection = (probabilities * truth * counted).sum((2, 3))
    both = ((probabilities + truth) * counted).sum((2, 3))
    groups = list(keys_per_clip) if head.dice_over == "clip" else [len(truth)]
    intersection, both = (
        torch.stack([part.sum(0) for part in per_slice.split(groups)]) for per_slice in (intersection, both)
    )
    if over_workers and head.dice_over == "batch":  # a ratio of sums: the mean of the workers' ratios is another one
        intersection, both = summed_over_workers(torch.stack([intersection, both]))
    if not head.dice_background:
        intersection, both = intersection[:, 1:], both[:, 1:]
    if head.loss == "lits_authors":
        return (2 * intersection / (intersection + both + head.dice_smooth)).mean()
    return ((2 * intersection + head.dice_smooth) / (both + head.dice_smooth)).mean()


def _mean(
    values: Float[Tensor, "k *s"], counted: Bool[Tensor, "k *s"], keys_per_clip: Sequence[int]
) -> Float[Tensor, ""]:
    """Mean over the key slices of their clip's mean: a clip weighs the same whatever lies beside it."""
    keys = list(keys_per_clip)
    sums, counts = ((part * counted).flatten(1).sum(1).split(keys) for part in (values, counted))
    means = [total.sum() / count.sum().clamp(min=1) for total, count in zip(sums, counts, strict=True)]
    return (torch.stack(means) * values.new_tensor(keys)).sum() / sum(keys)
