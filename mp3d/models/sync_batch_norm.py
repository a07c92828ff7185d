"""Batch norm over the batches of all workers (the authors' SyncBN, in their segmentation recipes).

PyTorch's own runs on accelerators only; on a CPU ours does the same by two sums over all workers.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


class _OverWorkers(torch.autograd.Function):
    """The sum over all workers; so is its gradient, since every worker's loss depends on it."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def summed_over_workers(value: Tensor) -> Tensor:
    """The sum over all workers, with its gradient; every worker has to ask for it, and for a tensor of one shape."""
    return _OverWorkers.apply(value)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Statistics of every slice of every worker in training; the state is that of the batch norm that it replaces."""

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if not self.training:
            return super().forward(input)
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = values.new_tensor(values.numel() / values.shape[1])
        dist.all_reduce(count)
        mean = summed_over_workers(values.sum((0, 2, 3))) / count
        # around the common mean, so that nothing is lost to a difference of large numbers
        variance = summed_over_workers((values - mean[:, None, None]).square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return torch.addcmul((self.bias - mean * scale)[:, None, None], values, scale[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Float[Tensor, "c"], variance: Float[Tensor, "c"]) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum or 0.0)
        self.running_var.lerp_(variance, self.momentum or 0.0)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Put synchronised batch norm in the place of every plain one that learns, weights and names as they were."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.BatchNorm2d:
                continue
            kind = nn.SyncBatchNorm if child.weight.is_cuda else SyncBatchNorm2d
            synced = kind(child.num_features, child.eps, child.momentum, device=child.weight.device)
            synced.load_state_dict(child.state_dict())
            synced.train(child.training)
            for new, old in zip(synced.parameters(), child.parameters(), strict=True):
                new.requires_grad_(old.requires_grad)
            setattr(parent, name, synced)
