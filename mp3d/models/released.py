"""Names of weights here and in the authors' checkpoints; the shapes are the same.

Ours are those of a 3D backbone, ``stage1.0.unit.conv_s.conv.weight``, and of the group transforms beside it in
:class:`mp3d.models.backbone.KeySliceFPN`, ``group_transforms.0.weight``. The authors' are those of ``modified_p3d.py``
(MP3D) and of the ``mmcls`` file ``resnet3d.py`` (VDT).
"""

import re

from mp3d.config import BackboneName

STEMS: dict[BackboneName, dict[str, str]] = {
    "mp3d63": {"stem.layers.0.conv": "conv1_custom", "stem.layers.0.norm": "norm1"},
    "mp3d18ba": {"stem.layers.0.conv": "conv1_custom", "stem.layers.0.norm": "norm1"},
    "resnet3d18": {"stem.layers.0.conv": "conv1", "stem.layers.0.norm": "bn1"},
    "resnet3d18_v1c": {
        **{f"stem.layers.{i}.conv": f"stem.{i}.conv" for i in range(3)},
        **{f"stem.layers.{i}.norm": f"stem.{i}.bn" for i in range(3)},
    },
}

SHORTCUT = {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}


def _numbered(layers: tuple[str, ...], norm: str) -> dict[str, str]:
    """The authors number the convolutions of a block from 1, and their norms with them."""
    names = {f"{layer}.conv": f"conv{number}" for number, layer in enumerate(layers, start=1)}
    norms = {f"{layer}.norm": f"{norm}{number}" for number, layer in enumerate(layers, start=1)}
    return names | norms | SHORTCUT


BLOCKS: dict[BackboneName, dict[str, str]] = {
    "mp3d63": _numbered(("reduce", "unit.conv_s", "unit.conv_t", "expand"), norm="norm_"),
    "mp3d18ba": _numbered(("unit1.conv_s", "unit1.conv_t", "unit2.conv_s", "unit2.conv_t"), norm="norm_"),
    "resnet3d18": _numbered(("conv1", "conv2"), norm="bn"),
    "resnet3d18_v1c": _numbered(("conv1", "conv2"), norm="bn"),
}


def authors_name(backbone: BackboneName, our_key: str) -> str:
    """The authors' key of one of our tensors.

    Raises:
        ValueError: a key that this backbone does not have.
    """
    module, _, leaf = our_key.rpartition(".")
    if module in STEMS[backbone]:
        return f"{STEMS[backbone][module]}.{leaf}"
    if match := re.fullmatch(r"stage([1-4])\.(\d+)\.(.+)", module):
        stage, block, layer = match.groups()
        if layer in BLOCKS[backbone]:
            return f"layer{stage}.{block}.{BLOCKS[backbone][layer]}.{leaf}"
    if match := re.fullmatch(r"group_transforms\.([0-3])", module):
        return f"groupconv_{int(match[1]) + 1}.{leaf}"
    raise ValueError(f"{backbone} has no tensor {our_key!r}")


def our_name(backbone: BackboneName, authors_key: str) -> str:
    """Our key of one of the authors' tensors; undoes :func:`authors_name`.

    Raises:
        ValueError: a key that this backbone does not have.
    """
    module, _, leaf = authors_key.rpartition(".")
    stems = {theirs: ours for ours, theirs in STEMS[backbone].items()}
    if module in stems:
        return f"{stems[module]}.{leaf}"
    if match := re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", module):
        stage, block, layer = match.groups()
        layers = {theirs: ours for ours, theirs in BLOCKS[backbone].items()}
        if layer in layers:
            return f"stage{stage}.{block}.{layers[layer]}.{leaf}"
    if match := re.fullmatch(r"groupconv_([1-4])", module):
        return f"group_transforms.{int(match[1]) - 1}.{leaf}"
    raise ValueError(f"the authors' {backbone} has no tensor {authors_key!r}")
