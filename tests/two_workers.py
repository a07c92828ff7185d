"""Two processes over gloo, without Ray: the shipped steps and loop on the same global batches as one process."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import mp3d.train
from mp3d.config import TrainConfig
from mp3d.data.batches import ClipDataset, batched, training_loader
from mp3d.data.shard import open_shards
from mp3d.data.stream import Stream
from mp3d.session import PlainSession, Save
from mp3d.step import Run, train_step, wrap_model
from mp3d.train import start, training_samples


class GlooSession(PlainSession):
    """A rank of a process group."""

    def __init__(self, run_dir: Path, *, keep: int = 2) -> None:
        super().__init__(run_dir, keep=keep, device=torch.device("cpu"))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        if self.rank == 0:
            super().report(epoch, score, metrics, save)
        dist.barrier()


@dataclass(frozen=True)
class Case:
    """The same global batch dealt to two ranks, and to one."""

    two: TrainConfig
    one: TrainConfig
    steps: int


def in_two_processes(work: Callable[[int, Any], Any], argument: Any, folder: Path) -> list[Any]:
    """What ``work(rank, argument)`` returns on each rank of a group of two."""
    mp.spawn(_process, args=(work, argument, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, work: Callable[[int, Any], Any], argument: Any, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(work(rank, argument), f"{folder}/result_{rank}.pt")
    dist.destroy_process_group()


def both(rank: int, argument: tuple[dict[str, Case], TrainConfig]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole runs first: afterwards this process computes in float64."""
    cases, config = argument
    return whole_run(rank, config), gradients(rank, cases)


def whole_run(rank: int, config: TrainConfig) -> dict[str, Any]:
    """The shipped loop from start to end: the metrics, the weights at the end, the steps that were counted."""
    run_dir = Path(config.launch.storage_path) / config.name
    runs, steps = [], []

    def started(*given: Any) -> Run:
        runs.append(start(*given))
        return runs[-1]

    def counted(*given: Any) -> dict[str, Tensor] | None:
        steps.append(train_step(*given))
        return steps[-1]

    mp3d.train.start, mp3d.train.train_step = started, counted
    metrics = mp3d.train.train(config, GlooSession(run_dir))
    return {"metrics": metrics, "weights": dict(runs[0].bare_model.named_parameters()), "steps": len(steps)}


def gradients(rank: int, cases: dict[str, Case]) -> dict[str, Any]:
    """Of every step of every case: both ranks' gradient and losses, and, on rank 0, those of one process; how many key
    slices and boxes each rank had.
    """
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # in this process: what is float32 everywhere, clips, logits, losses, is float64
    found = {}
    for name, case in cases.items():
        session = GlooSession(Path("unused"))
        found[name] = {"two": _steps(case.two, session, case.steps)}
        if rank == 0:
            session.rank, session.world_size = 0, 1
            found[name]["one"] = _steps(case.one, session, case.steps)
    return found


def _steps(config: TrainConfig, session: PlainSession, steps: int) -> list[dict[str, Any]]:
    shards = open_shards(config.shards)
    positives, spare = training_samples(config, shards)
    stream = Stream(positives, spare, negatives=config.loop.negatives, seed=config.loop.seed)
    every_slice = config.model.head.kind == "segmentation"
    dataset = ClipDataset(
        shards, stream.samples, config.clip, config.augment, config.loop.seed, every_slice=every_slice
    )
    run = start(config, session, steps)
    wrap_model(run)
    run.model.train()
    loader = training_loader(
        dataset, stream, batch_size=config.loop.batch_size, steps=range(steps * config.loop.accumulate),
        rank=session.rank, world_size=session.world_size, workers=0,
    )  # fmt: skip
    taken = []
    for step, batches in enumerate(batched(loader, config.loop.accumulate)):
        for target in (target for batch in batches for target in batch.targets if "boxes" in target):
            target["boxes"] = target["boxes"].double()
        losses = train_step(run, batches, step, config.optim.lr)
        assert losses is not None
        targets = [target for batch in batches for target in batch.targets]
        taken.append(
            {
                "gradient": _gradient(run),
                "losses": {name: value.item() for name, value in losses.items()},
                "key_slices": len(targets),
                "boxes": sum(len(target.get("boxes", ())) for target in targets),
            }
        )
    return taken


def _gradient(run: Run) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in run.bare_model.named_parameters()
        if parameter.grad is not None
    }
