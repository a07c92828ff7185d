"""What Ray costs in training: Ray Train beside a plain process, Ray Data beside a DataLoader; ratios within one run.

    python benchmarks/training_overhead.py [--rounds 5] [--epochs 4] [--steps 20] [--clips 192]

The first table trains the same detector on the same made shards, in this process and as one Ray Train worker, turn
after turn; both end with the same weights, which is checked. A step is told by the processor's time of the training
process, over epochs without the first: forward, backward, validation, checkpoint and report. The second
table reads the same clips of the same shards (windows of nine slices of 512 x 512) through a DataLoader of two
processes and through two Ray Data tasks at a time, to batches in this process; every clip is counted in every round.
There CPU seconds are those of all processes of a method, Ray's daemons included, after a round that warms up. Takes
about fifteen minutes on two cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import cpu_model, cpu_s

from mp3d.checkpoint import open_checkpoint
from mp3d.config import AugmentConfig, ClipConfig, DetectionHead, LaunchConfig, LoopConfig, ModelConfig, TrainConfig
from mp3d.data.batches import Batch, ClipDataset, Stream, training_loader
from mp3d.data.prepare import prepare
from mp3d.data.ray_batches import ray_batches
from mp3d.data.samples import annotated_samples
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.shard import open_shards
from mp3d.data.source import Item, Source
from mp3d.launch import connect_ray
from mp3d.run_folder import Save
from mp3d.session import PlainSession, RayTrainSession
from mp3d.train import train

BATCH = 2


class Timed:
    """Notes the processor's time and the clock at the end of every epoch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.marks: list[tuple[float, float]] = []

    def report(self, epoch: int, score: float, metrics: dict[str, float], save: Save) -> None:
        super().report(epoch, score, metrics, save)  # type: ignore[misc]
        self.marks.append((time.process_time(), time.perf_counter()))
        (self.run_dir / "marks.json").write_text(json.dumps(self.marks))  # type: ignore[attr-defined]


class TimedPlain(Timed, PlainSession):
    pass


class TimedRay(Timed, RayTrainSession):
    pass


def made_series(index: int, slices: int, side: int) -> CTSeries:
    """Noise of 15 HU in air, and a bright box on a few slices."""
    rng = np.random.default_rng(index)
    hu = rng.normal(-900, 15, (slices, side, side)).astype(np.int16)
    truths = [Truth(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)) for _ in range(slices)]
    for z in range(slices // 4, 3 * slices // 4):
        x, y = rng.integers(4, side // 2, 2).tolist()
        hu[z, y : y + side // 8, x : x + side // 6] += 900
        truths[z] = Truth(np.array([[x, y, x + side // 6, y + side // 8]], np.float32), np.ones(1, np.int64))
    volume = Volume(hu, np.diag([0.7, 0.7, 2.5, 1.0]))
    return CTSeries(f"patient {index}", f"study {index}", f"series {index}", volume, tuple(truths))


def made_shards(out: Path, series: int, slices: int, side: int) -> Path:
    items = [
        Item(
            f"{index}", f"patient {index}", "val" if index == 0 else "train", partial(made_series, index, slices, side)
        )
        for index in range(series)
    ]
    prepare(Source("made", "made/1", ("lesion",), tuple(items)), out, id_key=b"benchmark", runner="local")
    return out


def config_for(shards: Path, folder: Path, asked: argparse.Namespace) -> TrainConfig:
    head = DetectionHead(fpn_channels=32, box_features=64, rpn_pre_nms=(200, 100), rpn_post_nms=(100, 50))
    return TrainConfig(
        name="overhead",
        shards=str(shards),
        clip=ClipConfig(image_size=128),
        augment=AugmentConfig(image_sizes=()),
        model=ModelConfig(backbone="mp3d18ba", width=0.25, head=head),
        loop=LoopConfig(
            epochs=asked.epochs, steps_per_epoch=asked.steps, batch_size=BATCH, precision="fp32", max_validation_clips=4
        ),
        launch=LaunchConfig(storage_path=str(folder), keep_checkpoints=1),
        tracking={"mode": "disabled"},  # type: ignore[arg-type]
    )


def train_plain(config: TrainConfig, run_dir: Path) -> None:
    train(config, TimedPlain(run_dir, keep=1, device=torch.device("cpu")))


def work(payload: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    train(TrainConfig.model_validate(payload["config"]), TimedRay(Path(payload["run_dir"]), keep=1))


def train_on_ray(config: TrainConfig, run_dir: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    payload = {"config": config.model_dump(mode="json"), "run_dir": str(run_dir)}
    TorchTrainer(
        work,
        train_loop_config=payload,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="ray", storage_path=str(run_dir)),
    ).fit()


def measure_steps(shards: Path, folder: Path, asked: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of a step, by method and round."""
    found: dict[str, list[tuple[float, float]]] = {"plain process": [], "Ray Train, one worker": []}
    for number in range(asked.rounds):
        digests = []
        for name, method in zip(found, (train_plain, train_on_ray), strict=True):
            run_dir = folder / f"{name.split()[0]}-{number}"
            run_dir.mkdir(parents=True)
            method(config_for(shards, folder, asked), run_dir)
            marks = json.loads((run_dir / "marks.json").read_text())
            steps = (len(marks) - 1) * asked.steps
            found[name].append(tuple((end - start) / steps for start, end in zip(marks[0], marks[-1], strict=True)))
            state = open_checkpoint(run_dir).model_state()
            digests.append({key: value.numpy().tobytes() for key, value in state.items()})
        if digests[0] != digests[1]:
            raise ValueError("the two runners trained other weights")
    return found


def measure_ingest(shards: Path, asked: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of a clip, by method and round."""
    opened = open_shards(shards)
    positives, spare = annotated_samples(opened, "train")
    stream = Stream(positives, spare, negatives=0, seed=0)
    dataset = ClipDataset(opened, stream.samples, ClipConfig(image_size=512))
    share = {"batch_size": BATCH, "rank": 0, "world_size": 1}
    methods: dict[str, Callable[[range], Iterable[Batch]]] = {
        "DataLoader, two processes": lambda steps: training_loader(dataset, stream, steps=steps, workers=2, **share),
        "Ray Data, two tasks": lambda steps: ray_batches(dataset, stream, steps=steps, **share),
    }
    per_round = asked.clips // BATCH
    first = [list(method(range(4))) for method in methods.values()]
    for one, other in zip(*first, strict=True):
        if not all(torch.equal(a.slices, b.slices) for a, b in zip(one.clips, other.clips, strict=True)):
            raise ValueError("the two methods give other clips")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for number in range(asked.rounds + 1):  # the first warms up
        for name, method in methods.items():
            cpu, clock = cpu_s(os.getpid(), set()), time.perf_counter()
            count = sum(len(batch.clips) for batch in method(range(number * per_round, (number + 1) * per_round)))
            clock, cpu = time.perf_counter() - clock, cpu_s(os.getpid(), set()) - cpu
            if count != per_round * BATCH:
                raise ValueError(f"{name} gave {count} clips of {per_round * BATCH}")
            found[name] += [(cpu / count, clock / count)] if number else []
    return found


def report(title: str, unit: str, found: dict[str, list[tuple[float, float]]]) -> None:
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    base = next(iter(medians.values()))
    print(f"\n{title}\n")
    print(f"| method | CPU ms per {unit} | CPU, times the first | {unit}s per CPU second | ms by the clock | times |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (cpu, clock) in medians.items():
        cells = f"{1e3 * cpu:.1f} | {cpu / base[0]:.3f} | {1 / cpu:.1f} | {1e3 * clock:.1f} | {clock / base[1]:.2f}"
        print(f"| {name} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 5), ("epochs", 4), ("steps", 20), ("clips", 192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mp3d-benchmark-") as temporary:
        folder = Path(temporary)
        connect_ray(dashboard=True, num_cpus=2, show_logs=False)
        print(f"one thread of {cpu_model()}; medians of {asked.rounds} rounds")
        steps = measure_steps(made_shards(folder / "small", 4, 24, 128), folder / "runs", asked)
        report(
            f"{asked.epochs - 1} epochs of {asked.steps} steps of {BATCH} clips, same weights at the end", "step", steps
        )
        ingest = measure_ingest(made_shards(folder / "large", 5, 64, 512), asked)
        report(f"{asked.clips} clips of 9 x 512 x 512 a round, each counted", "clip", ingest)


if __name__ == "__main__":
    main()
