"""Where a training loop runs: the one thing it needs to know of its host.

The loop asks for the checkpoint to go on from and reports the end of each epoch. Three hosts answer: a plain process,
a Ray Train worker, a Tune trial. All write the same run folder (:mod:`mp3d.run_folder`) on a path that every worker
mounts.

Ray is told the metrics, not the checkpoints: one writer and one rule of keeping means that a run can be started under
one host and resumed under another, and that Ray's own state never contradicts what is on disk.
"""

import sys
from pathlib import Path
from typing import Protocol

import torch

from mp3d.checkpoint import Checkpoint, open_checkpoint
from mp3d.device import pick_device
from mp3d.run_folder import Save, commit_epoch, read_metrics, resume_point


class Session(Protocol):
    """What the loop sees of its host."""

    rank: int
    world_size: int
    run_dir: Path
    device: torch.device
    on_terminal: bool
    """Somebody watches: progress is shown within epochs."""

    def resume(self) -> Checkpoint | None:
        """The newest intact checkpoint of this run, the same on every rank."""
        ...

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        """End of an epoch, called by every rank; rank 0 saves. Higher scores are better."""
        ...


class PlainSession:
    """This process and no other."""

    rank, world_size = 0, 1

    def __init__(self, run_dir: Path, *, keep: int, device: torch.device) -> None:
        self.run_dir, self.keep, self.device = run_dir, keep, device
        self.on_terminal = sys.stdout.isatty()

    def resume(self) -> Checkpoint | None:
        return resume_point(self.run_dir)

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        commit_epoch(self.run_dir, epoch, score, metrics, save, keep=self.keep)


class RayTrainSession:
    """One worker of a Ray Train run."""

    def __init__(self, run_dir: Path, *, keep: int, on_terminal: bool = False) -> None:
        import ray.train
        import ray.train.collective
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.run_dir, self.keep, self.on_terminal = run_dir, keep, on_terminal
        self.device = ray.train.torch.get_device()
        self._report, self._from_rank_0 = ray.train.report, ray.train.collective.broadcast_from_rank_zero

    def resume(self) -> Checkpoint | None:
        found = resume_point(self.run_dir) if self.rank == 0 else None
        path = self._from_rank_0(str(found.path) if found else None)  # no two ranks go on from different places
        return found if found or path is None else open_checkpoint(path)

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        if self.rank == 0:
            commit_epoch(self.run_dir, epoch, score, metrics, save, keep=self.keep)
        self._report({"epoch": epoch, "score": score, **metrics})  # a barrier: every rank waits for the checkpoint


class TuneSession(PlainSession):
    """A trial of a sweep: a plain process that tells Ray Tune how it goes, and may be stopped by it."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        import ray

        # what Ray gave to the trial, which may see GPUs that other trials hold
        super().__init__(run_dir, keep=keep, device=pick_device("gpu" if ray.get_gpu_ids() else "cpu"))
        self.on_terminal = False  # Tune tells of every trial
        self.best = max((line["score"] for line in read_metrics(run_dir)), default=float("-inf"))

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        from ray import tune

        super().report(epoch, score, metrics, save)
        self.best = max(self.best, score)
        # the trial stands for its best epoch, and ASHA counts in epochs, which survive a restart of the trial
        tune.report({**metrics, "epoch": epoch, "score": score, "best_score": self.best, "run_dir": str(self.run_dir)})
