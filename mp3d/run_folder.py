"""The folder of a run: what its name stands for, its checkpoints and its metrics, whatever ends the process that
writes it.

    <storage_path>/<name>/
      run.json           the configuration that the name stands for, and the digests of the shards and of what
                         the run starts from
      epoch_0001/ ...    checkpoints: the best few and the latest (mp3d.checkpoint)
      metrics.jsonl      one line an epoch
      damaged_epoch_...  a checkpoint that resuming refused: kept to be looked at, never read
      lock               held by the process that trains

An epoch is committed by one rename, after its line of metrics is written and everything is on the disk. So a process
that ends at any moment leaves a run that stands at the end of some epoch, and files aside, which the next one removes.
"""

import fcntl
import json
import math
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from mp3d.checkpoint import (
    RUN,
    Checkpoint,
    checkpoints_of,
    differences,
    epoch_directory,
    identity_of,
    open_checkpoint,
    score_of,
    sync_to_disk,
)
from mp3d.config import TrainConfig
from mp3d.data.shard import ASIDE_PATTERN, write_aside
from mp3d.errors import CheckpointError, ConfigError, ResourceError
from mp3d.models.transfer import check_source

Save = Callable[[Path], None]
"""Writes a checkpoint into the empty directory it is given."""
LOCK_PATIENCE_S = 10.0
"""How long the processes of a run that was killed may take to end."""


def claim(run_dir: Path, config: TrainConfig, shards_digest: str | None = None, init_digest: str | None = None) -> Path:
    """Make the run's folder, or check that it belongs to this configuration, these shards and this beginning.

    Raises:
        ConfigError: the name stands for something else; the message lists the fields that differ.
        ResourceError: the folder cannot be written.
    """
    claim_name(run_dir, RUN, config.name, run_identity(config, shards_digest, init_digest))
    return run_dir


def run_identity(
    config: TrainConfig, shards_digest: str | None = None, init_digest: str | None = None
) -> dict[str, Any]:
    """What must be equal for a run to go on: other shards, or another beginning, under the same path would train other
    weights.
    """
    return config.identity() | {"shards_digest": shards_digest, "init_digest": init_digest}


def beginning(run_dir: Path, config: TrainConfig) -> str | None:
    """Digest of the checkpoint that the run starts from. A run that has a checkpoint of its own keeps the one that it
    did start from: ``init_from`` may be gone by then, or trained on.

    Raises:
        CheckpointError: the run is still to be started, and ``init_from`` cannot be opened or is of another network.
    """
    if config.init_from is None:
        return None
    if not checkpoints_of(run_dir):
        source = open_checkpoint(config.init_from)
        check_source(source.config.model, config.model)
        return source.digest
    try:
        return json.loads((run_dir / RUN).read_text()).get("init_digest")
    except (OSError, ValueError, AttributeError):
        return None  # check_name tells what is wrong with it


def claim_name(folder: Path, file: str, name: str, identity: dict[str, Any]) -> None:
    """What a name stands for is written into its folder once, and compared from then on; see :func:`claim`."""
    check_name(folder, file, name, identity)
    if (folder / file).exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / file, json.dumps(identity, indent=1) + "\n")
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written ({error}); make room or choose another folder") from error


def check_name(folder: Path, file: str, name: str, identity: dict[str, Any]) -> None:
    """Raises: ConfigError, as :func:`claim`; writes nothing."""
    path = folder / file
    if not path.exists():
        return
    try:
        known = _completed(json.loads(path.read_text()))
        differing = list(differences(known, identity))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); remove {folder}, or give another --name") from error
    if differing:
        raise ConfigError(
            f"{name!r} exists with another configuration ({'; '.join(differing)}); "
            f"give this one another --name, or remove {folder}"
        )


def _completed(known: dict[str, Any]) -> dict[str, Any]:
    """What a name stands for, a run or a sweep over one, with the fields that came into being since."""
    try:
        if "base" in known:  # of a sweep
            return known | {"base": known["base"] | identity_of(known["base"])}
        return known | identity_of(known)
    except ValueError:
        return known  # of another version: the differences tell


@contextmanager
def held(run_dir: Path, wait_s: float = LOCK_PATIENCE_S) -> Iterator[None]:
    """Keep every other process from training the same run; a process that ends loses its hold.

    Raises:
        ConfigError: another process trains it.
    """
    try:
        file = (run_dir / "lock").open("a+")
    except OSError as error:
        raise ResourceError(f"{run_dir} cannot be written ({error}); make room or choose another folder") from error
    with file:
        deadline = time.monotonic() + wait_s
        while not _locked(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise ConfigError(
                    f"{run_dir} is being trained by another process ({file.read() or 'unknown'}); wait for it, stop "
                    "it, or give this run another --name"
                )
            time.sleep(0.2)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except OSError:
            pass  # on a full disk nobody is told who holds it
        yield


def resume_point(run_dir: Path) -> Checkpoint | None:
    """The newest intact checkpoint of a run; None for a new one. Called by the one process that writes the run.

    Checkpoints that are newer and damaged are refused by name and set aside, where nothing reads them.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged: a run never silently begins anew.
    """
    for left_over in (*run_dir.glob(".epoch_*.tmp"), *run_dir.glob(ASIDE_PATTERN)):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)
    faults: dict[Path, str] = {}
    for path in sorted(run_dir.glob("epoch_*"), reverse=True):
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            faults[path] = str(error)
            continue
        for damaged, why in faults.items():
            aside = _set_aside(damaged)
            warnings.warn(f"refused and set aside as {aside.name}: {why}", stacklevel=2)
        return found
    if faults:
        raise CheckpointError(
            f"every checkpoint of {run_dir} is damaged: {'; '.join(faults.values())}. Restore one, or remove {run_dir} "
            "to train from the start"
        )
    return None


def commit_epoch(run_dir: Path, epoch: int, score: float, metrics: dict[str, float], save: Save, *, keep: int) -> None:
    """Save aside, add a line to ``metrics.jsonl``, rename, keep the best ``keep`` checkpoints and the latest.

    Raises:
        ResourceError: the disk is full, or cannot be written for another reason; nothing half-written is left.
    """
    aside = run_dir / f".{epoch_directory(epoch)}.{token_hex(4)}.tmp"  # not that of a writer that is about to be killed
    final = run_dir / epoch_directory(epoch)
    try:
        aside.mkdir(parents=True)
        save(aside)
        before = [line for line in read_metrics(run_dir) if line["epoch"] < epoch]
        lines = [*before, {"epoch": epoch, "score": score, **metrics}]
        write_aside(run_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if final.exists():  # damaged, but whoever resumed did not look
            _set_aside(final)
        aside.rename(final)
        sync_to_disk(run_dir)
    except OSError as error:
        raise ResourceError(
            f"the checkpoint of epoch {epoch} could not be written to {run_dir} ({error.strerror or error}); make room "
            "there; the same command goes on from the epoch before"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for path in _surplus(checkpoints_of(run_dir), keep):
        if score_of(path) == -math.inf:
            warnings.warn(f"removed: {path}, whose metrics.json is damaged", stacklevel=2)
        shutil.rmtree(path, ignore_errors=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every epoch, each once, in order; a torn line is passed over."""
    path = run_dir / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            content = json.loads(line)
            found[int(content["epoch"])] = content
        except (ValueError, KeyError, TypeError):
            continue
    return [line for _, line in sorted(found.items())]


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"damaged_{path.name}" + (f".{number}" if number > 1 else ""))).exists():
        number += 1
    return path.rename(aside)


def _surplus(checkpoints: list[Path], keep: int) -> list[Path]:
    """All but the best and the latest; one that does not tell its score counts as the worst."""
    ranked = sorted(checkpoints, key=lambda path: (score_of(path), path.name), reverse=True)
    return [path for path in ranked[keep:] if path != checkpoints[-1]]


def _locked(descriptor: int) -> bool:
    """A lock of this process, which file systems in a network know too; where there are none, nobody is kept out."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True
