"""The reports of a classifier and of a segmenter, case by case; files as of :mod:`mp3d.report.page`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from mp3d.evaluation import Case, CaseEvaluation, ClassifiedCase, MaskedSlice, SegmentedCase
from mp3d.metrics.dice import dice, overlap_counts
from mp3d.report.case_figures import (
    FEW_CLASSES,
    MASK_COLOURS,
    draw_case,
    draw_confusion,
    draw_dice,
    draw_masks,
    draw_roc,
    draw_scores,
)
from mp3d.report.figures import TRUE_COLOUR, draw_reliability
from mp3d.report.files import ReportFiles, write_files
from mp3d.report.html import data_url, split_config, template
from mp3d.report.numbers import case_numbers

NUM_SHOWN = 6
NAMES = {
    "top1": "accuracy of the highest class",
    "top5": "true class among the five highest",
    "auc": "area under the ROC curve",
    "threshold": "threshold",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "dice_per_case": "Dice per case",
    "dice_global": "Dice over all voxels",
    "hausdorff_95_mm": "HD95, mm",
}
"""What the scores are called on the page."""


def write_case_report(
    path: Path,
    evaluation: CaseEvaluation,
    image_of: Callable[[ClassifiedCase], np.ndarray | None] | None = None,
    masked_slice_of: Callable[[SegmentedCase], MaskedSlice | None] | None = None,
) -> ReportFiles:
    """Write the page at ``path``, and its figures and ``metrics.json`` into the same folder.

    Args:
        image_of: a classified case as an image, HU ``(h, w)`` or planes ``(3, h, w)``; None: no gallery.
        masked_slice_of: the slice that a segmented case shows; None: no gallery.
    """
    classified = [case for case in evaluation.cases if isinstance(case, ClassifiedCase)]
    segmented = [case for case in evaluation.cases if isinstance(case, SegmentedCase)]
    if classified:
        figures = _classifier_figures(evaluation, classified)
        sections = _classified_sections(classified, evaluation, image_of) if image_of else None
    else:
        figures = {"dice": draw_dice(segmented, _class_names(evaluation))}
        sections = _segmented_sections(segmented, masked_slice_of) if masked_slice_of else None
    facts, config = split_config(evaluation.provenance)
    headline = [
        name for name in ("auc", "top1", "dice_per_case", "dice_global", "hausdorff_95_mm") if name in evaluation.scores
    ]
    page = template("cases.html.j2").render(
        evaluation=evaluation,
        names={name: _name(name, _class_names(evaluation)) for name in evaluation.scores},
        headline=headline,
        of_cases={name: of_cases(evaluation, name) for name in evaluation.num_defined},
        figures={name: data_url(png) for name, png in figures.items()},
        sections=sections,
        classified=bool(classified),
        pictures=all(case.patient == case.series for case in evaluation.cases),  # each a patient of its own
        narrow=["roc"] + ["confusion"] * bool(classified and len(classified[0].logits) <= FEW_CLASSES),
        legend=list(zip(_class_names(evaluation), MASK_COLOURS, strict=False)) if segmented else [],
        true_colour=TRUE_COLOUR,
        facts=facts,
        config=config,
    )
    return write_files(path, page, figures, case_numbers(evaluation), evaluation.scores)


def of_cases(evaluation: CaseEvaluation, score: str) -> str:
    """Over how many of the cases a score is the mean, in words."""
    number = len(evaluation.cases)
    return f"{evaluation.num_defined[score]} of {number} case{'s' if number != 1 else ''}"


def _classifier_figures(evaluation: CaseEvaluation, cases: Sequence[ClassifiedCase]) -> dict[str, bytes]:
    logits, labels = np.array([case.logits for case in cases]), np.array([case.label for case in cases])
    figures = {}
    if logits.shape[1] == 2:
        threshold, probability = evaluation.scores["threshold"], _of_class_1(cases)
        others = {
            f"{name}, AUC {other.value:.3f}": _of_class_1(other.cases) for name, other in evaluation.comparisons.items()
        }
        patients = [case.patient for case in cases]
        figures["roc"] = draw_roc(probability, labels, patients, threshold, evaluation.scores["auc"], others)
        figures["scores"] = draw_scores(probability, labels, threshold, _class_names(evaluation, 2))
        said = (probability >= threshold).astype(int)
    else:
        said = logits.argmax(1)
    if logits.shape[1] <= 25:
        figures["confusion"] = draw_confusion(said, labels, _class_names(evaluation, logits.shape[1]))
    if evaluation.calibration is not None:
        figures["calibration"] = draw_reliability(evaluation.calibration, "Share that is right")
    return figures


def _of_class_1(cases: Sequence[Case]) -> np.ndarray:
    """The probability of the second of two classes."""
    return softmax([case.logits for case in cases if isinstance(case, ClassifiedCase)], axis=1)[:, 1]


def _classified_sections(
    cases: Sequence[ClassifiedCase], evaluation: CaseEvaluation, image_of: Callable[[ClassifiedCase], np.ndarray | None]
) -> list[dict[str, Any]]:
    """Surest of what is right and of what is wrong, by the threshold where there is one."""
    names = _class_names(evaluation, len(cases[0].logits))
    threshold = evaluation.scores.get("threshold")
    judged = []
    for case in cases:
        probabilities = softmax(case.logits)
        said = int(probabilities.argmax()) if threshold is None else int(probabilities[1] >= threshold)
        judged.append((said, float(probabilities[said]), case))
    sections = []
    for title, right in (("Right", True), ("Wrong", False)):
        of = sorted((each for each in judged if (each[0] == each[2].label) == right), key=lambda each: -each[1])
        cards = []
        for said, probability, case in of[:NUM_SHOWN]:
            image = image_of(case)
            if image is not None:
                verdict = f"{names[case.label]}, said {names[said]}"
                cards.append(_card(draw_case(image), verdict, f"probability {probability:.2f}", case))
        sections.append({"title": title, "order": "surest first", "total": len(of), "cards": cards})
    return sections


def _segmented_sections(
    cases: Sequence[SegmentedCase], masked_slice_of: Callable[[SegmentedCase], MaskedSlice | None]
) -> list[dict[str, Any]]:
    values = [
        float(np.nanmean(dice(np.array(case.counts)))) if any(map(any, case.counts)) else np.nan for case in cases
    ]
    defined = [(value, case) for value, case in zip(values, cases, strict=True) if value == value]
    ordered = sorted(defined, key=lambda each: -each[0])
    number = min(NUM_SHOWN, (len(ordered) + 1) // 2)
    sections = []
    for title, order, of in (
        ("Best", "highest Dice first", ordered[:number]),
        ("Worst", "lowest Dice first", ordered[::-1][: len(ordered) - number][:number]),
    ):
        if not of:
            continue
        cards = []
        for value, case in of:
            masked = masked_slice_of(case)
            if masked is not None:
                cards.append(_card(draw_masks(masked), f"Dice {value:.2f}", _told_of(case, masked), case))
        sections.append({"title": title, "order": order, "total": len(ordered), "cards": cards})
    return sections


def _told_of(case: SegmentedCase, masked: MaskedSlice) -> str:
    """Beside the case's Dice: its HD95, and the Dice of the slice shown, which is chosen for its errors."""
    distances = [each for each in case.hausdorff_95_mm if each == each]
    told = f"HD95 {max(distances):.1f} mm" if distances else "HD95 not defined"
    if masked.spacing_mm is None:  # a picture is all of its case
        return told
    values = dice(overlap_counts(masked.predicted_mask, masked.true_mask, len(case.counts)))
    defined = values[~np.isnan(values)]
    of_slice = f", its Dice {defined.mean():.2f}" if len(defined) else ", unmarked"
    return f"{told} · slice {case.shown_slice}{of_slice}"


def _card(png: bytes, verdict: str, told: str, case: ClassifiedCase | SegmentedCase) -> dict[str, Any]:
    return {
        "image": data_url(png),
        "alt": f"Series {case.series}: {verdict}, {told}",
        "verdict": verdict,
        "told": told,
        "patient": case.patient,
        "series": case.series,
    }


def _class_names(evaluation: CaseEvaluation, number: int = 0) -> list[str]:
    """As the data set has them; a segmenter's from its first class of the foreground on."""
    given = list(evaluation.class_names)
    return given + [f"class {index}" for index in range(len(given), number)]


def _name(score: str, classes: Sequence[str]) -> str:
    """In words; a segmenter's scores of one class end with its number."""
    stem, _, number = score.rpartition("_")
    if score not in NAMES and number.isdigit():
        place = int(number) - 1
        return f"{NAMES.get(stem, stem)}, {classes[place] if place < len(classes) else f'class {number}'}"
    return NAMES.get(score, score)
