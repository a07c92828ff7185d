"""Names and shapes of weights here and in the authors' checkpoints, in both directions; their files are read in
:mod:`mp3d.models.released_file`.

Ours are those of a backbone, ``stage1.0.unit.conv_s.conv.weight``, and of what stands beside it in
:class:`mp3d.models.backbone.KeySliceFPN`, ``group_transforms.0.weight``. The authors' are those of ``modified_p3d.py``
(MP3D and P3D) and of the ``mmcls`` file ``resnet3d.py`` (VDT), whose names are torchvision's too. The shapes are the
same; the 2D networks' have one more axis here.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from mp3d.config import BackboneName, ModelConfig
from mp3d.errors import CheckpointError
from mp3d.models.backbone import build_backbone
from mp3d.models.resnet import FoldedResNet

Shape = tuple[int, ...]
T = TypeVar("T")

SHORTCUT = {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}
OPTIONAL = "num_batches_tracked"
"""A counter that old versions of torch did not have."""


def _numbered(layers: tuple[str, ...], norm: str) -> dict[str, str]:
    """The authors number the convolutions of a block from 1, and their norms with them."""
    names = {f"{layer}.conv": f"conv{number}" for number, layer in enumerate(layers, start=1)}
    norms = {f"{layer}.norm": f"{norm}{number}" for number, layer in enumerate(layers, start=1)}
    return names | norms | SHORTCUT


def stem_names(backbone: BackboneName) -> dict[str, str]:
    """Our layers of a stem and theirs, with batch norm."""
    if backbone.endswith("_v1c"):
        convs = {f"stem.layers.{i}.conv": f"stem.{i}.conv" for i in range(3)}
        return convs | {f"stem.layers.{i}.norm": f"stem.{i}.bn" for i in range(3)}
    conv, norm = ("conv1", "bn1") if backbone.startswith("resnet") else ("conv1_custom", "norm1")
    return {"stem.layers.0.conv": conv, "stem.layers.0.norm": norm}


def block_names(backbone: BackboneName) -> dict[str, str]:
    """Our layers of a block and theirs, with batch norm."""
    if backbone.startswith("resnet"):
        return _numbered(("conv1", "conv2", "conv3") if "50" in backbone else ("conv1", "conv2"), norm="bn")
    if backbone.endswith("ba"):
        return _numbered(("unit1.conv_s", "unit1.conv_t", "unit2.conv_s", "unit2.conv_t"), norm="norm_")
    return _numbered(("reduce", "unit.conv_s", "unit.conv_t", "expand"), norm="norm_")


def authors_name(backbone: BackboneName, our_key: str, group_norm: bool = False) -> str:
    """The authors' key of one of our tensors.

    Args:
        group_norm: the norms of ResNets are called ``gn1``; with batch norm ``bn1``. MP3D's are ``norm_1`` in any case.

    Raises:
        ValueError: a key that this backbone does not have.
    """
    theirs = _translate(our_key, backbone, stem_names(backbone), block_names(backbone), ("stage", "layer"))
    if theirs is None:
        if match := re.fullmatch(r"group_transforms\.([0-3])\.weight", our_key):
            theirs = f"groupconv_{int(match[1]) + 1}.weight"
        elif match := re.fullmatch(r"group_transforms\.([0-3])\.conv\.weight", our_key):
            theirs = f"conv3d_all_{int(match[1]) + 1}.weight"
        else:
            raise ValueError(f"{backbone} has no tensor {our_key!r}")
    return re.sub(r"\bbn(\d?)\b", r"gn\1", theirs) if group_norm else theirs


def our_name(backbone: BackboneName, authors_key: str) -> str:
    """Our key of one of the authors' tensors, whatever its norm; undoes :func:`authors_name`.

    Raises:
        ValueError: a key that this backbone does not have.
    """
    stem, block = ({b: a for a, b in names.items()} for names in (stem_names(backbone), block_names(backbone)))
    with_bn = re.sub(r"\bgn(\d?)\b", r"bn\1", authors_key)
    if ours := _translate(with_bn, backbone, stem, block, ("layer", "stage")):
        return ours
    if match := re.fullmatch(r"groupconv_([1-4])\.weight", authors_key):
        return f"group_transforms.{int(match[1]) - 1}.weight"
    if match := re.fullmatch(r"conv3d_all_([1-4])\.weight", authors_key):
        return f"group_transforms.{int(match[1]) - 1}.conv.weight"
    raise ValueError(f"the authors' {backbone} has no tensor {authors_key!r}")


def _translate(
    key: str, backbone: BackboneName, stem: dict[str, str], block: dict[str, str], stage: tuple[str, str]
) -> str | None:
    module, _, leaf = key.rpartition(".")
    if module in stem:
        return f"{stem[module]}.{leaf}"
    match = re.fullmatch(rf"{stage[0]}([1-4])\.(\d+)\.(.+)", module)
    if match and match[3] in block:
        return f"{stage[1]}{match[1]}.{match[2]}.{block[match[3]]}.{leaf}"
    return None


def to_authors(backbone: BackboneName, state: Mapping[str, T], group_norm: bool = False) -> dict[str, T]:
    """A backbone's state, with or without group transforms, under the authors' names.

    Raises:
        ValueError: a key that this backbone does not have.
    """
    return {authors_name(backbone, key, group_norm): value for key, value in state.items()}


def from_authors(backbone: BackboneName, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes :func:`to_authors`.

    Raises:
        CheckpointError: a key that the backbone does not have, that is missing, or of another shape.
    """
    names = match_backbone(backbone, {key: tuple(value.shape) for key, value in state.items()})
    return {ours: state[theirs] for ours, theirs in names.items()}


def authors_shapes(backbone: BackboneName, group_norm: bool) -> dict[str, Shape]:
    """Names and shapes of the authors' state dict of a backbone, without group transforms."""
    shapes = {key: tuple(value.shape) for key, value in _outline(backbone, group_norm).state_dict().items()}
    if backbone.startswith("resnet2d"):
        shapes = {key: shape[:2] + shape[3:] if len(shape) == 5 else shape for key, shape in shapes.items()}
    return to_authors(backbone, shapes, group_norm and backbone.startswith("resnet"))


@cache
def _outline(backbone: BackboneName, group_norm: bool) -> FoldedResNet:
    """A backbone without memory for its weights."""
    with torch.device("meta"):
        return build_backbone(ModelConfig(backbone=backbone, norm="gn3d" if group_norm else "bn"))


def has_group_norm(shapes: Mapping[str, Shape]) -> bool:
    """Batch norm has running statistics."""
    return not any(key.endswith("running_mean") for key in shapes)


def match_backbone(backbone: BackboneName, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Our keys of a backbone's tensors, each with the authors'; a P3D has no use for group transforms.

    Args:
        shapes: of the authors' backbone and what makes its features 2D, without any prefix.

    Raises:
        CheckpointError: a key that the backbone does not have, that is missing, or of another shape.
    """
    group_norm = has_group_norm(shapes)
    expected = authors_shapes(backbone, group_norm)
    names = {}
    for key, shape in shapes.items():
        wanted = expected[key] if key in expected else _conversion_shape(backbone, key, shape, group_norm)
        if wanted is None:
            raise CheckpointError(f"the authors' {backbone} has no tensor {key!r}, which is here of shape {shape}")
        if shape != wanted:
            raise CheckpointError(f"{key} has the shape {shape}, and in the authors' {backbone} {wanted}")
        if key in expected or not backbone.startswith("p3d"):
            names[our_name(backbone, key)] = key
    if missing := [key for key in expected if key not in shapes and not key.endswith(OPTIONAL)]:
        raise CheckpointError(
            f"{missing[0]} of shape {expected[missing[0]]} is not there, nor are {len(missing) - 1} more tensors of "
            f"the authors' {backbone}"
        )
    return names


def _conversion_shape(name: BackboneName, key: str, shape: Shape, group_norm: bool) -> Shape | None:
    """That of a group transform or a dense one, for as many slices as it has; None: there is none."""
    match = re.fullmatch(r"(groupconv|conv3d_all)_([1-4])\.weight", key)
    if not match or name.startswith("resnet2d"):
        return None
    width, taps = _outline(name, group_norm).out_channels[int(match[2]) - 1], shape[-3] if len(shape) >= 3 else 1
    return (width, taps, 1, 1) if match[1] == "groupconv" else (width, width, taps, 1, 1)
