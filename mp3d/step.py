"""One update of the weights: forward and backward over the micro-batches, one agreement of all ranks, one step.

The gradient is that of the mean loss over the key slices of the *global* batch, however many ranks and micro-batches
it was dealt to, and however unevenly its key slices fell on them; but for what is a ratio over a batch, such as batch
norm and a Dice over the batch, which micro-batches each have on their own. Every rank takes every step: whether it
counts is decided together.
"""

import json
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from mp3d.config import TrainConfig
from mp3d.data.batches import Batch
from mp3d.device import autocast
from mp3d.errors import Mp3dError
from mp3d.sample import Clip, Target
from mp3d.session import Session

NONFINITE = "nonfinite"
"""Folder of a run with a file for each step, and rank, whose loss or gradient was not finite."""


class TrainingDiverged(Mp3dError):
    """A loss or a gradient was not finite, more often than is allowed."""


@dataclass
class Run:
    """The parts of a training run that change as it goes on."""

    config: TrainConfig
    session: Session
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None
    """What autocast computes in."""
    steps_per_epoch: int
    average: AveragedModel | None = None
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapper that averages gradients."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def judged_model(self) -> nn.Module:
        """What is validated and saved: the moving average where there is one."""
        return self.bare_model if self.average is None else self.average.module


def wrap_model(run: Run) -> None:
    """Have the gradients of several workers averaged, from the start of an epoch on.

    A wrapper sorts its buckets anew after its first step, and gradients are summed in the order of the buckets: one for
    each epoch, so that a resumed run sums as one that was not killed does.
    """
    run.model = run.bare_model
    if run.session.world_size > 1:
        # of 1 x 1 x 1 kernels, whose gradients are channels-last: the strides of axes with one element say nothing
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        run.model = DistributedDataParallel(run.model)


def train_step(run: Run, batches: Sequence[Batch], step: int, rate: float) -> dict[str, Tensor] | None:
    """Forward, backward, update.

    Args:
        batches: the micro-batches of this rank.

    Returns:
        This rank's part of the mean losses: their mean over the ranks is that of the global batch. None: the step was
        left out, or its gradient overflowed float16 and the loss is scaled less from now on.

    Raises:
        TrainingDiverged: on every rank, where more steps were not finite than ``loop.allowed_skips``.
    """
    config, parameters = run.config, [p for p in run.bare_model.parameters() if p.requires_grad]
    # a batch that is left out leaves no trace in batch norm's running statistics either
    before = [buffer.clone() for buffer in run.bare_model.buffers()] if config.loop.allowed_skips else []
    run.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for number, (batch, share) in enumerate(zip(batches, shares(run, batches), strict=True)):
        last = number == len(batches) - 1
        waits = isinstance(run.model, DistributedDataParallel) and not last
        with cast(DistributedDataParallel, run.model).no_sync() if waits else nullcontext():
            losses = {name: value * share for name, value in _losses(run, batch, step).items()}
            run.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        for name, value in losses.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad_norm or math.inf)
    fault = _fault(run, sums, norm)
    if not fault:
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.scaler.step(run.optimizer)
    run.scaler.update()
    if fault:
        _leave_out(run, batches, step, sums, fault, before)
        return None
    if not math.isfinite(norm.item()):  # the scaler took no step
        return None
    if run.average is not None:
        run.average.update_parameters(run.bare_model)
    return sums


def shares(run: Run, batches: Sequence[Batch]) -> list[float]:
    """Factor on the loss of each micro-batch, a mean over its own key slices, that makes the mean over ranks and
    micro-batches one over all key slices of the global batch.
    """
    counts = [len(batch.targets) for batch in batches]
    total, world_size = sum(counts), run.session.world_size
    if world_size > 1 and run.config.clip.num_key_slices > 1:  # else every rank has as many
        everywhere = torch.tensor(total, device=run.session.device)
        dist.all_reduce(everywhere)
        return [count * world_size / int(everywhere) for count in counts]
    return [count / total for count in counts]


def _losses(run: Run, batch: Batch, step: int) -> dict[str, Tensor]:
    device = run.session.device
    clips = [Clip(clip.slices.to(device, non_blocking=True), clip.key_slices) for clip in batch.clips]
    targets = [_moved(target, device) for target in batch.targets]
    with autocast(device, run.dtype):
        return run.model(clips, targets, image_size=_image_size(run.config, step))


def _fault(run: Run, losses: dict[str, Tensor], norm: Tensor) -> str:
    """What of this step is not finite, on any rank; empty if all is. The same on every rank, but for whose it is."""
    mine = ~torch.isfinite(torch.stack(list(losses.values())).sum())
    any_loss = mine.to(torch.int32)
    if run.session.world_size > 1:
        dist.all_reduce(any_loss, dist.ReduceOp.MAX)
    if any_loss.item():
        return "loss" if mine.item() else "loss of another worker"
    # gradients that overflow float16 are the scaler's daily business, until there is nothing left to scale
    scaled = run.scaler.is_enabled() and run.scaler.get_scale() > 1
    return "" if scaled or math.isfinite(norm.item()) else "gradient"


def _leave_out(
    run: Run, batches: Sequence[Batch], step: int, losses: dict[str, Tensor], fault: str, before: list[Tensor]
) -> None:
    run.optimizer.zero_grad(set_to_none=True)
    run.skipped += 1
    allowed, rank = run.config.loop.allowed_skips, run.session.rank
    file = run.session.run_dir / NONFINITE / f"step_{step:08d}_rank_{rank}.json"
    if fault != "loss of another worker":
        file.parent.mkdir(parents=True, exist_ok=True)
        infos = [info for batch in batches for info in batch.infos]
        content = {
            "step": step, "rank": rank, "fault": fault, "losses": {name: str(v.item()) for name, v in losses.items()},
            "batch": [{"patient": i.patient, "series": i.series, "z_index": i.z_index} for i in infos],
        }  # fmt: skip
        file.write_text(json.dumps(content, indent=1) + "\n")
    if run.skipped > allowed:
        if fault == "loss of another worker":
            raise TrainingDiverged(f"step {step}: the {fault} is not finite; {file.parent} names its slices")
        where = ", ".join(f"{info.series}/{info.z_index}" for batch in batches for info in batch.infos)
        value = sum(value.item() for value in losses.values()) if fault == "loss" else "not finite"
        raise TrainingDiverged(
            f"step {step}: the {fault} is {value} on series/slice {where} ({file}); leave such steps out "
            f"(loop.allowed_skips is {allowed}, and this run may go on with more), or, under a new --name, lower "
            "optim.lr, lengthen optim.warmup_steps or try loop.precision fp32"
        )
    for buffer, known in zip(run.bare_model.buffers(), before, strict=True):
        buffer.copy_(known)
    if rank == 0:
        print(f"step {step} left out: the {fault} is not finite ({run.skipped} of {allowed} allowed)", flush=True)


def _moved(target: Target, device: torch.device) -> Target:
    tensors = cast(dict[str, Tensor], target)
    return cast(Target, {name: tensor.to(device) for name, tensor in tensors.items()})


def _image_size(config: TrainConfig, step: int) -> int:
    """Multi-scale training: one size for the whole global batch, drawn from the seed and the step."""
    sizes = config.augment.image_sizes or (config.clip.image_size,)
    return int(np.random.default_rng([config.loop.seed, step]).choice(sizes))
