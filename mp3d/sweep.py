"""A search over anchors, learning rate and frozen stages, by Ray Tune; ASHA stops what is worse.

    <storage_path>/<sweep>/
      trials/<id>/     one run each (mp3d.session), with its checkpoints
      trials.json      every trial: what it tried, how far it came, its best score
      best/            a copy of the best checkpoint: a path for evaluate, finetune and serve
      tune/            Ray Tune's own state, from which a killed sweep goes on

A trial is one process that trains, not a Ray Train run of its own: two seconds to start instead of twenty, and its own
CPUs and GPU are what Tune schedules, so trials can never hold the cores that their workers wait for.
"""

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mp3d.checkpoint import open_checkpoint
from mp3d.config import SweepConfig, TrainConfig
from mp3d.errors import Mp3dError
from mp3d.launch import check_resources, connect_ray, worker_resources
from mp3d.run_folder import beginning, check_name, claim, claim_name, held, run_identity
from mp3d.tracking import Tracker, track


class SweepFailed(Mp3dError):
    """No trial reached the end of its first epoch."""


def run_sweep(sweep: SweepConfig) -> Path:
    """Run or go on with a sweep, and return the folder of its best checkpoint.

    Raises:
        ConfigError: the sweep's name stands for another one.
        CheckpointError: ``init_from`` cannot be opened or is of another network.
        ResourceError: not even one trial fits the cluster.
        SweepFailed: every trial failed; the message has the errors.
    """
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback
    from ray.tune.search import BasicVariantGenerator

    from mp3d.train import check_inputs

    base = sweep.base
    shards = check_inputs(base)
    folder = Path(base.launch.storage_path) / sweep.name
    identity = {**sweep.model_dump(mode="json"), "base": run_identity(base, shards.digest, beginning(folder, base))}
    check_name(folder, "sweep.json", sweep.name, identity)
    connect_ray()
    resources = worker_resources(base.launch.cpus_per_worker, base.launch.accelerator)
    check_resources([resources], wait_s=base.launch.wait_for_resources_s)
    claim_name(folder, "sweep.json", sweep.name, identity)
    trainable = tune.with_resources(
        tune.with_parameters(_trial, base=base.model_dump(mode="json"), folder=str(folder)), resources
    )
    state = folder / "tune"
    if tune.Tuner.can_restore(str(state)):
        tuner = tune.Tuner.restore(str(state), trainable=trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=search_space(sweep),
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=sweep.num_trials,
                scheduler=_scheduler(sweep),
                search_alg=BasicVariantGenerator(
                    max_concurrent=sweep.max_concurrent or concurrent_trials(resources), random_state=sweep.seed
                ),
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=1),
                callbacks=[_watcher(base, folder), JsonLoggerCallback()],
            ),
        )
    return _export(sweep, folder, tuner.fit())


def search_space(sweep: SweepConfig) -> dict[str, Any]:
    """Dotted fields of the base configuration, each with what Tune draws for it."""
    from ray import tune

    return {
        "optim.lr": tune.loguniform(*sweep.lr),
        "model.head.anchor_ratios": tune.choice([list(ratios) for ratios in sweep.anchor_ratios]),
        "model.frozen_stages": tune.choice(list(sweep.frozen_stages)),
        "model.head.anchors": tune.choice(list(sweep.anchors)),
    }


def concurrent_trials(resources: dict[str, float]) -> int:
    """How many trials the whole cluster carries at a time."""
    import ray

    there = ray.cluster_resources()
    return max(1, min(math.floor(there.get(name, 0) / need) for name, need in resources.items()))


def trial_config(base: TrainConfig, point: dict[str, Any], folder: Path, trial_id: str) -> TrainConfig:
    """The base configuration at one point of the search space, as a run in the sweep's folder."""
    place = {"name": trial_id, "launch.storage_path": str(folder / "trials"), "tracking.group": folder.name}
    return base.override({**point, **place})


def _trial(point: dict[str, Any], base: dict[str, Any], folder: str) -> None:
    """One trial. Started again, it goes on from its own last checkpoint."""
    import torch
    from ray import tune

    from mp3d.fitting import fit_to_data
    from mp3d.session import TuneSession
    from mp3d.train import train

    config = trial_config(TrainConfig.model_validate(base), point, Path(folder), tune.get_context().get_trial_id())
    config = fit_to_data(config, say=lambda line: None)
    torch.set_num_threads(max(1, int(config.launch.cpus_per_worker)))
    run_dir = claim(Path(config.launch.storage_path) / config.name, config)
    with held(run_dir):
        train(config.override({"tracking.mode": "disabled"}), TuneSession(run_dir, keep=1))


def _scheduler(sweep: SweepConfig):
    from ray.tune.schedulers import ASHAScheduler

    epochs = sweep.base.loop.epochs
    return ASHAScheduler(
        time_attr="epoch",
        max_t=epochs + 1,  # a trial that reaches its last epoch ends by itself
        grace_period=min(sweep.grace_epochs, epochs),
        reduction_factor=sweep.reduction_factor,
    )


def _watcher(base: TrainConfig, folder: Path):
    """Prints a line for every epoch of every trial and tracks it; here, because Tune ends a stopped trial's process."""
    from ray import tune

    class Watcher(tune.Callback):
        def __init__(self) -> None:
            self.trackers: dict[str, Tracker] = {}
            self.open = ExitStack()

        def on_trial_result(
            self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            name, epoch, score = trial.trial_id, result["epoch"], result["score"]
            print(f"trial {name}  epoch {epoch}/{base.loop.epochs}  score {score:.4f}", flush=True)
            if name not in self.trackers:
                config = trial_config(base, trial.config, folder, name)
                self.trackers[name] = self.open.enter_context(track(config, folder / "trials" / name, rank=0))
            metrics = {key: value for key, value in result.items() if isinstance(value, float) and "/" not in key}
            self.trackers[name](metrics, step=epoch)

        def on_experiment_end(self, trials: list, **info: Any) -> None:
            self.open.close()

        def get_state(self) -> None:
            return None  # nothing that Tune has to keep

    return Watcher()


def trials_table(folder: Path) -> str:
    """The trials of a finished sweep, best first."""
    lines = [f"{'trial':<14}{'score':>8}{'epochs':>8}  point"]
    for trial in json.loads((folder / "trials.json").read_text()):
        score = "failed" if trial["best_score"] is None else f"{trial['best_score']:.4f}"
        point = "  ".join(f"{name.rsplit('.', 1)[-1]} {value}" for name, value in trial["point"].items())
        lines.append(
            f"{trial['trial']:<14}{score:>8}{trial['epochs']:>8}  {point}{'  (stopped)' * trial['stopped_early']}"
        )
    return "\n".join(lines)


def _export(sweep: SweepConfig, folder: Path, results: Any) -> Path:
    trials = []
    for result in results:
        metrics = result.metrics or {}
        trials.append(
            {
                "trial": metrics.get("trial_id"),
                "point": result.config,
                "epochs": metrics.get("epoch", 0),
                "stopped_early": metrics.get("epoch", 0) < sweep.base.loop.epochs,
                "best_score": metrics.get("best_score"),
                "run": metrics.get("run_dir"),
                "error": str(result.error).splitlines()[-1] if result.error else None,
            }
        )
    trials.sort(key=lambda trial: -math.inf if trial["best_score"] is None else trial["best_score"], reverse=True)
    (folder / "trials.json").write_text(json.dumps(trials, indent=1) + "\n")
    if not trials or trials[0]["best_score"] is None:
        raise SweepFailed("every trial failed: " + "; ".join(str(trial["error"]) for trial in trials))
    winner = open_checkpoint(trials[0]["run"])
    aside, best = folder / ".best.tmp", folder / "best"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(winner.path, aside)
    shutil.rmtree(best, ignore_errors=True)
    aside.rename(best)
    return best
