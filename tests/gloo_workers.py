"""Several training processes without Ray: what Ray Train's workers compute, in a few seconds."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mp3d.checkpoint import Checkpoint
from mp3d.config import TrainConfig
from mp3d.run_folder import Save, commit_epoch, resume_point
from mp3d.train import train


class GlooSession:
    """One of several processes; ends with the last epoch, or before ``stop_after``."""

    on_terminal = False
    device = torch.device("cpu")

    def __init__(self, run_dir: Path, rank: int, world_size: int, stop_after: int | None) -> None:
        self.run_dir, self.rank, self.world_size, self.stop_after = run_dir, rank, world_size, stop_after

    def resume(self) -> Checkpoint | None:
        found = resume_point(self.run_dir)
        dist.barrier()
        return found

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        if self.rank == 0:
            commit_epoch(self.run_dir, epoch, score, metrics, save, keep=99)
        dist.barrier()
        if epoch == self.stop_after:
            sys.stdout.flush()
            os._exit(0)  # as abruptly as a kill


def _work(rank: int, config: str, run_dir: str, world_size: int, stop_after: int | None) -> None:
    torch.set_num_threads(1)
    store = f"file://{run_dir}/store-{stop_after}-{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    train(TrainConfig.model_validate_json(config), GlooSession(Path(run_dir), rank, world_size, stop_after))
    dist.destroy_process_group()


def train_on_gloo(config: TrainConfig, run_dir: Path, world_size: int, stop_after: int | None = None) -> Path:
    """Train in so many processes, each of which ends abruptly when ``stop_after`` epochs are done."""
    run_dir.mkdir(parents=True, exist_ok=True)
    mp.spawn(_work, (config.model_dump_json(), str(run_dir), world_size, stop_after), nprocs=world_size)
    return run_dir
