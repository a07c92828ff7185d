"""Transfer: start a model from the backbone of another one, and say key by key what that did.

Only the backbone moves. The group transforms have one weight per slice of the clip they were trained on (three planes
of a picture, nine slices of a CT), and the feature pyramid and the heads have learnt another task; the authors start
them afresh too (``modified_p3d.py``, ``load_checkpoint(strict=False, rm_backbone=True)``), only without saying so.

The kernels of a 2D network become 3D ones by inflation.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mp3d.config import ModelConfig
from mp3d.errors import CheckpointError
from mp3d.models.resnet import FoldedResNet

STEM_KEY = "stem.layers.0.conv.weight"
"""Every backbone has it; what stands before it in a key is where the backbone sits in its model."""
MIN_SHARE = 0.5
"""Less of the backbone than this, and the source is another network."""
InflationRule = Literal["centre", "mean", "sum", "acs"]
"""What the z taps of a 3D kernel get of the 2D one: the middle tap all, the others nothing, so that the network stays a
2D one on every slice; all the same share of it, or all the whole of it; or a third of the kernels each lies in the
axial, coronal and sagittal plane (ACSConv).
"""


@dataclass(frozen=True)
class Reinitialised:
    """A tensor of the model that was left as it was."""

    key: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...] | None
    """None where the source has no such tensor."""


@dataclass(frozen=True)
class TransferReport:
    """Every tensor of the model is in ``moved``, ``inflated`` or ``reinitialised``; ``unused`` are those that only the
    source has. ``warnings`` say what makes the features others than the source's nevertheless.
    """

    moved: tuple[str, ...]
    reinitialised: tuple[Reinitialised, ...]
    unused: tuple[str, ...]
    inflated: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """The counts, then every key, one line for each module."""
        changed = [f"{item.key} {_shapes(item)}" for item in self.reinitialised]
        return "\n".join(
            [
                *(f"warning: {warning}" for warning in self.warnings),
                f"moved {len(self.moved)} tensors, inflated {len(self.inflated)}, re-initialised "
                f"{len(self.reinitialised)}, unused {len(self.unused)} of the source",
                *_section("moved", self.moved),
                *_section("inflated", self.inflated),
                *_section("re-initialised (shape here, in the source)", changed),
                *_section("unused (only in the source)", self.unused),
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inflate(
    weight: Float[Tensor, "o i kh kw"],
    shape: tuple[int, int, int, int, int],
    rule: InflationRule,
    colours: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, "o i2 kz kh kw"]:
    """A 2D kernel as a 3D one.

    Args:
        shape: of the 3D kernel. Its input channel is one grey one where the 2D kernel has colours.
        colours: what becomes of them; their sum answers a grey picture as the 2D kernel answers three equal colours.

    Raises:
        ValueError: a shape that the 2D kernel cannot get; ``acs`` for a kernel that is no cube.
    """
    out_channels, in_channels, depth, height, width = shape
    given = tuple(weight.shape)
    if in_channels == 1 and weight.shape[1] > 1:
        weight = weight.sum(1, keepdim=True) if colours == "sum" else weight.mean(1, keepdim=True)
    if weight.shape != (out_channels, in_channels, height, width):
        raise ValueError(f"a 2D kernel of shape {given} cannot become a 3D one of {shape}")
    kernel = weight.new_zeros(shape)
    match rule:
        case "centre":
            kernel[:, :, depth // 2] = weight
        case "mean":
            kernel += weight.unsqueeze(2) / depth
        case "sum":
            kernel += weight.unsqueeze(2)
        case "acs":
            if not depth == height == width:
                raise ValueError(f"acs turns kernels in space, and {shape} is no cube")
            axial, coronal, sagittal = torch.tensor_split(torch.arange(out_channels), 3)
            kernel[axial, :, depth // 2] = weight[axial]
            kernel[coronal, :, :, height // 2] = weight[coronal]
            kernel[sagittal, :, :, :, width // 2] = weight[sagittal]
    return kernel


def check_source(source: ModelConfig, target: ModelConfig) -> tuple[str, ...]:
    """Whether the weights of one model's backbone mean the same in another's, and what will differ all the same.

    Keys and shapes do not tell: a deeper MP3D has all the tensors of a shallower one, but its blocks of kind A, B and C
    come in another order.

    Returns:
        Warnings.

    Raises:
        CheckpointError: another depth, family or width; frozen batch norm without the statistics of one.
    """
    for name, theirs, ours in (
        ("backbone", _layers(source.backbone), _layers(target.backbone)),
        ("width", source.width, target.width),
    ):
        if theirs != ours:
            raise CheckpointError(
                f"the source has model.{name} {getattr(source, name)}, and this model {getattr(target, name)}; "
                "its weights would mean something else here: take a source of the same"
            )
    if target.norm == "frozen_bn" and source.norm not in ("bn", "frozen_bn"):
        raise CheckpointError(
            f"model.norm is frozen_bn, which never learns statistics, and the source has {source.norm}, which has "
            "none: take a source with batch norm, or train with slice_gn or bn"
        )
    warnings = []
    if source.strides.pool != target.strides.pool and not target.backbone.startswith("p3d"):
        warnings.append(
            f"the source's features are behind a pool of {source.strides.pool}, and those of this model behind one of "
            f"{target.strides.pool}; --model.strides.pool {source.strides.pool} keeps them the same"
        )
    if source.z_padding != target.z_padding:
        warnings.append(
            f"the source learnt with model.z_padding {source.z_padding}, and this model goes on with "
            f"{target.z_padding}, which changes the features at the ends of a clip until it has learnt"
        )
    return tuple(warnings)


def _layers(backbone: str) -> str:
    """P3D has MP3D's layers, and only the stem differs between the two kinds of 3D ResNets."""
    return re.sub(r"^p3d", "mp3d", backbone).removesuffix("_v1c")


def initialise_backbone(model: nn.Module, source_state: Mapping[str, Tensor]) -> TransferReport:
    """Copies the backbone of another model's state into ``model``, in place.

    Args:
        source_state: the state dict of a detector, a classifier or a bare backbone.

    Raises:
        CheckpointError: the source has no backbone of ours, or one of another kind or width.
    """
    source_prefix = _source_prefix(source_state)
    prefix = model_prefix(model)
    state = model.state_dict()
    moved, reinitialised = [], []
    counterparts = set()
    for key, tensor in state.items():
        in_backbone = key.startswith(prefix)
        source_key = source_prefix + key.removeprefix(prefix) if in_backbone else key
        source = source_state.get(source_key)
        if source is not None:
            counterparts.add(source_key)
        if in_backbone and source is not None and source.shape == tensor.shape:
            moved.append(key)
        else:
            source_shape = None if source is None else tuple(source.shape)
            reinitialised.append(Reinitialised(key, tuple(tensor.shape), source_shape))
    _check_share(prefix, state, moved, reinitialised)
    with torch.no_grad():
        for key in moved:
            state[key].copy_(source_state[source_prefix + key.removeprefix(prefix)])
    unused = tuple(key for key in source_state if key not in counterparts)
    return TransferReport(tuple(moved), tuple(reinitialised), unused)


def model_prefix(model: nn.Module) -> str:
    """Where its backbone sits in a model: what stands before its keys."""
    (name,) = (name for name, module in model.named_modules() if isinstance(module, FoldedResNet))
    return f"{name}." if name else ""


def _source_prefix(source_state: Mapping[str, Tensor]) -> str:
    prefixes = [key.removesuffix(STEM_KEY) for key in source_state if key.endswith(STEM_KEY)]
    if len(prefixes) != 1:
        keys = ", ".join(list(source_state)[:3])
        raise CheckpointError(
            f"the source has {len(prefixes)} keys ending in {STEM_KEY}, so its 3D backbone cannot be found; "
            f"its keys begin with {keys}; give a checkpoint that this package trained"
        )
    return prefixes[0]


def _check_share(
    prefix: str, state: Mapping[str, Tensor], moved: Iterable[str], reinitialised: Iterable[Reinitialised]
) -> None:
    """Refuses a source that is mostly different: a few shortcuts match by chance in MP3D-18ba and ResNet3D-18."""
    total = sum(tensor.numel() for key, tensor in state.items() if key.startswith(prefix))
    found = sum(state[key].numel() for key in moved)
    if found < MIN_SHARE * total:
        first = next(item for item in reinitialised if item.key.startswith(prefix))
        raise CheckpointError(
            f"only {found:,} of {total:,} backbone weights have a counterpart in the source, first missing: "
            f"{first.key} {_shapes(first)}; model.backbone and model.width must be those of the source"
        )


def _shapes(item: Reinitialised) -> str:
    return f"{item.shape}, {item.source_shape or 'none'}"


def _section(title: str, lines: Iterable[str]) -> list[str]:
    """Keys that share a module on one line: ``stem.layers.0.conv: weight``."""
    modules: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        key, _, rest = line.partition(" ")
        module, _, name = key.rpartition(".")
        modules[module].append(f"{name} {rest}".strip())
    if not modules:
        return []
    return [f"{title}:", *(f"  {module}: {'; '.join(names)}" for module, names in modules.items())]
