"""Released weights become a checkpoint that training can start from: the authors', or torchvision's 2D ResNets.

    python -m mp3d.convert mp3d63-d720bda1.pth --out runs/mp3d63_coco
    python -m mp3d.convert resnet50-0676ba61.pth --out runs/resnet3d50_i3d --inflate mean
    python jobs/finetune.py deeplesion_mp3d63 --init-from runs/mp3d63_coco

What became of every tensor is printed and kept in the checkpoint (``transfer.json``): moved as it is, inflated from 2D
to 3D, re-initialised because the file has nothing for it, or unused. A backbone is taken whole or not at all: a tensor
that it does not have, that is missing or of another shape is refused by its name.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mp3d.checkpoint import TRANSFER, save_checkpoint
from mp3d.config import (
    BackboneName,
    ClassificationHead,
    ClipConfig,
    Config,
    DetectionHead,
    ModelConfig,
    StrideConfig,
    TrainConfig,
)
from mp3d.data.decode import SHARED_BYTES, Answer, Limits, Pool, Request
from mp3d.errors import CheckpointError, ConfigError, Mp3dError, Refusal
from mp3d.models import build_model
from mp3d.models.p3d import MIN_DEPTH
from mp3d.models.released import Shape, has_group_norm, match_backbone
from mp3d.models.released_file import our_head_name, recognise, split_parts
from mp3d.models.transfer import InflationRule, Reinitialised, TransferReport, inflate, model_prefix
from mp3d.recipes.pictures import PICTURE_CLIP

READING = Limits(memory_bytes=8 * 2**30, cpu_s=120, wall_s=300)
"""Address space, of which torch's libraries take three gigabytes."""
VALUES_AT_ONCE = SHARED_BYTES // 8
BOXES = "roi_heads.box_predictor.bbox_pred"
"""MMDetection 1 has a box of the background too, the first, which is never trained."""
ANCHORS = ("rpn.head.cls_logits", "rpn.head.bbox_pred")
"""As many rows as there are anchors, which may be others here."""
LABEL = "the file of released weights"


class ConvertConfig(Config):
    """A checkpoint made of released weights."""

    out: str
    """Folder for the checkpoint; new or empty."""
    backbone: BackboneName | None = None
    """None: the one whose names and shapes the file has; mp3d where it could be a p3d, 3D where the file is of a 2D
    network.
    """
    inflate: InflationRule = "centre"
    """How the kernels of a 2D network become 3D: all in the middle z tap, so that it stays 2D on every slice; the same
    share in each tap; the whole in each; a third of the kernels in each plane of space.
    """
    colours: Literal["sum", "mean"] = "sum"
    """What becomes of the three input channels of a 2D network where one is read (the authors' code: sum)."""


@dataclass(frozen=True)
class ReleasedFile:
    """A file of released weights, read by another process."""

    path: Path
    pool: Pool
    shapes: dict[str, Shape]

    @classmethod
    def open(cls, path: Path, pool: Pool) -> "ReleasedFile":
        """Raises: CheckpointError where it is no file of weights."""
        answer = _ask(pool, path, "list_tensors")
        return cls(path, pool, {name: tuple(shape) for name, shape in answer.value})

    def tensor(self, name: str) -> Tensor:
        """float32 or int64."""
        shape = self.shapes[name]
        pieces = [
            _ask(self.pool, self.path, "read_values", name=name, first=first, count=VALUES_AT_ONCE).array
            for first in range(0, prod(shape), VALUES_AT_ONCE)
        ]
        return torch.from_numpy(np.concatenate(pieces)).reshape(shape)


@dataclass(frozen=True)
class Plan:
    """What a file is to become.

    Attributes:
        backbone: the file's name of each tensor of our backbone, and of what makes its features 2D.
        heads: the file's name of each tensor of our heads and feature pyramid.
    """

    model: ModelConfig
    clip: ClipConfig
    backbone: dict[str, str]
    heads: dict[str, str]


def convert(source: Path, config: ConvertConfig) -> TransferReport:
    """Write the checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or is not of the backbone.
        ConfigError: the folder is not empty, or the weights cannot become that backbone.
    """
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; name a new folder")
    if not source.is_file():
        raise CheckpointError(f"there is no file {source}")
    with Pool(1, READING, "mp3d.released_worker") as pool:
        file = ReleasedFile.open(source, pool)
        plan = plan_conversion(file.shapes, config)
        torch.manual_seed(0)
        model = build_model(plan.model, plan.clip)
        report = fill(model, file, plan, config)
    out.mkdir(parents=True, exist_ok=True)
    (out / TRANSFER).write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    training = TrainConfig(name="released", shards="", clip=plan.clip, model=plan.model)
    save_checkpoint(out, config=training, model_state=model.state_dict(), epoch=0, score=0.0, metrics={})
    return report


def plan_conversion(shapes: Mapping[str, Shape], config: ConvertConfig) -> Plan:
    """Which backbone and head the weights are of.

    Raises:
        CheckpointError: a tensor is not the backbone's, missing or of another shape; slices that have no middle.
        ConfigError: the weights are of a 2D network and the backbone is of another kind.
    """
    in_backbone, in_heads = split_parts(shapes)
    bare = {name: shapes[full] for name, full in in_backbone.items()}
    is_planar = len(bare.get("conv1.weight", ())) == 4
    target: Any = config.backbone or recognise(bare)
    if is_planar and config.backbone is None:
        target = target.replace("resnet2d", "resnet3d")
    source: Any = target.replace("resnet3d", "resnet2d") if is_planar else target
    if source not in get_args(BackboneName) or is_planar != source.startswith("resnet2d"):
        raise ConfigError(
            f"backbone is {target}: 2D weights, and only they, become resnet2d18, 34 or 50, or resnet3d18, 34 or 50"
        )
    names = match_backbone(source, bare)
    heads = {ours: full for name, full in in_heads.items() if (ours := our_head_name(name))}
    head = head_of({ours: shapes[full] for ours, full in heads.items()})
    stays_planar = is_planar and target != source and config.inflate == "centre"
    taps = taps_of({ours: bare[theirs] for ours, theirs in names.items() if ours.startswith("group_transforms")})
    model = ModelConfig(
        backbone=target,
        norm="gn3d" if has_group_norm(bare) else "bn",
        strides=StrideConfig(pool="1x3x3" if stays_planar else "3x3x3"),
        to_2d=to_2d_of(names) if head.kind == "detection" else None,
        head=head,
    )
    if taps is None:
        taps = MIN_DEPTH if target.startswith("p3d") else PICTURE_CLIP.num_slices
    clip = PICTURE_CLIP if taps == PICTURE_CLIP.num_slices else ClipConfig(num_slices=taps)
    return Plan(model, clip, {ours: in_backbone[theirs] for ours, theirs in names.items()}, heads)


def head_of(shapes: Mapping[str, Shape]) -> ClassificationHead | DetectionHead:
    """A classifier where the file has one, else a detector with the widths of the file's, where it has one."""
    if shape := shapes.get("fc.weight"):
        return ClassificationHead(num_classes=shape[0])
    head = DetectionHead()
    (fpn_channels, *_) = shapes.get("backbone.fpn.inner_blocks.0.0.weight", (head.fpn_channels,))
    (box_features, *_) = shapes.get("roi_heads.box_head.fc6.weight", (head.box_features,))
    (scores, *_) = shapes.get("roi_heads.box_predictor.cls_score.weight", (head.num_classes + 1,))
    return DetectionHead(fpn_channels=fpn_channels, box_features=box_features, num_classes=max(scores - 1, 1))


def to_2d_of(names: Iterable[str]) -> Literal["group", "dense", "centre"]:
    """How the authors' network made its features 2D, by the names of its tensors here."""
    if any(re.fullmatch(r"group_transforms\.\d\.weight", name) for name in names):
        return "group"
    return "dense" if any(name.startswith("group_transforms.") for name in names) else "centre"


def taps_of(shapes: Mapping[str, Shape]) -> int | None:
    """Slices that the group transforms weight; None where there is none.

    Raises:
        CheckpointError: not one odd number of slices.
    """
    taps = {shape[-3] for shape in shapes.values()}
    if not taps:
        return None
    if len(taps) > 1 or min(taps) % 2 == 0:
        raise CheckpointError(f"the group transforms weight {sorted(taps)} slices; it must be one odd number for all")
    return taps.pop()


def fill(model: nn.Module, file: ReleasedFile, plan: Plan, config: ConvertConfig) -> TransferReport:
    """Puts the file's tensors into the model.

    Raises:
        CheckpointError: a tensor of a head has another shape than the others of the file ask for.
    """
    prefix = model_prefix(model)
    beside = prefix.removesuffix("backbone.")
    sources = dict(plan.heads)
    for key, name in plan.backbone.items():
        sources[(beside if key.startswith("group_transforms.") else prefix) + key] = name
    moved, inflated, reinitialised = [], [], []
    check_anchors(file.shapes, plan.heads)
    state = model.state_dict()
    for key, tensor in state.items():
        name = sources.get(key, "")
        shape, source_shape = tuple(tensor.shape), file.shapes.get(name)
        if shape == source_shape:
            tensor.copy_(file.tensor(name))
            moved.append(key)
        elif source_shape and len(shape) == 5 and len(source_shape) == 4:
            rule = config.inflate if shape[2] > 1 else "centre"
            tensor.copy_(inflate(file.tensor(name), shape, rule, config.colours))
            (inflated if prod(shape) != prod(source_shape) else moved).append(key)
        elif source_shape and key.startswith(BOXES) and source_shape == (shape[0] + 4, *shape[1:]):
            tensor.copy_(file.tensor(name)[4:])
            moved.append(key)
        elif source_shape and not (key.startswith(ANCHORS) and source_shape[1:] == shape[1:]):
            raise CheckpointError(
                f"{name} has the shape {source_shape}, and by the file's other tensors it must have {shape}; "
                "the file is damaged, or of another kind of detector"
            )
        else:
            reinitialised.append(Reinitialised(key, shape, source_shape))
    used = {sources[key] for key in [*moved, *inflated]}
    unused = tuple(name for name in file.shapes if name not in used)
    return TransferReport(tuple(moved), tuple(reinitialised), unused, tuple(inflated))


def check_anchors(shapes: Mapping[str, Shape], heads: Mapping[str, str]) -> None:
    """Raises: CheckpointError where the file's region proposals have not four numbers of a box for each score."""
    for leaf in ("weight", "bias"):
        scores, boxes = (heads.get(f"{layer}.{leaf}") for layer in ANCHORS)
        if scores and boxes and shapes[boxes][0] != 4 * shapes[scores][0]:
            raise CheckpointError(
                f"{boxes} has the shape {shapes[boxes]}, and must have four rows for each of {scores}, whose shape is "
                f"{shapes[scores]}; the file is damaged, or of another kind of detector"
            )


def _ask(pool: Pool, path: Path, task: str, **arguments: Any) -> Answer:
    try:
        return pool.call(Request(task, path.absolute(), arguments, LABEL))
    except Refusal as refusal:
        raise CheckpointError(f"{path} cannot be read: {refusal.detail}") from refusal


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def command(
        source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="File of released weights (.pth).")],
        config: Annotated[ConvertConfig, tyro.conf.arg(name="")],
    ) -> tuple[Path, ConvertConfig]:
        return source, config

    source, config = tyro.cli(command, args=argv, prog="python -m mp3d.convert", description=__doc__)
    try:
        print(convert(source, config).summary())
    except Mp3dError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"checkpoint: {config.out}")
    print(f"next: python jobs/finetune.py --init-from {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
