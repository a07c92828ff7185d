"""Universal lesion detector: Faster R-CNN on the key slices of clips (MP3D paper; authors' ``mp3d_groupconv.py``).

Four parts as in torchvision's ``GeneralizedRCNN``: transform, backbone, rpn, roi_heads. From the group transform on,
the batch is the key slices and everything is torchvision's 2D detector.

Differs from the authors' config, as torchvision does:
- the boxes of the RoI head are trained with SmoothL1 of beta 1/9, where theirs has beta 1 (the RPN has 1/9 in both);
- the background class has a box regression too, which is never trained nor read;
- anchors are rounded to whole pixels, and those that leave the picture are trained (theirs: ``allowed_border=0``);
- the best anchor of a box is positive whatever its overlap (theirs: from 0.3 on);
- a loss is the mean over key slices of a sum over as many samples as the config asks for: with fewer candidates than
  that (theirs: the mean over the samples of the batch) a slice weighs less;
- RoIAlign is not shifted by half a pixel (``aligned=False``) and takes 2 x 2 samples per bin (theirs: one per cell).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.models.anchors import build_anchor_generator
from mp3d.models.backbone import build_neck
from mp3d.models.key_slice_sampler import KeySliceSampler
from mp3d.models.transform import ClipBatch, ClipTransform
from mp3d.sample import Clip, Prediction, Target

ROI_SIZE = 7
ROI_LEVELS = ("0", "1", "2", "3")
ROI_STRIDES = (4, 8, 16, 32)
BOX_CODER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""The reciprocals of the authors' standard deviations 0.1, 0.1, 0.2, 0.2."""


class Float32RPNHead(RPNHead):
    """Hands on float32 under autocast too: torchvision decodes boxes in the deltas' precision, 8 bits in bfloat16."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class Float32Predictor(FastRCNNPredictor):
    """Hands on float32 under autocast too, for boxes and losses."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


def build_rpn(head: DetectionHead) -> RegionProposalNetwork:
    """torchvision's, with the numbers of the config."""
    anchors = build_anchor_generator(head)
    rpn = RegionProposalNetwork(
        anchors,
        Float32RPNHead(head.fpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=head.rpn_positive_iou,
        bg_iou_thresh=head.rpn_negative_iou,
        batch_size_per_image=head.rpn_samples,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(("training", "testing"), head.rpn_pre_nms, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), head.rpn_post_nms, strict=True)),
        nms_thresh=head.rpn_nms_iou,
    )
    rpn.fg_bg_sampler = KeySliceSampler(head.rpn_samples, 0.5, stream=0)
    return rpn


def build_roi_heads(head: DetectionHead) -> RoIHeads:
    """RoIAlign on P2..P5, two fully connected layers, one box per class."""
    align = MultiScaleRoIAlign(list(ROI_LEVELS), output_size=ROI_SIZE, sampling_ratio=2)
    # torchvision would infer the scales from its first batch, and wrongly where much of a small picture is padding.
    align.scales = [1 / stride for stride in ROI_STRIDES]
    align.map_levels = initLevelMapper(2, 5, align.canonical_scale, align.canonical_level)
    heads = RoIHeads(
        align,
        TwoMLPHead(head.fpn_channels * ROI_SIZE**2, head.box_features),
        Float32Predictor(head.box_features, head.num_classes + 1),
        fg_iou_thresh=head.box_iou,
        bg_iou_thresh=head.box_iou,
        batch_size_per_image=head.box_samples,
        positive_fraction=0.25,
        bbox_reg_weights=BOX_CODER_WEIGHTS,
        score_thresh=head.score_threshold,
        nms_thresh=head.box_nms_iou,
        detections_per_img=head.max_detections,
    )
    heads.fg_bg_sampler = KeySliceSampler(head.box_samples, 0.25, stream=1)
    return heads


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
        self.rpn = build_rpn(head)
        self.roi_heads = build_roi_heads(head)

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
        parts: tuple[RegionProposalNetwork, RoIHeads] = (self.rpn, self.roi_heads)
        samplers = [cast(KeySliceSampler, part.fg_bg_sampler) for part in parts]
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
