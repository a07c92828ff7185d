"""Weights & Biases, wrapped so that it can neither stop a run nor leak.

Online where an API key is present, else offline (``wandb sync`` sends it later); an unreachable server falls back to
offline within seconds, and one that is lost later costs seconds at the end. What is sent is listed here: numbers and
choices of the configuration, metrics, use of CPU, memory and GPU, the best checkpoint by its digest, and pictures only
where they are asked for. Code, git state, console, arguments, paths, host and user names are not. A resumed run goes on
in the same W&B run.
"""

import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mp3d.checkpoint import checkpoints_of, open_checkpoint
from mp3d.config import TrackingConfig, TrainConfig
from mp3d.data.shard import write_aside

if TYPE_CHECKING:
    import numpy as np

INIT_TIMEOUT_S, ASK_TIMEOUT_S, FINISH_TIMEOUT_S = 5, 3, 5
"""How long W&B may look for its server, wait for an answer, and send what is left at the end."""
SYSTEM_INTERVAL_S = 10.0
"""How often the use of CPU, memory and GPU is noted."""
CONFIG_FIELDS = ("clip", "augment", "model", "optim", "loop")
"""Of the configuration: numbers and choices. Paths stay here, for a folder's name may hold a patient's."""
METRIC_NAME = re.compile(r"[A-Za-z][\w@./-]{0,80}")
Mode = Literal["online", "offline", "disabled"]
log = logging.getLogger(__name__)


class Picture(Protocol):
    """A picture and a line below it."""

    @property
    def image(self) -> "np.ndarray":
        """``(h, w, 3)`` uint8."""
        ...

    @property
    def caption(self) -> str: ...


class Tracker:
    """Takes what a run has to tell; without a W&B run it does nothing.

    Attributes:
        pictures: how many it wants after each epoch.
    """

    def __init__(self, run: Any = None, pictures: int = 0) -> None:
        self._run, self.pictures = run, pictures if run is not None else 0

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of a step or an epoch."""
        if self._run is not None:
            _guarded(self._run.log, allowed_metrics(metrics), step=step)

    def show(self, pictures: Sequence[Picture], step: int) -> None:
        """Pictures of an epoch."""
        if self._run is not None:
            _guarded(self._send, pictures, step)

    def _send(self, pictures: Sequence[Picture], step: int) -> None:
        import wandb

        self._run.log({"pictures": [wandb.Image(each.image, caption=each.caption) for each in pictures]}, step=step)

    def end(self, config: TrainConfig, run_dir: Path) -> None:
        if self._run is not None:
            _bounded(_refer_to_checkpoint, self._run, config, run_dir)
            _guarded(self._run.finish)


@contextmanager
def track(config: TrainConfig, run_dir: Path, rank: int) -> Iterator[Tracker]:
    """A tracker for the life of a run; does nothing on other ranks than 0 and where tracking is disabled."""
    mode = tracking_mode(config.tracking.mode)
    run = _start(partial(_known, config, run_dir), mode) if rank == 0 and mode != "disabled" else None
    tracker = Tracker(run, config.tracking.pictures)
    try:
        yield tracker
    finally:
        tracker.end(config, run_dir)


def tracking_mode(asked: Mode | Literal["auto"]) -> Mode:
    """online, offline or disabled."""
    if asked != "auto":
        return asked
    named = os.environ.get("WANDB_MODE")
    if named in ("online", "offline", "disabled"):
        return named
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


def allowed_config(config: TrainConfig) -> dict[str, Any]:
    """The part of a configuration that may be sent."""
    return config.model_dump(mode="json", include=set(CONFIG_FIELDS))


def allowed_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers under plain names."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if METRIC_NAME.fullmatch(name) and isinstance(value, int | float) and math.isfinite(value)
    }


def run_id(run_dir: Path) -> str:
    """The W&B run of a run: drawn once and kept in its folder, so that only a resumed run goes on in it."""
    path = run_dir / "tracking.json"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_aside(path, json.dumps({"wandb_run_id": token_hex(8)}) + "\n")
    return str(json.loads(path.read_text())["wandb_run_id"])


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
    known = {"project": config.project, "group": config.group, "name": f"{name}-evaluation", "job_type": "evaluation"}
    run = _start(lambda: {**known, "dir": str(folder)}, mode)
    if run is None:
        return
    import wandb

    plain = {re.sub(r"[^\w@./-]+", "_", number): value for number, value in numbers.items()}
    shown = {f"report/{picture}": wandb.Image(str(path)) for picture, path in pictures.items()}
    _guarded(run.log, allowed_metrics(plain) | shown)
    _guarded(run.finish)


def _start(known: Callable[[], dict[str, Any]], mode: Mode) -> Any:
    """A W&B run; offline where no server answers, None where that fails too."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own crash reports would name this machine
    os.environ.setdefault("WANDB_SILENT", "true")  # what it says before it has read its settings
    wandb: Any = None
    try:
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            silent=True,
            host="-",
            username="-",
            program="-",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            x_disable_meta=True,
            x_stats_sampling_interval=SYSTEM_INTERVAL_S,
            x_save_requirements=False,
        )
        # a sweep tracks several runs side by side
        return wandb.init(**known(), mode=mode, reinit="create_new", settings=settings)
    except Exception as error:  # the boundary of a service that nothing must depend on
        if wandb is not None:
            _guarded(wandb.teardown)  # else its helper process holds the run's id
        if mode == "offline":
            log.warning("W&B is switched off: %s", type(error).__name__)
            return None
        log.warning("W&B cannot be reached (%s); tracking offline, `wandb sync` sends it later", type(error).__name__)
        return _start(known, "offline")


def _known(config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """What W&B is told of a training run."""
    return {
        "project": config.tracking.project,
        "group": config.tracking.group,
        "name": config.name,
        "id": run_id(run_dir),
        "resume": "allow",
        "dir": str(run_dir),
        "config": allowed_config(config),
    }


def _refer_to_checkpoint(run: Any, config: TrainConfig, run_dir: Path) -> None:
    """The best checkpoint as an artifact that names it: nothing is uploaded, no path is told."""
    if not checkpoints_of(run_dir):
        return
    import wandb

    best = open_checkpoint(run_dir)
    artifact = wandb.Artifact(
        f"{config.name}-checkpoint",
        type="model",
        metadata={"digest": best.digest, "epoch": best.epoch, "score": best.score},
    )
    artifact.add_reference(
        f"mp3d://{config.name}/{best.path.name}?sha256={best.digest}", name=best.path.name, checksum=False
    )
    run.log_artifact(artifact, aliases=["best"])


def _bounded(call: Any, *args: Any) -> None:
    """For what asks the server and would wait for it: given up after some seconds."""
    thread = threading.Thread(target=_guarded, args=(call, *args), daemon=True)
    thread.start()
    thread.join(ASK_TIMEOUT_S)
    if thread.is_alive():
        log.warning("W&B: no answer in %s s", ASK_TIMEOUT_S)


def _guarded(call: Any, *args: Any, **kwargs: Any) -> None:
    """Whatever happens inside W&B, the run goes on: its client raises many kinds of errors, none of them the run's
    business.
    """
    try:
        call(*args, **kwargs)
    except Exception as error:  # the same boundary
        log.warning("W&B: %s", type(error).__name__)
