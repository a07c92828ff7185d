"""Networks. :func:`build_model` is the one place where a config becomes a model."""

from mp3d.config import ClassificationHead, ClipConfig, DetectionHead, ModelConfig, SegmentationHead
from mp3d.errors import ConfigError
from mp3d.models.classifier import ClipClassifier
from mp3d.models.detector import LesionDetector
from mp3d.models.p3d import MIN_DEPTH
from mp3d.models.resnet3d import PLANES_OF_A_PICTURE
from mp3d.models.segmenter import ClipSegmenter

__all__ = ["ClipClassifier", "ClipSegmenter", "LesionDetector", "build_model"]


def build_model(model: ModelConfig, clip: ClipConfig) -> LesionDetector | ClipClassifier | ClipSegmenter:
    """The model of a config, freshly initialised, in training mode, on the default device.

    Raises:
        ConfigError: a model that cannot read clips of this depth, or a width that leaves no channel.
    """
    check_depth(model, clip)
    match model.head:
        case DetectionHead():
            return LesionDetector(model, clip)
        case ClassificationHead():
            return ClipClassifier(model, clip)
        case SegmentationHead():
            return ClipSegmenter(model, clip)


def check_depth(model: ModelConfig, clip: ClipConfig) -> None:
    """Raises: ConfigError where a model cannot read clips of this depth."""
    if model.backbone.startswith("p3d") and clip.num_slices < MIN_DEPTH:
        raise ConfigError(
            f"clip.num_slices is {clip.num_slices}: {model.backbone} pools z away and needs at least {MIN_DEPTH}; "
            "take the mp3d of the same depth, whose weights it can start from"
        )
    if model.transform_taps is not None and model.transform_taps > clip.num_slices:
        raise ConfigError(
            f"model.transform_taps is {model.transform_taps}, above clip.num_slices, which is {clip.num_slices}; "
            "leave it unset to weight all slices of a window"
        )
    if model.backbone.startswith("resnet2d") and clip.num_slices != PLANES_OF_A_PICTURE:
        raise ConfigError(
            f"clip.num_slices is {clip.num_slices}: {model.backbone} reads {PLANES_OF_A_PICTURE} slices as colours"
        )
