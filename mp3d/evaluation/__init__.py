"""Model and shards make predictions, predictions make metrics: detectors on slices, other heads on cases.

shards ─► key_slices, cases ─► results ─► prediction_file ─► detection (lesions_3d), case_scores
"""

from mp3d.evaluation.case_scores import (
    CaseComparison,
    CaseEvaluation,
    chosen_threshold,
    classification_scores,
    evaluate_cases,
    num_defined,
    segmentation_scores,
)
from mp3d.evaluation.cases import CasePredictor, case_samples
from mp3d.evaluation.detection import Evaluation, evaluate_detector, froc_of, streaming_loss
from mp3d.evaluation.key_slices import (
    ABLATIONS,
    KeySlicePredictor,
    SeriesPredictor,
    Variant,
    answers_for,
    detection_samples,
    predict_clips,
    provenance_of,
    without_context,
)
from mp3d.evaluation.pictures import MaskedSlice, Pictures
from mp3d.evaluation.prediction_file import Predictions, check_same_truth, read_predictions, write_predictions
from mp3d.evaluation.results import Case, ClassifiedCase, KeySliceResult, Record, SegmentedCase

__all__ = [
    "ABLATIONS",
    "Case",
    "CaseComparison",
    "CaseEvaluation",
    "CasePredictor",
    "ClassifiedCase",
    "Evaluation",
    "KeySlicePredictor",
    "KeySliceResult",
    "MaskedSlice",
    "Pictures",
    "Predictions",
    "Record",
    "SegmentedCase",
    "SeriesPredictor",
    "Variant",
    "answers_for",
    "case_samples",
    "check_same_truth",
    "chosen_threshold",
    "classification_scores",
    "detection_samples",
    "evaluate_cases",
    "evaluate_detector",
    "froc_of",
    "num_defined",
    "predict_clips",
    "provenance_of",
    "read_predictions",
    "segmentation_scores",
    "streaming_loss",
    "without_context",
    "write_predictions",
]
