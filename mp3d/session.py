"""Where a training loop runs: the one thing it needs to know of its host.

The loop asks for the checkpoint to go on from and reports the end of each epoch. Three hosts answer: a plain process,
a Ray Train worker, a Tune trial. All write the same run folder on a path that every worker mounts:

    <storage_path>/<name>/
      run.json         the configuration that the name stands for
      epoch_0001/ ...  checkpoints: the best few and the latest (mp3d.checkpoint)
      metrics.jsonl    one line an epoch; after a restart an epoch may stand there twice, the last line counts

Ray is told the metrics, not the checkpoints: one writer and one rule of keeping means that a run can be started under
one host and resumed under another, and that Ray's own state never contradicts what is on disk.
"""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from mp3d.checkpoint import Checkpoint, checkpoints_of, epoch_directory, latest_checkpoint, score_of
from mp3d.device import pick_device

Save = Callable[[Path], None]
"""Writes a checkpoint into the empty directory it is given."""


class Session(Protocol):
    """What the loop sees of its host."""

    rank: int
    world_size: int
    run_dir: Path
    device: torch.device

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

    def resume(self) -> Checkpoint | None:
        return latest_checkpoint(self.run_dir)

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        commit_epoch(self.run_dir, epoch, score, metrics, save, keep=self.keep)


class RayTrainSession:
    """One worker of a Ray Train run."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.run_dir, self.keep = run_dir, keep
        self.device = ray.train.torch.get_device()
        self._report = ray.train.report

    def resume(self) -> Checkpoint | None:
        return latest_checkpoint(self.run_dir)

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
        self.best = max((line["score"] for line in read_metrics(run_dir)), default=float("-inf"))

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        from ray import tune

        super().report(epoch, score, metrics, save)
        self.best = max(self.best, score)
        # the trial stands for its best epoch, and ASHA counts in epochs, which survive a restart of the trial
        tune.report({**metrics, "epoch": epoch, "score": score, "best_score": self.best, "run_dir": str(self.run_dir)})


def commit_epoch(run_dir: Path, epoch: int, score: float, metrics: dict[str, float], save: Save, *, keep: int) -> None:
    """Save aside, rename, keep the best ``keep`` checkpoints and the latest, add a line to ``metrics.jsonl``."""
    aside = run_dir / f".{epoch_directory(epoch)}.tmp"
    final = run_dir / epoch_directory(epoch)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save(aside)
    if final.exists():  # a damaged checkpoint that resuming passed over
        shutil.rmtree(final)
    aside.rename(final)
    for path in _surplus(checkpoints_of(run_dir), keep):
        if score_of(path) == -math.inf:
            warnings.warn(f"removed: {path}, whose metrics.json is damaged", stacklevel=2)
        shutil.rmtree(path)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": epoch, "score": score, **metrics}) + "\n")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every epoch, each once, in order."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for _, line in sorted({line["epoch"]: line for line in lines}.items())]


def _surplus(checkpoints: list[Path], keep: int) -> list[Path]:
    """All but the best and the latest; one that does not tell its score counts as the worst."""
    ranked = sorted(checkpoints, key=lambda path: (score_of(path), path.name), reverse=True)
    return [path for path in ranked[keep:] if path != checkpoints[-1]]
