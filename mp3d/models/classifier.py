"""Classifier of whole pictures and clips (VDT paper: supervised pre-training on ImageNet; authors' ``use_3d_gap``)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mp3d.config import ClassificationHead, ClipConfig, ModelConfig
from mp3d.models.backbone import build_backbone
from mp3d.models.transform import ClipTransform
from mp3d.sample import Clip, Prediction, Target


class ClipClassifier(nn.Module):
    """3D backbone, mean over slices, rows and columns of its last stage, one linear layer; one answer per clip.

    Args:
        model: its head is a :class:`ClassificationHead`.
    """

    def __init__(self, model: ModelConfig, clip: ClipConfig) -> None:
        super().__init__()
        head = model.head
        if not isinstance(head, ClassificationHead):
            raise TypeError(f"model.head is a {type(head).__name__}; a classifier needs a ClassificationHead")
        self.label_smoothing, self.loss_over_batch = head.label_smoothing, head.loss_over_batch
        self.transform = ClipTransform(clip)
        self.backbone = build_backbone(model)
        self.fc = nn.Linear(self.backbone.out_channels[-1], head.num_classes)

    def forward(
        self, clips: Sequence[Clip], targets: Sequence[Target] | None = None, image_size: int | None = None
    ) -> dict[str, Tensor] | list[Prediction]:
        """In training mode the loss, over the batch as the head says; else the logits of each clip.

        Raises:
            ValueError: no target in training, another number of targets than clips, or a label that is no class.
        """
        batch, _ = self.transform(clips, image_size=image_size)
        features = self.backbone(batch.tensors)[-1]
        logits = self.fc(features.mean(dim=(2, 3, 4))).float()
        if not self.training:
            return [Prediction(logits=row) for row in logits]
        if targets is None:
            raise ValueError("targets is None; training needs one target per clip")
        labels = self._labels(targets, len(clips))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction=self.loss_over_batch)
        return {"loss_classification": loss}

    def _labels(self, targets: Sequence[Target], num_clips: int) -> Tensor:
        if len(targets) != num_clips:
            raise ValueError(f"{len(targets)} targets for {num_clips} clips; a clip to classify has one key slice")
        labels = []
        for index, target in enumerate(targets):
            if "label" not in target:
                raise ValueError(f"target {index} has {sorted(target)}; a classification target has a label")
            labels.append(target["label"])
        labels = torch.stack(labels)
        if not bool(((labels >= 0) & (labels < self.fc.out_features)).all()):
            raise ValueError(f"the labels are {labels.tolist()}; classes are 0..{self.fc.out_features - 1}")
        return labels
