"""Universal lesion detector: Faster R-CNN on the key slices of clips (MP3D paper; authors' ``mp3d_groupconv.py``).

Four parts as in torchvision's ``GeneralizedRCNN``: transform, backbone, rpn, roi_heads. From the group transform on,
the batch is the key slices and everything is torchvision's 2D detector.

Differs from the authors' config, as torchvision does:
- the boxes of the RoI head are trained with SmoothL1 of beta 1/9, where theirs has beta 1 (the RPN has 1/9 in both);
- the background class has a box regression too, which is never trained nor read;
- anchors are rounded to whole pixels, and those that leave the picture are trained (theirs: ``allowed_border=0``);
- the best anchor of a box is positive whatever its overlap (theirs: from 0.3 on);
- RoIAlign is not shifted by half a pixel (``aligned=False``) and takes 2 x 2 samples per bin (theirs: one per cell).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.models.anchors import build_anchor_generator
from mp3d.models.backbone import build_neck
from mp3d.models.folded import conv_pixels
from mp3d.models.roi_align import ROI_SIZE, PyramidRoIAlign, RoIMLP
from mp3d.models.transform import ClipBatch, ClipTransform
from mp3d.sample import Clip, Prediction, Target

BOX_CODER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""The reciprocals of the authors' standard deviations 0.1, 0.1, 0.2, 0.2."""


class Float32RPNHead(RPNHead):
    """Hands on float32 under autocast too: torchvision decodes boxes in the deltas' precision, 8 bits in bfloat16."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # both 1 x 1 convolutions in one
        weight = torch.cat([self.cls_logits.weight, self.bbox_pred.weight])
        bias = torch.cat([cast(Tensor, self.cls_logits.bias), cast(Tensor, self.bbox_pred.bias)])
        parts = (self.cls_logits.out_channels, self.bbox_pred.out_channels)
        levels = [conv_pixels(self.conv(level), weight, bias).float().split(parts, dim=1) for level in x]
        return [logits for logits, _ in levels], [deltas for _, deltas in levels]


class Float32Predictor(FastRCNNPredictor):
    """Hands on float32 under autocast too, for boxes and losses."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


def build_rpn(head: DetectionHead) -> RegionProposalNetwork:
    """torchvision's, with the numbers of the config."""
    anchors = build_anchor_generator(head)
    return RegionProposalNetwork(
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


def build_roi_heads(head: DetectionHead) -> RoIHeads:
    """RoIAlign on P2..P5, two fully connected layers, one box per class."""
    return RoIHeads(
        PyramidRoIAlign(),
        RoIMLP(head.fpn_channels * ROI_SIZE**2, head.box_features),
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
        proposals, rpn_losses = self.rpn(images, features, targets)
        predictions, roi_losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        if self.training:
            return {**rpn_losses, **roi_losses}
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
