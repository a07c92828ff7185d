"""The two-dimensional half of the detector: region proposals and box heads as in the authors' ``mp3d_groupconv.py``.

torchvision's Faster R-CNN, with MMDetection 2's numbers and rules where the two differ:
- anchors that leave the picture are not trained (``allowed_border=0``);
- the best anchor of a box is positive only from an overlap on (``min_pos_iou``), and then for that box;
- the SmoothL1 of either loss has a beta of its own;
- RoIAlign is shifted by half a pixel (``aligned``), and its samples may follow the size of the box;
- the background has no box regression.

A GPU suppresses overlapping boxes of all pictures at once (:mod:`mp3d.models.nms`), to the same answers.

On a CPU what is not trained takes faster ways to the same numbers: RoIAlign (:mod:`mp3d.models.roi_align`), and the
first layer of the box head, a 7 x 7 convolution of what it sees, as a 1 x 1 one of pixels with 49 times the channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import clip_boxes_to_image, remove_small_boxes, roi_align
from torchvision.ops.poolers import LevelMapper

from mp3d.config import DetectionHead
from mp3d.models.anchors import build_anchor_generator
from mp3d.models.folded import PIXEL_BATCH, conv_pixels
from mp3d.models.key_slice_sampler import KeySliceSampler
from mp3d.models.nms import best_after_nms, kept_by_nms
from mp3d.models.roi_align import ROI_SIZE, ROI_STRIDES, bag_roi_align

Boxes = Float[Tensor, "b 4"]
SMALLEST_SIDE_PX = 1e-2
"""Of a box that is found; torchvision's."""


class Float32RPNHead(RPNHead):
    """Hands on float32 under autocast too: torchvision decodes boxes in the deltas' precision, 8 bits in bfloat16."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # both 1 x 1 convolutions in one
        weight = torch.cat([self.cls_logits.weight, self.bbox_pred.weight])
        bias = torch.cat([cast(Tensor, self.cls_logits.bias), cast(Tensor, self.bbox_pred.bias)])
        parts = (self.cls_logits.out_channels, self.bbox_pred.out_channels)
        levels = [conv_pixels(self.conv(level), weight, bias).float().split(parts, dim=1) for level in x]
        return [logits for logits, _ in levels], [deltas for _, deltas in levels]


class MaxIoUMatcher(Matcher):
    """MMDetection's ``MaxIoUAssigner``: the anchors that overlap a box most are its own, from ``least`` on."""

    def __init__(self, positive: float, negative: float, least: float) -> None:
        super().__init__(positive, negative, allow_low_quality_matches=True)
        self.least = least

    def set_low_quality_matches_(
        self, matches: Int64[Tensor, " a"], all_matches: Int64[Tensor, " a"], match_quality_matrix: Float[Tensor, "b a"]
    ) -> None:
        """In place; of several boxes with the same best anchor it belongs to the last."""
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best) & (best >= self.least) & (best > 0)
        numbers = torch.arange(1, len(best) + 1, device=matches.device)[:, None]
        last = (is_best * numbers).amax(dim=0)
        matches[last > 0] = last[last > 0] - 1


class LesionRPN(RegionProposalNetwork):
    """torchvision's region proposal network with the rules above.

    Args:
        anchors: of every level.
    """

    def __init__(self, head: DetectionHead) -> None:
        anchors = build_anchor_generator(head)
        super().__init__(
            anchors,
            Float32RPNHead(head.fpn_channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=head.rpn_positive_iou,
            bg_iou_thresh=head.rpn_negative_iou,
            batch_size_per_image=head.rpn_samples,
            positive_fraction=head.rpn_positive_fraction,
            pre_nms_top_n=dict(zip(("training", "testing"), head.rpn_pre_nms, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), head.rpn_post_nms, strict=True)),
            nms_thresh=head.rpn_nms_iou,
        )
        self.proposal_matcher = MaxIoUMatcher(head.rpn_positive_iou, head.rpn_negative_iou, head.rpn_min_positive_iou)
        self.box_coder = BoxCoder(weights=_coder_weights(head.rpn_stds))
        self.border_px, self.beta = head.rpn_border_px, head.rpn_beta
        self.fg_bg_sampler = KeySliceSampler(head.rpn_samples, head.rpn_positive_fraction, stream=0)

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of every picture, and the losses in training mode."""
        sized = None
        if targets is not None:
            sized = [{**target, "image_size": size} for target, size in zip(targets, images.image_sizes, strict=True)]
        return super().forward(images, features, sized)

    def filter_proposals(
        self,
        proposals: Float[Tensor, "k a 4"],
        objectness: Float[Tensor, "k*a 1"],
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Boxes], list[Float[Tensor, " p"]]]:
        """Boxes and scores of every picture after non-maximum suppression, best first; torchvision's, but that a CPU
        ends with the last box that is wanted, and a GPU does all pictures at once.
        """
        logits = objectness.detach().reshape(len(proposals), -1)
        candidates = self._get_top_n_idx(logits, num_anchors_per_level)
        if logits.is_cuda:
            return self.filtered_at_once(proposals, logits.sigmoid(), candidates, image_shapes, num_anchors_per_level)
        level_ends = torch.tensor(num_anchors_per_level, device=logits.device).cumsum(0)
        boxes, scores = [], []
        for every, scored, best, size in zip(proposals, logits.sigmoid(), candidates, image_shapes, strict=True):
            inside = clip_boxes_to_image(every[best], size)
            good = remove_small_boxes(inside, self.min_size)
            good = good[scored[best[good]] >= self.score_thresh]
            best, inside = best[good], inside[good]
            levels = torch.bucketize(best, level_ends, right=True)
            kept = best_after_nms(inside, scored[best], levels, self.nms_thresh, self.post_nms_top_n())
            boxes.append(inside[kept])
            scores.append(scored[best[kept]])
        return boxes, scores

    def filtered_at_once(
        self,
        proposals: Float[Tensor, "k a 4"],
        scores: Float[Tensor, "k a"],
        candidates: Int64[Tensor, "k t"],
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Boxes], list[Float[Tensor, " p"]]]:
        """The same in a few large kernels, where a loop over pictures would wait for each of many small ones."""
        scores = scores.gather(1, candidates)
        heights, widths = proposals.new_tensor(image_shapes)[:, :, None].unbind(1)
        x1, y1, x2, y2 = proposals.gather(1, candidates[:, :, None].expand(-1, -1, 4)).unbind(2)
        x1, x2 = (x.clamp(min=0).minimum(widths) for x in (x1, x2))
        y1, y2 = (y.clamp(min=0).minimum(heights) for y in (y1, y2))
        boxes = torch.stack([x1, y1, x2, y2], 2)
        good = (x2 - x1 >= self.min_size) & (y2 - y1 >= self.min_size) & (scores >= self.score_thresh)
        sizes = [min(self.pre_nms_top_n(), count) for count in num_anchors_per_level]
        levels = zip(boxes.split(sizes, 1), good.split(sizes, 1), strict=True)
        kept = torch.cat([kept_by_nms(each, usable, self.nms_thresh) for each, usable in levels], 1)
        order = scores.masked_fill(~kept, -1).argsort(dim=1, descending=True, stable=True)[:, : self.post_nms_top_n()]
        counts = kept.sum(1).clamp(max=order.shape[1]).tolist()
        boxes, scores = boxes.gather(1, order[:, :, None].expand(-1, -1, 4)), scores.gather(1, order)
        return (
            [each[:count] for each, count in zip(boxes, counts, strict=True)],
            [each[:count] for each, count in zip(scores, counts, strict=True)],
        )

    def assign_targets_to_anchors(
        self, anchors: list[Boxes], targets: list[dict[str, Any]]
    ) -> tuple[list[Float[Tensor, " a"]], list[Boxes]]:
        """1 for a lesion, 0 for background, -1 for what is not trained; and a box for each anchor."""
        inside = [self._inside(each, target["image_size"]) for each, target in zip(anchors, targets, strict=True)]
        of_inside = super().assign_targets_to_anchors(
            [each[kept] for each, kept in zip(anchors, inside, strict=True)], targets
        )
        labels, boxes = [], []
        for each, kept, inside_labels, inside_boxes in zip(anchors, inside, *of_inside, strict=True):
            labels.append(inside_labels.new_full((len(each),), -1).masked_scatter(kept, inside_labels))
            boxes.append(inside_boxes.new_zeros(each.shape).masked_scatter(kept[:, None], inside_boxes))
        return labels, boxes

    def _inside(self, anchors: Boxes, image_size: tuple[int, int]) -> Bool[Tensor, " a"]:
        if self.border_px is None:
            return torch.ones_like(anchors[:, 0], dtype=torch.bool)
        height, width = image_size
        border = self.border_px
        x1, y1, x2, y2 = anchors.unbind(1)
        inside = (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)
        # a picture smaller than every anchor would have no loss
        return inside | ~inside.any()

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Binary cross-entropy and SmoothL1, both over the sampled anchors."""
        positive, negative = (torch.cat(masks).nonzero()[:, 0] for masks in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        wanted = torch.cat(regression_targets)[positive]
        box_loss = F.smooth_l1_loss(pred_bbox_deltas[positive], wanted, beta=self.beta, reduction="sum") / len(sampled)
        return F.binary_cross_entropy_with_logits(objectness[sampled, 0], torch.cat(labels)[sampled]), box_loss


class PyramidRoIAlign(nn.Module):
    """RoIAlign of every box on the level of its size: up to 112 pixels P2, then an octave each.

    Args:
        samples: per bin and axis; 0 as many as cells of the map.
        aligned: shifted by half a pixel, as the cells of a map lie.
    """

    def __init__(self, samples: int, aligned: bool) -> None:
        super().__init__()
        self.samples, self.aligned = samples, aligned
        self.level_of = LevelMapper(k_min=2, k_max=5)

    def forward(
        self, features: Mapping[str, Float[Tensor, "k c _ _"]], boxes: list[Boxes], image_shapes: Any = None
    ) -> Float[Tensor, "r c 7 7"]:
        """Of the boxes of all pictures, in order."""
        maps = list(features.values())[: len(ROI_STRIDES)]
        if maps[0].device.type == "cpu" and not torch.is_grad_enabled():
            return bag_roi_align(maps, boxes, self.level_of(boxes), self.samples, self.aligned)
        pictures = torch.cat([each.new_full((len(each), 1), index) for index, each in enumerate(boxes)])
        rois = torch.cat([pictures, torch.cat(boxes)], dim=1)
        levels = self.level_of(boxes)
        pooled = maps[0].new_empty(len(rois), maps[0].shape[1], ROI_SIZE, ROI_SIZE)
        for level, (features_of_level, stride) in enumerate(zip(maps, ROI_STRIDES, strict=True)):
            here = (levels == level).nonzero()[:, 0]
            crops = roi_align(
                features_of_level, rois[here], ROI_SIZE, 1 / stride, sampling_ratio=self.samples, aligned=self.aligned
            )
            pooled = pooled.index_copy(0, here, crops.to(pooled.dtype))
        return pooled


class BoxHead(nn.Module):
    """Two fully connected layers with ReLU (``Shared2FCBBoxHead``)."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(channels * ROI_SIZE**2, features)
        self.fc7 = nn.Linear(features, features)

    def forward(self, x: Float[Tensor, "r c 7 7"]) -> Float[Tensor, "r f"]:
        x = x.flatten(1)
        # oneDNN's convolutions are on some processors twice as fast as a product of matrices, and on none slower
        whole = len(x) // PIXEL_BATCH * PIXEL_BATCH if x.device.type == "cpu" and not torch.is_grad_enabled() else 0
        hidden = [self.fc6(x[whole:])]
        if whole:
            pixels = x[:whole].unflatten(0, (PIXEL_BATCH, -1)).transpose(1, 2).unsqueeze(3)
            convolved = F.conv2d(pixels, self.fc6.weight[:, :, None, None], self.fc6.bias)
            hidden = [convolved.squeeze(3).transpose(1, 2).flatten(0, 1), *hidden]
        x = torch.cat(hidden)
        return F.relu(self.fc7(F.relu(x)))


class BoxPredictor(nn.Module):
    """Scores of every class, the background first, and boxes of all but the background; float32 under autocast too."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(features, num_classes + 1)
        self.bbox_pred = nn.Linear(features, 4 * num_classes)

    def forward(self, x: Float[Tensor, "r f"]) -> tuple[Float[Tensor, "r c"], Float[Tensor, "r 4*c"]]:
        """Logits, and deltas with zeros for the background, as torchvision counts."""
        return self.cls_score(x).float(), F.pad(self.bbox_pred(x).float(), (4, 0))


class LesionRoIHeads(RoIHeads):
    """torchvision's box head with the rules above."""

    def __init__(self, head: DetectionHead) -> None:
        super().__init__(
            PyramidRoIAlign(head.roi_samples, head.roi_aligned),
            BoxHead(head.fpn_channels, head.box_features),
            BoxPredictor(head.box_features, head.num_classes),
            fg_iou_thresh=head.box_iou,
            bg_iou_thresh=head.box_iou,
            batch_size_per_image=head.box_samples,
            positive_fraction=head.box_positive_fraction,
            bbox_reg_weights=_coder_weights(head.box_stds),
            score_thresh=head.score_threshold,
            nms_thresh=head.box_nms_iou,
            detections_per_img=head.max_detections,
        )
        self.beta = head.box_beta
        self.fg_bg_sampler = KeySliceSampler(head.box_samples, head.box_positive_fraction, stream=1)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Boxes],
        image_shapes: list[tuple[int, int]],
        targets: Any = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Boxes, labels and scores of every picture; in training mode the losses instead."""
        labels = wanted = None
        if self.training:
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        if labels is not None and wanted is not None:
            return [], self._losses(logits, deltas, torch.cat(labels), torch.cat(wanted))
        found = zip(*self.postprocess_detections(logits, deltas, proposals, image_shapes), strict=True)
        return [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in found], {}

    def postprocess_detections(
        self,
        class_logits: Float[Tensor, "r c"],
        box_regression: Float[Tensor, "r 4*c"],
        proposals: list[Boxes],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Boxes], list[Float[Tensor, " b"]], list[Int64[Tensor, " b"]]]:
        """Boxes, scores and labels of every picture after non-maximum suppression in each class, best first;
        torchvision's, but that a GPU does all pictures at once.
        """
        if class_logits.is_cuda:
            return self.postprocess_at_once(class_logits, box_regression, proposals, image_shapes)
        return super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)

    def postprocess_at_once(
        self,
        class_logits: Float[Tensor, "r c"],
        box_regression: Float[Tensor, "r 4*c"],
        proposals: list[Boxes],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Boxes], list[Float[Tensor, " b"]], list[Int64[Tensor, " b"]]]:
        """The same in a few large kernels: all lists as long as the longest, which a CPU would have to work off."""
        counts = torch.tensor([len(each) for each in proposals], device=class_logits.device)
        picture_of = torch.repeat_interleave(counts, output_size=len(class_logits))
        heights, widths = box_regression.new_tensor(image_shapes)[picture_of].unbind(1)
        scores = F.softmax(class_logits, -1)
        boxes = self.box_coder.decode(box_regression, proposals).reshape(*scores.shape, 4).clamp(min=0)
        boxes = boxes.minimum(torch.stack([widths, heights, widths, heights], 1)[:, None])
        good = (scores > self.score_thresh) & (boxes[:, :, 2:] - boxes[:, :, :2] >= SMALLEST_SIDE_PX).all(2)
        good[:, 0] = False  # the background
        rows, labels = good.nonzero(as_tuple=True)
        boxes, scores, picture_of = boxes[rows, labels], scores[rows, labels], picture_of[rows]
        best = scores.argsort(descending=True, stable=True)
        # a list for each class of each picture, best first, as long as the longest
        num_classes = class_logits.shape[1] - 1
        list_of = (picture_of * num_classes + labels - 1)[best]
        best, list_of = best[(order := list_of.argsort(stable=True))], list_of[order]
        sizes = torch.bincount(list_of, minlength=len(proposals) * num_classes)
        place = torch.arange(len(best), device=best.device) - (sizes.cumsum(0) - sizes)[list_of]
        longest = int(sizes.max())
        lists, usable = boxes.new_zeros(len(sizes), longest, 4), good.new_zeros(len(sizes), longest)
        lists[list_of, place], usable[list_of, place] = boxes[best], True
        kept = best[kept_by_nms(lists, usable, self.nms_thresh)[list_of, place]]
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
        kept = kept[picture_of[kept].argsort(stable=True)]
        found = torch.bincount(picture_of[kept], minlength=len(proposals)).tolist()
        of_pictures = [each[: self.detections_per_img] for each in kept.split(found)]
        return (
            [boxes[each] for each in of_pictures],
            [scores[each] for each in of_pictures],
            [labels[each] for each in of_pictures],
        )

    def _losses(
        self, logits: Float[Tensor, "r c"], deltas: Float[Tensor, "r 4*c"], labels: Int64[Tensor, " r"], wanted: Boxes
    ) -> dict[str, Tensor]:
        """Cross-entropy, and SmoothL1 of the boxes of positives over all sampled proposals."""
        positive = (labels > 0).nonzero()[:, 0]
        own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
        box_loss = F.smooth_l1_loss(own, wanted[positive], beta=self.beta, reduction="sum") / len(labels)
        return {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": box_loss}


def _coder_weights(stds: Sequence[float]) -> tuple[float, float, float, float]:
    """torchvision multiplies by the reciprocals of MMDetection's standard deviations."""
    x, y, w, h = (1 / std for std in stds)
    return x, y, w, h
