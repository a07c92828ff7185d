"""Starts the training loop: in this process, or as Ray Train workers. Connects to Ray, and asks it first whether it
can.
"""

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mp3d.config import TrainConfig
from mp3d.errors import ConfigError, Mp3dError, ResourceError

RAY_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait take the cores from each other
    "RAY_AUTH_MODE": "token",  # on by default for clusters that ray.init starts; then everything else must speak it too
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment instead of building their own
    "RAY_COLOR_PREFIX": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every printed line comes twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # whoever asked for no GPU sees none; else Ray leaves all in sight
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
CONTROLLER_FAILURES = 3
"""Failed starts of the worker group before a run is given up; Ray's own default is never."""


def connect_ray(*, dashboard: bool = False, num_cpus: int | None = None, show_logs: bool = True) -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names (as in a submitted job), else start one on this machine, with
    token authentication.

    Args:
        dashboard: start it too; Ray Train watches its runs through it.
        num_cpus: of a cluster that is started here; None: the machine's.
        show_logs: print here what workers print.

    Raises:
        ResourceError: no cluster answers at ``RAY_ADDRESS``.
    """
    set_ray_environment()
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": show_logs, "logging_level": "WARNING"}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise ResourceError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start it with `ray start --head`, "
                "or unset RAY_ADDRESS to run on this machine alone"
            ) from error
    else:
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=dashboard, object_store_memory=512 * 2**20, **quiet
        )


def set_ray_environment() -> None:
    """What Ray must find in the environment when it is imported; variables that are set already stay."""
    if "ray" in sys.modules:  # it has read its environment; a half-changed one would only confuse it
        return
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _ensure_token()


def run_training(config: TrainConfig) -> Path:
    """Train (or go on training) and return the run's folder, which stands for its best checkpoint.

    Args:
        config: with absolute paths.

    Raises:
        ConfigError: the run's name stands for another configuration.
        ResourceError: the cluster cannot carry it.
        Mp3dError: whatever stops :func:`mp3d.train.train`.
    """
    from mp3d.fitting import fit_to_data
    from mp3d.train import check_inputs

    run_dir = Path(config.launch.storage_path) / config.name
    check_inputs(config)
    config = fit_to_data(config)
    if config.launch.runner == "local":
        _train_here(config, claim(run_dir, config))
    else:
        connect_ray(dashboard=True)
        worker = worker_resources(config.launch.cpus_per_worker, config.launch.accelerator)
        check_resources([worker] * config.loop.num_workers, wait_s=config.launch.wait_for_resources_s)
        _train_on_ray(config, claim(run_dir, config), worker)
    return run_dir


def claim(run_dir: Path, config: TrainConfig) -> Path:
    """Make the run's folder, or check that it belongs to this configuration.

    Raises:
        ConfigError: the name stands for another configuration; the message lists the fields that differ.
    """
    claim_name(run_dir, "run.json", config.name, config.identity())
    return run_dir


def claim_name(folder: Path, file: str, name: str, identity: dict[str, Any]) -> None:
    """What a name stands for is written into its folder once, and compared from then on; see :func:`claim`."""
    path = folder / file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(identity, indent=1) + "\n")
        aside.replace(path)
    elif differing := list(_differences(json.loads(path.read_text()), identity)):
        raise ConfigError(
            f"{name!r} exists with another configuration ({'; '.join(differing)}); "
            f"give this one another --name, or remove {folder}"
        )


def worker_resources(cpus: float, accelerator: str) -> dict[str, float]:
    """What one worker takes; ``auto`` asks the cluster for a GPU, not this machine, which may be a head without one."""
    import ray

    has_gpu = accelerator == "gpu" or (accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    return {"CPU": cpus, "GPU": 1.0} if has_gpu else {"CPU": cpus}


def check_resources(bundles: Sequence[dict[str, float]], *, wait_s: float = 0.0) -> None:
    """Find out whether the cluster's nodes can hold all workers at once; Ray itself would wait for ever.

    Args:
        bundles: what each worker needs, such as ``{"CPU": 2, "GPU": 1}``; a bundle lies on one node.
        wait_s: how long to wait for an autoscaler, which is told what is needed.

    Raises:
        ResourceError: something does not fit; the message says how much is asked and how much is there.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + wait_s
    if wait_s:
        request_resources(bundles=[dict(bundle) for bundle in bundles])
    while not fits(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
        if time.monotonic() >= deadline:
            names = sorted({name for bundle in bundles for name in bundle})
            asked = ", ".join(f"{sum(bundle.get(name, 0) for bundle in bundles):g} {name}" for name in names)
            there = ", ".join(f"{ray.cluster_resources().get(name, 0):g} {name}" for name in names)
            raise ResourceError(
                f"the run asks for {len(bundles)} worker(s) with {asked} in all; the cluster has {there}. Ask for less "
                "(num_workers, cpus_per_worker, accelerator), add nodes, or give an autoscaler time "
                "(--launch.wait-for-resources-s)"
            )
        time.sleep(min(2.0, max(0.0, deadline - time.monotonic())))


def fits(bundles: Sequence[dict[str, float]], nodes: Sequence[dict[str, float]]) -> bool:
    """Whether the bundles can be laid on the nodes, the largest first, each on the first node with room."""
    room = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda bundle: sum(bundle.values()), reverse=True):
        for node in room:
            if all(node.get(name, 0) >= need for name, need in bundle.items()):
                for name, need in bundle.items():
                    node[name] = node.get(name, 0) - need
                break
        else:
            return False
    return True


def _train_here(config: TrainConfig, run_dir: Path) -> None:
    from mp3d.device import pick_device
    from mp3d.session import PlainSession
    from mp3d.train import train

    if config.loop.num_workers != 1:
        raise ConfigError(
            f"loop.num_workers is {config.loop.num_workers}, and --launch.runner local is one process; use ray"
        )
    device = pick_device(config.launch.accelerator)
    train(config, PlainSession(run_dir, keep=config.launch.keep_checkpoints, device=device))


def _train_on_ray(config: TrainConfig, run_dir: Path, worker: dict[str, float]) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _train_in_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "run_dir": str(run_dir)},
        scaling_config=ScalingConfig(
            num_workers=config.loop.num_workers,
            use_gpu="GPU" in worker,
            resources_per_worker=worker,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run_dir),
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(
                max_failures=config.launch.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        for cause in _causes(error):
            if isinstance(cause, Mp3dError):
                raise cause from error
        raise


def _train_in_worker(payload: dict[str, Any]) -> None:
    """The worker's door: the configuration is validated again."""
    import torch

    from mp3d.session import RayTrainSession
    from mp3d.train import train

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would repeat every report
    config = TrainConfig.model_validate(payload["config"])
    torch.set_num_threads(max(1, int(config.launch.cpus_per_worker)))
    train(config, RayTrainSession(Path(payload["run_dir"]), keep=config.launch.keep_checkpoints))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and the failures of single workers that it carries."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        waiting += list(getattr(current, "worker_failures", {}).values())


def _differences(known: dict[str, Any], given: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in known.keys() | given.keys():
        old, new = known.get(name), given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} was {old!r}, is {new!r}"


def _ensure_token() -> None:
    """Ray's shared secret of this user, readable by no one else; Ray would write it readable to all."""
    if os.environ["RAY_AUTH_MODE"] != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
