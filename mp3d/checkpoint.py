"""A checkpoint: a directory that knows itself, and nothing in it is ever unpickled.

    config.json            the complete TrainConfig that made it
    model.safetensors      the model's state dict
    trainer.safetensors    optimiser and random-number tensors      } to go on training;
    trainer.json           optimiser groups, epoch, step            } evaluation and serving ignore them
    metrics.json           epoch, score and the metrics of that epoch
    manifest.json          written last: format version and the SHA-256 of every other file
    streaming.json         by an evaluation, later: what streaming whole series through it costs
    operating_points.json  likewise: score thresholds chosen on the validation split (mp3d/operating_points.py)
    transfer.json          of weights that were released elsewhere: what became of each

No manifest, no checkpoint. A *run* is a directory of checkpoints (``epoch_0001`` ...); wherever a checkpoint is asked
for, a run will do and stands for its best. A folder with the name of an epoch holds that epoch, of the run whose
``run.json`` stands beside it; else it was swapped and is refused as damaged.
"""

import errno
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from mp3d.config import TrainConfig
from mp3d.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RUN = "run.json"
"""In the folder of a run: the configuration that its name stands for (:mod:`mp3d.run_folder`)."""
KIND = "mp3d-checkpoint"
EPOCH_NAME = re.compile(r"epoch_\d{4,}")
STREAMING = "streaming.json"
TRANSFER = "transfer.json"
MAX_STREAMING_LOSS = 0.005
"""Mean sensitivity, half a point: a checkpoint that loses more is not streamed unless asked to."""

MIN_STREAMING_PATIENTS = 10
"""On fewer a loss of half a point cannot be told from none."""


@dataclass(frozen=True)
class TrainerState:
    """What a run needs besides the model's weights to go on as if it had never stopped."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """Plain JSON values."""


@dataclass(frozen=True)
class StreamingLoss:
    """What streaming whole series costs, on the key slices of the validation split.

    Attributes:
        mean_sensitivity: of the protocol, of series read as in training (``mode``, of :mod:`mp3d.predict`).
        mean_sensitivity_streamed: of the same key slices in streamed series.
        interval: of the loss, 95 %, by resampling patients.
        split: of the data whose manifest has the digest ``data``.
    """

    mean_sensitivity: float
    mean_sensitivity_streamed: float
    interval: tuple[float, float]
    num_key_slices: int
    num_patients: int
    mode: str
    protocol: str
    split: str
    data: str

    @property
    def mean_sensitivity_lost(self) -> float:
        return self.mean_sensitivity - self.mean_sensitivity_streamed


@dataclass(frozen=True)
class Checkpoint:
    """An opened and verified checkpoint."""

    path: Path
    config: TrainConfig
    epoch: int
    score: float
    metrics: dict[str, float]
    digest: str
    """SHA-256 of the manifest, which holds the SHA-256 of every file: the model's name in reports and answers."""

    def model_state(self) -> dict[str, Tensor]:
        """Raises: CheckpointError if its file holds no tensors, whatever the manifest says."""
        return _load_tensors(self.path / "model.safetensors")

    def check_trained(self) -> None:
        """Raises: CheckpointError where parts of a model of released weights are as they were drawn."""
        if not (self.path / TRANSFER).exists():
            return
        drawn = json.loads((self.path / TRANSFER).read_text())["reinitialised"]
        if untrained := [item for item in drawn if not item["key"].endswith("num_batches_tracked")]:
            raise CheckpointError(
                f"{self.path} was converted from released weights, and {len(untrained)} tensors of its model were not "
                f"among them, the first {untrained[0]['key']}; train from it (--init-from) before it is judged or used"
            )

    def may_be_streamed(self) -> bool:
        """Whether an evaluation of this very checkpoint found that streaming costs at most ``MAX_STREAMING_LOSS``.

        What older versions wrote, on whatever split was judged, has other fields and does not count.
        """
        try:
            found = json.loads((self.path / STREAMING).read_text())
            loss = StreamingLoss(**{each.name: found[each.name] for each in fields(StreamingLoss)})
            # where nothing is found, or of a few patients only, nothing was measured
            known = loss.mean_sensitivity_streamed > 0 and loss.num_patients >= MIN_STREAMING_PATIENTS
            bearable = round(loss.mean_sensitivity_lost, 9) <= MAX_STREAMING_LOSS
            return found["checkpoint"] == self.digest and known and bearable
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def record_streaming(self, loss: StreamingLoss, provenance: Mapping[str, str]) -> None:
        """Keep beside the checkpoint what an evaluation found."""
        content = asdict(loss) | {"mean_sensitivity_lost": loss.mean_sensitivity_lost, "provenance": dict(provenance)}
        _write_json(self.path / STREAMING, content | {"checkpoint": self.digest})

    def trainer_state(self) -> TrainerState:
        """Raises: CheckpointError if it was saved without one."""
        if not (self.path / "trainer.json").exists():
            raise CheckpointError(f"{self.path} holds no trainer state: it can be evaluated and served, not resumed")
        return TrainerState(
            _load_tensors(self.path / "trainer.safetensors"), json.loads((self.path / "trainer.json").read_text())
        )


def epoch_directory(epoch: int) -> str:
    return f"epoch_{epoch:04d}"


def save_checkpoint(
    directory: Path,
    *,
    config: TrainConfig,
    model_state: dict[str, Tensor],
    epoch: int,
    score: float,
    metrics: dict[str, float],
    trainer: TrainerState | None = None,
) -> None:
    """Write a checkpoint into an existing empty directory; the manifest comes last, and all of it is on the disk then.

    Raises:
        OSError: the disk is full, or cannot be written for another reason.
    """
    _write_json(directory / "config.json", config.model_dump(mode="json"))
    _save_tensors(directory / "model.safetensors", model_state)
    if trainer is not None:
        _save_tensors(directory / "trainer.safetensors", trainer.tensors)
        _write_json(directory / "trainer.json", trainer.values)
    _write_json(directory / "metrics.json", {"epoch": epoch, "score": score, "metrics": metrics})
    files = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
    _write_json(directory / MANIFEST, {"kind": KIND, "format_version": FORMAT_VERSION, "files": files})
    for path in (*directory.iterdir(), directory):
        sync_to_disk(path)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, or the best intact checkpoint of a run.

    Raises:
        CheckpointError: nothing there, a torn, altered or swapped checkpoint, or one of another format version.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return _open_verified(path)
    candidates = checkpoints_of(path)
    if not candidates:
        raise CheckpointError(
            f"{path} is neither a checkpoint (it has no {MANIFEST}) nor a run that holds one; "
            "give the folder that training printed, such as runs/<name>"
        )
    ranked = sorted(candidates, key=lambda candidate: (score_of(candidate), candidate.name), reverse=True)
    return _first_intact(ranked, path)


def checkpoints_of(run: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(path.parent for path in run.glob(f"epoch_*/{MANIFEST}"))


def score_of(checkpoint: Path) -> float:
    """The score of a committed checkpoint without opening it; minus infinity where it does not say, being damaged."""
    try:
        score = float(json.loads((checkpoint / "metrics.json").read_text())["score"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return -math.inf
    return -math.inf if math.isnan(score) else score


def pack_optimizer(optimizer: Optimizer) -> TrainerState:
    """Optimiser state as named tensors and plain values."""
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.contiguous()
            elif value is not None:
                numbers[f"{index}.{name}"] = value
    return TrainerState(tensors, {"param_groups": state["param_groups"], "optimizer_numbers": numbers})


def unpack_optimizer(optimizer: Optimizer, trainer: TrainerState) -> None:
    """Put back what :func:`pack_optimizer` took."""
    slots: dict[int, dict[str, Any]] = {}
    for key, tensor in trainer.tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            slots.setdefault(int(index), {})[name] = tensor
    for key, number in trainer.values["optimizer_numbers"].items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = number
    optimizer.load_state_dict({"state": slots, "param_groups": trainer.values["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # in its memory layout


def _first_intact(candidates: list[Path], run: Path) -> Checkpoint:
    faults = []
    for candidate in candidates:
        try:
            return _open_verified(candidate)
        except CheckpointError as error:
            faults.append(str(error))
            warnings.warn(f"passed over: {error}", stacklevel=3)
    raise CheckpointError(f"every checkpoint of {run} is damaged: " + "; ".join(faults))


def _open_verified(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["kind"] != KIND:
            raise CheckpointError(f"{path / MANIFEST} is of kind {manifest['kind']!r}, not {KIND!r}")
        if manifest["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {manifest['format_version']}, this program reads {FORMAT_VERSION}; "
                "train again, or use the program version that wrote it"
            )
        for name, expected in manifest["files"].items():
            if _sha256(path / name) != expected:
                raise CheckpointError(f"{path / name} does not match its SHA-256 in {MANIFEST}: it was altered or torn")
        facts = json.loads((path / "metrics.json").read_text())
        found = Checkpoint(
            path=path,
            config=TrainConfig.model_validate(json.loads((path / "config.json").read_text())),
            epoch=facts["epoch"],
            score=facts["score"],
            metrics=facts["metrics"],
            digest=_sha256(path / MANIFEST),
        )
    except (OSError, ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no intact checkpoint: {type(error).__name__}: {error}") from error
    _check_place(found)
    return found


def _check_place(found: Checkpoint) -> None:
    if not EPOCH_NAME.fullmatch(found.path.name):
        return
    if found.path.name != epoch_directory(found.epoch):
        raise CheckpointError(f"{found.path} holds the checkpoint of epoch {found.epoch}: it was swapped")
    try:
        identity = identity_of(json.loads((found.path.parent / RUN).read_text()))
    except (OSError, ValueError, AttributeError):
        return  # a folder that nobody has claimed
    if differing := list(differences(identity, found.config.identity())):
        raise CheckpointError(f"{found.path} is of another run ({'; '.join(differing)}): it was swapped")


def identity_of(known: dict[str, Any]) -> dict[str, Any]:
    """What a stored ``run.json`` says that its run is, with the defaults of the fields that came into being since.

    Raises:
        ValueError: the configuration of no run, or of one of a later version.
    """
    fields = {name: value for name, value in known.items() if name in TrainConfig.model_fields}
    return TrainConfig.model_validate(fields).identity()


def differences(known: dict[str, Any], given: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The fields, with dots, in which two configurations differ, and both their values."""
    for name in sorted(known.keys() | given.keys()):
        old, new = known.get(name), given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} was {old!r}, is {new!r}"


def sync_to_disk(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no tensors: {error}") from error


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # which tells the system's error in words only
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))
        code = int(next(filter(None, number.groups()))) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
