"""The sample contract: what the data side hands to a model and what comes back.

It is torchvision's detection contract with depth. Training: ``model(clips, targets) -> {name: loss}``; evaluation:
``model(clips) -> [prediction per key slice]``. Targets and predictions are listed **per key slice**, in clip order;
with one key slice per clip that is one per clip.

Dimension letters used in shape annotations: ``n`` clips, ``k`` key slices over all clips, ``c`` channels, ``d``
slices, ``h w`` rows and columns, ``b`` boxes.
"""

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """Neighbouring slices, and which of them are answered for.

    Attributes:
        slices: ``(d, h, w)``, int16 Hounsfield units of a CT, or uint8 colour planes of a picture (``d = 3``).
            Windowing, normalising and resizing are the model's first part and happen on the device.
        key_slices: indices along ``d``: the middle one for a window of nine, several for a slab.
    """

    slices: Tensor
    key_slices: tuple[int, ...]


class Target(TypedDict):
    """The truth of one key slice: ``boxes`` and ``labels`` for detection, ``label`` for classification, ``mask`` for
    segmentation, where every slice of a block is a key slice.
    """

    boxes: NotRequired[Tensor]
    """``(b, 4)`` float32, xyxy in pixels of the clip, half-open: ``0 <= x1 < x2 <= w``; ``(0, 4)``: none found."""
    labels: NotRequired[Tensor]
    """``(b,)`` int64, 1..num_classes; 0 is the background."""
    label: NotRequired[Tensor]
    """Scalar int64: the class of the whole picture or clip, from 0."""
    mask: NotRequired[Tensor]
    """``(h, w)`` uint8 classes, 0 the background, ``mp3d.config.UNKNOWN`` where they are not known."""
    draw: NotRequired[Tensor]
    """Scalar int64: seeds what a loss draws at random for this key slice; its own at every place of a run."""


class Prediction(TypedDict):
    """The answer for one key slice, in pixels of the clip as it was given (not as it was resized)."""

    boxes: NotRequired[Tensor]
    scores: NotRequired[Tensor]
    """``(b,)`` in [0, 1], descending."""
    labels: NotRequired[Tensor]
    logits: NotRequired[Tensor]
    """``(num_classes,)`` of a classification head."""
    mask_logits: NotRequired[Tensor]
    """``(num_classes + 1, h, w)`` of a segmentation head, the background first."""
