"""Weights & Biases, wrapped so that it can neither stop a run nor leak.

Online where an API key is present, else offline (``wandb sync`` sends it later); an unreachable server falls back to
offline within seconds. Code, git state, console and host paths are not sent. A resumed run goes on in the same W&B run.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

from mp3d.config import TrackingConfig, TrainConfig

INIT_TIMEOUT_S = 10
"""How long ``wandb.init`` may look for its server."""
Mode = Literal["online", "offline", "disabled"]
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the metrics of a step or an epoch."""

    def __call__(self, metrics: dict[str, float], step: int) -> None: ...


@contextmanager
def track(config: TrainConfig, run_dir: Path, rank: int) -> Iterator[Tracker]:
    """A tracker for the life of a run; does nothing on other ranks than 0 and where tracking is disabled."""
    mode = tracking_mode(config.tracking.mode)
    run = _start(config, run_dir, mode) if rank == 0 and mode != "disabled" else None

    def report(metrics: dict[str, float], step: int) -> None:
        if run is not None:
            _guarded(run.log, metrics, step=step)

    try:
        yield report
    finally:
        if run is not None:
            _guarded(run.finish)


def tracking_mode(asked: Mode | Literal["auto"]) -> Mode:
    """online, offline or disabled."""
    if asked != "auto":
        return asked
    named = os.environ.get("WANDB_MODE")
    if named in ("online", "offline", "disabled"):
        return named
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


def _start(config: TrainConfig, run_dir: Path, mode: Mode) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own crash reports would name this machine
    import wandb

    run_dir.mkdir(parents=True, exist_ok=True)
    known = {
        "project": config.tracking.project,
        "group": config.tracking.group,
        "name": config.name,
        "id": blake2b(f"{config.tracking.project}/{config.name}".encode(), digest_size=8).hexdigest(),
        "resume": "allow",
        "reinit": "create_new",  # a sweep tracks several runs side by side
        "dir": str(run_dir),
        # paths stay here: a folder's name may hold a patient's
        "config": config.model_dump(mode="json", exclude={"shards", "init_from", "launch", "tracking"}),
    }
    try:
        return wandb.init(**known, mode=mode, settings=_settings())
    except Exception as error:  # the boundary of a service that the run must not depend on
        wandb.teardown()  # else its helper process holds the run's id
        if mode == "offline":
            log.warning("W&B is switched off for this run: %s", type(error).__name__)
            return None
        log.warning("W&B cannot be reached (%s); tracking offline, `wandb sync` sends it later", type(error).__name__)
        return _start(config, run_dir, "offline")


def track_report(
    config: TrackingConfig, name: str, folder: Path, numbers: Mapping[str, float], pictures: Mapping[str, Path]
) -> None:
    """A W&B run of its own for an evaluation, with its headline numbers and the figures of its report.

    Args:
        name: of what was evaluated.
        folder: of the report; W&B's files go there where it is offline.
    """
    mode = tracking_mode(config.mode)
    if mode == "disabled":
        return
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    known = {
        "project": config.project,
        "group": config.group,
        "name": f"{name}-evaluation",
        "job_type": "evaluation",
        "reinit": "create_new",
        "dir": str(folder),
        "settings": _settings(),
    }
    try:
        run = wandb.init(**known, mode=mode)
    except Exception as error:  # the boundary of a service that nothing must depend on
        wandb.teardown()
        log.warning("W&B cannot be reached (%s); the report is not sent", type(error).__name__)
        return
    shown = {f"report/{picture}": wandb.Image(str(path)) for picture, path in pictures.items()}
    _guarded(run.log, {**numbers, **shown})
    _guarded(run.finish)


def _settings() -> Any:
    """Nothing of this machine or the code is sent."""
    import wandb

    return wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        init_timeout=INIT_TIMEOUT_S,
        x_disable_machine_info=True,
    )


def _guarded(call: Any, *args: Any, **kwargs: Any) -> None:
    """Whatever happens inside W&B, the run goes on: its client raises many kinds of errors, none of them the run's
    business.
    """
    try:
        call(*args, **kwargs)
    except Exception as error:  # the same boundary
        log.warning("W&B: %s", type(error).__name__)
