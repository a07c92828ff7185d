"""Starts the training loop: in this process, or as Ray Train workers. Connects to Ray, and asks it first whether it
can.
"""

import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp3d.checkpoint import RUN
from mp3d.config import TrainConfig
from mp3d.data.shard import is_disk_full, write_aside
from mp3d.errors import ConfigError, Mp3dError, ResourceError, TrainingStopped, as_json, from_json
from mp3d.run_folder import beginning, check_name, claim, held, run_identity

if TYPE_CHECKING:
    import torch

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
FULL_CLUSTER_PATIENCE_S = 5.0
"""How long those may take to let go who have just ended."""
_ASK_FOR_LESS = (
    "Ask for less (num_workers, cpus_per_worker, accelerator), add nodes, or give an autoscaler time "
    "(--launch.wait-for-resources-s)"
)
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


def run_training(config: TrainConfig, announce: Callable[[TrainConfig], None] = lambda config: None) -> Path:
    """Train (or go on training) and return the run's folder, which stands for its best checkpoint.

    Args:
        config: with absolute paths.
        announce: is called when everything has been checked, before anything is started.

    Raises:
        ConfigError: the run's name stands for another configuration.
        ResourceError: the cluster cannot carry it.
        Mp3dError: whatever stops :func:`mp3d.train.train`.
    """
    from mp3d.device import pick_device
    from mp3d.fitting import fit_to_data
    from mp3d.train import check_inputs

    run_dir = Path(config.launch.storage_path) / config.name
    device = None
    if config.launch.runner == "local":
        _check_local(config)
        device = pick_device(config.launch.accelerator)
    digest = check_inputs(config).digest
    config = fit_to_data(config)
    init_digest = beginning(run_dir, config)
    check_name(run_dir, RUN, config.name, run_identity(config, digest, init_digest))
    if run_dir.exists():
        with held(run_dir):  # else it would be told only when workers have started
            pass
    if device is not None:
        announce(config)
        _train_here(config, claim(run_dir, config, digest, init_digest), device)
    else:
        connect_ray(dashboard=True)
        worker = worker_resources(config.launch.cpus_per_worker, config.launch.accelerator)
        bundles = [worker] * (config.loop.min_workers or config.loop.num_workers)
        if config.launch.ingest == "ray_data":
            bundles.append({"CPU": 1.0})  # tasks that read; without one the workers would wait for ever
        check_resources(bundles, wait_s=config.launch.wait_for_resources_s)
        announce(config)
        _train_on_ray(config, claim(run_dir, config, digest, init_digest), worker)
    return run_dir


def _check_local(config: TrainConfig) -> None:
    if config.loop.num_workers != 1:
        raise ConfigError(
            f"loop.num_workers is {config.loop.num_workers}, and --launch.runner local is one process; use ray"
        )
    if config.launch.ingest == "ray_data":
        raise ConfigError("launch.ingest is ray_data, and --launch.runner local is without Ray; use pyarrow")


def worker_resources(cpus: float, accelerator: str) -> dict[str, float]:
    """What one worker takes; ``auto`` asks the cluster for a GPU, not this machine, which may be a head without one."""
    import ray

    has_gpu = accelerator == "gpu" or (accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    return {"CPU": cpus, "GPU": 1.0} if has_gpu else {"CPU": cpus}


def check_resources(bundles: Sequence[dict[str, float]], *, wait_s: float = 0.0) -> None:
    """Find out whether the cluster's nodes can hold all workers at once, now; Ray itself would wait for ever.

    Args:
        bundles: what each worker needs, such as ``{"CPU": 2, "GPU": 1}``; a bundle lies on one node.
        wait_s: how long to wait for an autoscaler, which is told what is needed, or for others to end.

    Raises:
        ResourceError: something does not fit; the message says how much is asked, how much is there and how much free.
    """
    import ray
    from ray.autoscaler.sdk import request_resources
    from ray.util import placement_group, remove_placement_group

    deadline = time.monotonic() + wait_s
    if wait_s:
        request_resources(bundles=[dict(bundle) for bundle in bundles])
    while not fits(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
        if time.monotonic() >= deadline:
            raise ResourceError(f"{_asked_and_there(bundles)}. {_ASK_FOR_LESS}")
        time.sleep(min(2.0, max(0.0, deadline - time.monotonic())))
    room = placement_group([dict(bundle) for bundle in bundles])  # as the workers will ask for it
    try:
        free = room.wait(max(deadline - time.monotonic(), FULL_CLUSTER_PATIENCE_S))
    finally:
        remove_placement_group(room)
    if not free:
        raise ResourceError(
            f"{_asked_and_there(bundles)}, of which others hold too much. Wait for them "
            f"(--launch.wait-for-resources-s), or: {_ASK_FOR_LESS}"
        )


def _asked_and_there(bundles: Sequence[dict[str, float]]) -> str:
    import ray

    names = sorted({name for bundle in bundles for name in bundle})
    there, free = ray.cluster_resources(), ray.available_resources()
    asked = ", ".join(f"{sum(bundle.get(name, 0) for bundle in bundles):g} {name}" for name in names)
    has = ", ".join(f"{there.get(name, 0):g} {name}" for name in names)
    left = ", ".join(f"{free.get(name, 0):g} {name}" for name in names)
    return f"the run asks for {len(bundles)} worker(s) with {asked} in all; the cluster has {has} ({left} free)"


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


def _train_here(config: TrainConfig, run_dir: Path, device: "torch.device") -> None:
    from mp3d.session import PlainSession
    from mp3d.train import train

    with held(run_dir):
        train(config, PlainSession(run_dir, keep=config.launch.keep_checkpoints, device=device))


def _train_on_ray(config: TrainConfig, run_dir: Path, worker: dict[str, float]) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    shutil.rmtree(run_dir / "ray", ignore_errors=True)  # nothing there is needed, and a kill may have torn it
    stopped = run_dir / f".stopped.{secrets.token_hex(4)}.aside"
    loop, launch = config.loop, config.launch
    trainer = TorchTrainer(
        _train_in_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "run_dir": str(run_dir),
            "stopped": str(stopped),
            "on_terminal": sys.stdout.isatty(),
        },
        scaling_config=ScalingConfig(
            num_workers=(loop.min_workers, loop.num_workers) if loop.min_workers else loop.num_workers,
            use_gpu="GPU" in worker,
            resources_per_worker=worker,
            elastic_resize_monitor_interval_s=launch.resize_interval_s,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run_dir),
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(
                max_failures=launch.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
        ),
    )
    failure = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failure = error
    if stopped.exists():
        content = stopped.read_text()
        stopped.unlink()
        raise from_json(content) from failure
    if failure is not None:
        if explained := _explained(failure, run_dir):
            raise explained from failure
        raise failure


def _train_in_worker(payload: dict[str, Any]) -> None:
    """The worker's door: the configuration is validated again.

    What no restart can mend is noted in the run's folder, for Ray Train starts the workers anew whatever stopped them.
    """
    import torch

    from mp3d.session import RayTrainSession
    from mp3d.train import train

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would repeat every report
    config = TrainConfig.model_validate(payload["config"])
    run_dir, stopped = Path(payload["run_dir"]), Path(payload["stopped"])
    if stopped.exists():
        return
    torch.set_num_threads(max(1, int(config.launch.cpus_per_worker)))
    session = RayTrainSession(run_dir, keep=config.launch.keep_checkpoints, on_terminal=payload["on_terminal"])
    try:
        with held(run_dir) if session.rank == 0 else nullcontext():
            train(config, session)
    except TrainingStopped:
        raise  # a lost process is worth another start
    except Mp3dError as error:
        write_aside(stopped, as_json(error))
        if session.world_size > 1:
            raise  # the other workers wait for this one


def _explained(error: Exception, run_dir: Path) -> Mp3dError | None:
    """What stopped the workers, as an error of ours; None where it is a defect."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
    from ray.train import ControllerError, WorkerGroupError

    ends_of_a_process = (RayActorError, NodeDiedError, WorkerCrashedError, OutOfMemoryError)
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, Mp3dError):
            return cause
        if is_disk_full(cause):
            return ResourceError(
                f"{run_dir} is full ({cause}); make room; the same command goes on from the last epoch"
            )
    if isinstance(error, ControllerError):
        return ResourceError(f"the workers could not be started ({causes[-1]}); the same command tries again")
    lost = [  # the others may have failed too, for want of this one
        str(rank)
        for rank, failure in sorted(getattr(error, "worker_failures", {}).items())
        if any(isinstance(cause, ends_of_a_process) for cause in _causes(failure))
    ]
    if isinstance(error, WorkerGroupError) and lost:
        return TrainingStopped(
            f"worker {', '.join(lost)} was lost, and launch.max_failures is used up; look for its end (out of "
            "memory?) in the logs of its node; the same command goes on from the last whole epoch"
        )
    return None


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
        waiting += [getattr(current, "health_check_failure", None)]
        waiting += list(getattr(current, "worker_failures", {}).values())


def _ensure_token() -> None:
    """Ray's shared secret of this user, readable by no one else; Ray would write it readable to all."""
    if os.environ["RAY_AUTH_MODE"] != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
