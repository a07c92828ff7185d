"""What a terminal shows of a run: within an epoch only where somebody watches, and one line when it ends.

epoch 3/24  step 120/834  35.1 clips/s  ETA 1:04:12  lr 0.02  loss_classifier 0.213  ...  GPU 11.2 GiB
epoch 3/24  834 steps  35.3 clips/s  loss_classifier 0.201  ...  froc_mean 0.41  GPU 11.3 GiB
"""

import time
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import Tensor

from mp3d.config import LoopConfig
from mp3d.session import Session

REDRAWN_S, PRINTED_S = 1.0, 5.0
"""How often a line is drawn anew in place; and printed, where lines come from another process."""


class Progress:
    """The lines of one epoch, on rank 0; silent on the others.

    Args:
        steps_per_epoch: of this epoch, and as expected of those to come.
    """

    def __init__(self, session: Session, loop: LoopConfig, epoch: int, steps_per_epoch: int) -> None:
        self.session, self.title, self.num_steps = session, f"epoch {epoch}/{loop.epochs}", steps_per_epoch
        self.steps_left = (loop.epochs - epoch + 1) * steps_per_epoch
        self.clips_per_step = loop.step_clips * session.world_size
        self.interval_s = REDRAWN_S if self._redraws else PRINTED_S
        self.done, self.trained_s = 0, 0.0
        self.started = self.shown = time.monotonic()

    @property
    def _redraws(self) -> bool:
        """The terminal is this process's own."""
        return self.session.on_terminal and self.session.world_size == 1

    def step(self, losses: Mapping[str, Tensor], rate: float) -> None:
        """One more step is done; nothing is shown, and no device waited for, between two lines."""
        self.done += 1
        now = time.monotonic()
        self.trained_s = now - self.started
        if self.session.rank != 0 or not self.session.on_terminal or now - self.shown < self.interval_s:
            return
        self.shown = now
        left = timedelta(seconds=round(self.trained_s / self.done * (self.steps_left - self.done)))
        shown = "  ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
        line = (
            f"{self.title}  step {self.done}/{self.num_steps}  {self._clips_per_s():.1f} clips/s  ETA {left}  "
            f"lr {rate:.2g}  {shown}{self._memory()}"
        )
        print(f"\r\x1b[K{line}" if self._redraws else line, end="" if self._redraws else "\n", flush=True)

    def end(self, metrics: Mapping[str, float]) -> None:
        """The line that stays."""
        if self.session.rank != 0:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        line = f"{self.title}  {self.done} steps  {self._clips_per_s():.1f} clips/s  {shown}{self._memory()}"
        print(f"\r\x1b[K{line}" if self._redraws else line, flush=True)

    def _clips_per_s(self) -> float:
        return self.done * self.clips_per_step / max(self.trained_s, 1e-9)

    def _memory(self) -> str:
        """The most that this process ever held of its GPU."""
        if self.session.device.type != "cuda":
            return ""
        return f"  GPU {torch.cuda.max_memory_allocated(self.session.device) / 2**30:.1f} GiB"
