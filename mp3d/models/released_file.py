"""What is in a checkpoint of the authors: whose weights, behind which prefixes, beside what else.

Their files are dicts with the weights under ``state_dict``, beside ``meta`` and ``optimizer``; keys may begin with
``module.`` (of data parallelism) and ``backbone.`` (of a detector), and detectors have further parts. The ImageNet
files and torchvision's are bare. Only a disposable process (:mod:`mp3d.released_worker`) opens them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import get_args

from mp3d.config import BackboneName
from mp3d.errors import CheckpointError
from mp3d.models.released import Shape, authors_shapes, has_group_norm

OTHER_PARTS = (
    "fc", "head", "neck", "rpn_head", "bbox_head", "roi_head", "mask_head", "decode_head", "auxiliary_head",
)  # fmt: skip
"""What else the authors' models consist of."""
HEADS = {
    r"fc|head\.fc": "fc",
    r"neck\.lateral_convs\.(\d)\.conv": r"backbone.fpn.inner_blocks.\1.0",
    r"neck\.fpn_convs\.(\d)\.conv": r"backbone.fpn.layer_blocks.\1.0",
    r"rpn_head\.rpn_conv": "rpn.head.conv.0.0",
    r"rpn_head\.rpn_cls": "rpn.head.cls_logits",
    r"rpn_head\.rpn_reg": "rpn.head.bbox_pred",
    r"bbox_head\.shared_fcs\.0": "roi_heads.box_head.fc6",
    r"bbox_head\.shared_fcs\.1": "roi_heads.box_head.fc7",
    r"bbox_head\.fc_cls": "roi_heads.box_predictor.cls_score",
    r"bbox_head\.fc_reg": "roi_heads.box_predictor.bbox_pred",
}
"""Layers of a classifier, and of a Faster R-CNN of MMDetection 1, whose class 0 is the background, as ours."""


def recognise(shapes: Mapping[str, Shape]) -> BackboneName:
    """The backbone with most of these names and shapes. P3D has those of MP3D, and is never meant.

    Raises:
        CheckpointError: it is none of ours.
    """
    group_norm = has_group_norm(shapes)

    def likeness(backbone: BackboneName) -> int:
        expected = authors_shapes(backbone, group_norm)
        return 2 * sum(expected.get(key) == shape for key, shape in shapes.items()) - len(expected)

    best = max((name for name in get_args(BackboneName) if not name.startswith("p3d")), key=likeness)
    if likeness(best) < 0:
        keys = ", ".join(list(shapes)[:3])
        raise CheckpointError(f"these are not the weights of any backbone of ours; their keys begin with {keys}")
    return best


def split_parts(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The names of the backbone's tensors and those of other parts, without ``module.`` and ``backbone.``, each with
    its name in the file.

    Raises:
        CheckpointError: a name that belongs to no part of the authors' models.
    """
    bare = {re.sub(r"^(module\.)+", "", name): name for name in names}
    prefix = "backbone." if any(name.startswith("backbone.") for name in bare) else ""
    others = {name: full for name, full in bare.items() if name.partition(".")[0] in OTHER_PARTS}
    backbone = {name.removeprefix(prefix): full for name, full in bare.items() if name not in others}
    if strange := [name for name in bare if name not in others and not name.startswith(prefix)]:
        raise CheckpointError(f"{strange[0]!r} belongs neither to a backbone nor to {', '.join(OTHER_PARTS)}")
    return backbone, others


def our_head_name(authors_key: str) -> str | None:
    """Our key of a tensor of a head or a feature pyramid; None where we have nothing of the kind."""
    module, _, leaf = authors_key.rpartition(".")
    for pattern, ours in HEADS.items():
        if match := re.fullmatch(pattern, module):
            return f"{match.expand(ours)}.{leaf}"
    return None
