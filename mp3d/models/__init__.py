"""Networks. :func:`build_model` is the one place where a config becomes a model."""

from mp3d.config import ClassificationHead, ClipConfig, DetectionHead, ModelConfig
from mp3d.models.classifier import ClipClassifier
from mp3d.models.detector import LesionDetector

__all__ = ["ClipClassifier", "LesionDetector", "build_model"]


def build_model(model: ModelConfig, clip: ClipConfig) -> LesionDetector | ClipClassifier:
    """The model of a config, freshly initialised, in training mode, on the default device."""
    match model.head:
        case DetectionHead():
            return LesionDetector(model, clip)
        case ClassificationHead():
            return ClipClassifier(model, clip)
