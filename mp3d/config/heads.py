"""What sits on a backbone: one class for each kind of answer, told apart by ``kind``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mp3d.config.base import Config, Fraction

UNKNOWN = 255
"""Value of a mask where nobody said what is there: it is neither trained on nor judged."""


BoxStds = tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat]
"""Standard deviations of a box coder, of x, y, width and height."""


class DetectionHead(Config):
    """Faster R-CNN on the key slice; the defaults are the authors' ``mp3d_groupconv.py``."""

    kind: Literal["detection"] = "detection"
    num_classes: PositiveInt = 1
    """Lesion classes, the background not counted."""
    fpn_channels: PositiveInt = 256
    anchor_sizes_px: tuple[tuple[PositiveFloat, ...], ...] = ((16,), (32,), (64,), (128,), (256,))
    """Square root of the anchor area, one tuple for each of the five levels P2..P6."""
    anchor_ratios: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    """Height over width."""
    anchors: Literal["given", "fit"] = "given"
    """given: the sizes and ratios that stand here; fit: as many, fitted to the boxes of the training split before the
    run starts, which then holds the fitted ones as given.
    """
    rpn_positive_iou: Fraction = 0.7
    rpn_negative_iou: Fraction = 0.3
    rpn_min_positive_iou: Fraction = 0.3
    """The anchor that overlaps a box most is positive from this overlap on, be it below ``rpn_positive_iou``."""
    rpn_border_px: NonNegativeFloat | None = 0.0
    """Anchors that leave the picture by more are not trained; None: all are."""
    rpn_samples: PositiveInt = 256
    """Anchors per key slice that enter the loss."""
    rpn_positive_fraction: Fraction = 0.5
    """Of them at most so many positive."""
    rpn_stds: BoxStds = (1.0, 1.0, 1.0, 1.0)
    """What the network learns as one unit of x, y (in anchor sizes) and of log width and height."""
    rpn_beta: PositiveFloat = 1 / 9
    """Where the SmoothL1 of the anchors' boxes turns from square to linear."""
    rpn_nms_iou: Fraction = 0.7
    rpn_pre_nms: tuple[PositiveInt, PositiveInt] = (2000, 2000)
    """Best anchors per level that enter NMS, in training and in evaluation."""
    rpn_post_nms: tuple[PositiveInt, PositiveInt] = (1000, 1000)
    """Proposals kept per key slice, in training and in evaluation."""
    box_iou: Fraction = 0.5
    """A proposal is positive from this overlap on and negative below it."""
    box_samples: PositiveInt = 512
    """Proposals per key slice that enter the loss."""
    box_positive_fraction: Fraction = 0.25
    box_stds: BoxStds = (0.1, 0.1, 0.2, 0.2)
    """As ``rpn_stds``, of proposals."""
    box_beta: PositiveFloat = 1.0
    """As ``rpn_beta``."""
    roi_samples: NonNegativeInt = 0
    """Points per bin of RoIAlign and axis; 0: as many as the bin has cells."""
    roi_aligned: bool = True
    """RoIAlign takes a value for the centre of its cell."""
    box_features: PositiveInt = 1024
    """Width of the two fully connected layers."""
    score_threshold: Fraction = 0.0
    box_nms_iou: Fraction = 0.5
    max_detections: PositiveInt = 100
    """Boxes kept per key slice."""


class ClassificationHead(Config):
    """Global average pool over depth, rows and columns, then one linear layer (VDT, ``use_3d_gap``)."""

    kind: Literal["classification"] = "classification"
    num_classes: PositiveInt
    label_smoothing: Fraction = 0.1
    loss_over_batch: Literal["mean", "sum"] = "mean"
    """sum: as the authors' ``label_smooth_loss.py``, which multiplies the gradient by the clips per worker."""


class SegmentationHead(Config):
    """A class for every pixel of the key slices; the defaults are the authors' liver network (CSPR, ``LiTS_liver``)."""

    kind: Literal["segmentation"] = "segmentation"
    num_classes: Annotated[int, Field(ge=1, lt=UNKNOWN)] = 1
    """Classes of the mask, the background not counted."""
    decoder: Literal["unet", "fcn"] = "unet"
    """unet: reads the stem and all stages (``UNetNeck``); fcn: the stem, stage 2 and stage 4 (``LIDCFCNHead``)."""
    channels: PositiveInt = 16
    """Of the 3 x 3 x 3 convolutions behind the decoder: two of a U-Net, one of an FCN (there 128)."""
    dropout: Fraction = 0.1
    """Of whole channels, before the last convolution."""
    cross_entropy_weight: NonNegativeFloat = 1.0
    dice_weight: NonNegativeFloat = 0.5
    dice_smooth: PositiveFloat = 1e-3
    """Added to both sides of the fraction."""
    dice_over: Literal["clip", "batch"] = "clip"
    """Whose pixels one Dice is taken over; batch: those of the clips that all workers read at once. The gradient of
    accumulated batches then is the mean of theirs, not that of one large batch.
    """
    dice_background: bool = False
    """The background is a class of the Dice too."""
    loss: Literal["mended", "lits_authors", "lidc_authors"] = "mended"
    """The formula. ``lits_authors`` (``ComboLoss``) adds the intersection to the Dice's denominator, so that a perfect
    answer has Dice 2/3. ``lidc_authors`` (``CombineLoss``) takes the softmax of the cross-entropy over the columns of
    the picture, divides by the number of classes as well, and has the weights 1 and 0.5 whatever stands here.
    """
