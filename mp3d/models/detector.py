"""Universal lesion detector: Faster R-CNN on the key slices of clips (MP3D paper; authors' ``mp3d_groupconv.py``).

Four parts as in torchvision's ``GeneralizedRCNN``: transform, backbone, rpn, roi_heads. From the group transform on,
the batch is the key slices and everything is torchvision's 2D detector.

The rules of training and their numbers are the authors' (:mod:`mp3d.models.faster_rcnn`); each is a field of
:class:`mp3d.config.DetectionHead`. One is not theirs: a loss is the mean over key slices of a sum over as many samples
as the config asks for; with fewer candidates than that (theirs: the mean over the samples of the batch) a slice weighs
less.
"""

from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.models.backbone import build_neck
from mp3d.models.faster_rcnn import LesionRoIHeads, LesionRPN
from mp3d.models.key_slice_sampler import KeySliceSampler
from mp3d.models.transform import ClipBatch, ClipTransform
from mp3d.sample import Clip, Prediction, Target


class LesionDetector(nn.Module):
    """Finds lesions on the key slices of clips.

    Args:
        model: its head is a :class:`DetectionHead`.
        clip: its ``num_slices`` are the taps of the group transforms; a longer clip may have several key slices.
    """

    def __init__(self, model: ModelConfig, clip: ClipConfig) -> None:
        super().__init__()
        head = model.head
        if not isinstance(head, DetectionHead):
            raise TypeError(f"model.head is a {type(head).__name__}; a detector needs a DetectionHead")
        self.num_classes = head.num_classes
        self.transform = ClipTransform(clip)
        self.backbone = build_neck(model, clip.num_slices, head.fpn_channels)
        self.rpn = LesionRPN(head)
        self.roi_heads = LesionRoIHeads(head)

    def forward(
        self, clips: Sequence[Clip], targets: Sequence[Target] | None = None, image_size: int | None = None
    ) -> dict[str, Tensor] | list[Prediction]:
        """Losses in training mode; in evaluation mode one prediction per key slice, in pixels of the given clips.

        Args:
            targets: one per key slice, in clip order; needed in training.
            image_size: pixels of the longer side; None takes the config's.

        Raises:
            ValueError: no target in training, another number of targets than key slices, a box or label that cannot be.
        """
        if self.training and targets is None:
            raise ValueError("targets is None; training needs one target per key slice")
        if targets is not None:
            self._check(clips, targets)
        batch, targets = self.transform(clips, targets, image_size)
        return self.detect(self.backbone(batch.tensors, batch.key_slices), batch, targets)

    def detect(
        self,
        features: OrderedDict[str, Float[Tensor, "k c _ _"]],
        batch: ClipBatch,
        targets: Sequence[Target] | None = None,
    ) -> dict[str, Tensor] | list[Prediction]:
        """The two-dimensional part, on the feature pyramids of the key slices of a batch."""
        images = ImageList(batch.tensors[:, 0], batch.per_key_slice(batch.image_sizes))
        samplers: list[KeySliceSampler] = [self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler]
        for sampler in samplers:
            sampler.draws = _draws(targets)
        proposals, rpn_losses = self.rpn(images, features, targets)
        predictions, roi_losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        if self.training:
            return {
                name: loss * sampler.filled
                for losses, sampler in zip((rpn_losses, roi_losses), samplers, strict=True)
                for name, loss in losses.items()
            }
        return self.transform.postprocess(predictions, batch)

    def _check(self, clips: Sequence[Clip], targets: Sequence[Target]) -> None:
        """Boxes inside their clip with a positive size, labels of the lesion classes."""
        sizes = [clip.slices.shape[1:] for clip in clips for _ in clip.key_slices]
        for index, (target, (height, width)) in enumerate(zip(targets, sizes, strict=False)):
            if "boxes" not in target or "labels" not in target:
                raise ValueError(f"target {index} has {sorted(target)}; a detection target has boxes and labels")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.shape != (len(labels), 4):
                raise ValueError(f"target {index} has boxes of shape {tuple(boxes.shape)} for {len(labels)} labels")
            x1, y1, x2, y2 = boxes.unbind(1)
            good = (x1 >= 0) & (x1 < x2) & (x2 <= width) & (y1 >= 0) & (y1 < y2) & (y2 <= height)
            if not bool(good.all()):
                box = boxes[~good][0].tolist()
                raise ValueError(
                    f"target {index} has the box {box}; a box is x1 y1 x2 y2 in pixels with 0 <= x1 < x2 <= {width} "
                    f"and 0 <= y1 < y2 <= {height}"
                )
            if not bool(((labels >= 1) & (labels <= self.num_classes)).all()):
                raise ValueError(f"target {index} has the labels {labels.tolist()}; lesions are 1..{self.num_classes}")


def _draws(targets: Sequence[Target] | None) -> list[int] | None:
    """The number of each key slice, where all have one."""
    if not targets or any("draw" not in target for target in targets):
        return None
    return [int(target["draw"]) for target in targets]
