"""Which anchors and proposals of a key slice enter the loss: torchvision's draw, but a key slice's own.

torchvision draws from the process's generator, so that what is drawn for a slice depends on the slices before it, and
divides by what was drawn in the whole batch, so that a slice's weight depends on those beside it. Here both depend on
the key slice alone: the loss of a batch is the mean over its key slices, whatever worker they fall on.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class KeySliceSampler(BalancedPositiveNegativeSampler):
    """
    Args:
        samples: per key slice.
        positive_fraction: at most so many of them positive.
        stream: tells this sampler's draws from another's for the same key slice.

    Attributes:
        draws: a number for each key slice of the next batch, which seeds what is drawn for it; None: torchvision's way.
        filled: share of the samples asked for that the last batch had.
    """

    def __init__(self, samples: int, positive_fraction: float, *, stream: int) -> None:
        super().__init__(samples, positive_fraction)
        self.stream = stream
        self.draws: Sequence[int] | None = None
        self.filled = 1.0

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the positive and the negative ones, for each key slice; a match is -1 where neither."""
        chosen = []
        for index, matched in enumerate(matched_idxs):
            generator = None
            if self.draws is not None:
                seed = np.random.SeedSequence([self.draws[index], self.stream]).generate_state(1, np.uint64)[0]
                generator = torch.Generator(matched.device).manual_seed(int(seed >> np.uint64(1)))
            most = int(self.batch_size_per_image * self.positive_fraction)
            positive = _drawn(torch.where(matched >= 1)[0], most, generator)
            negative = _drawn(torch.where(matched == 0)[0], self.batch_size_per_image - len(positive), generator)
            chosen.append((positive, negative))
        drawn = sum(len(positive) + len(negative) for positive, negative in chosen)
        self.filled = drawn / (self.batch_size_per_image * len(matched_idxs))
        masks = [
            [torch.zeros_like(matched, dtype=torch.uint8).index_fill_(0, some, 1) for some in pair]
            for matched, pair in zip(matched_idxs, chosen, strict=True)
        ]
        return [positive for positive, _ in masks], [negative for _, negative in masks]


def _drawn(candidates: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(len(candidates), generator=generator, device=candidates.device)
    return candidates[order[:most]]
