"""The report of a detector: numbers in tables, pictures inlined, plain HTML and CSS.

Beside the page lie its main figures as PNG and ``metrics.json`` with the same numbers for programs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mp3d.evaluation import Evaluation, KeySliceResult
from mp3d.report.figures import (
    FOUND_COLOUR,
    TRUE_COLOUR,
    draw_froc,
    draw_key_slice,
    draw_reliability,
    draw_strata,
)
from mp3d.report.files import ReportFiles, write_files
from mp3d.report.gallery import Exhibit, choose_exhibits
from mp3d.report.html import data_url, split_config, template
from mp3d.report.numbers import detection_numbers, flat_numbers
from mp3d.report.windows import display_window

PixelsOf = Callable[[KeySliceResult], np.ndarray | None]
"""A slice in HU, ``(h, w)``; None where it is not at hand."""


def write_report(path: Path, evaluation: Evaluation, pixels_of: PixelsOf | None = None) -> ReportFiles:
    """Write the page at ``path``, and its figures and ``metrics.json`` into the same folder.

    Args:
        pixels_of: where the gallery's slices come from; None: the page has numbers and figures only.
    """
    curves = {evaluation.name: evaluation.froc, **{name: c.froc for name, c in evaluation.comparisons.items()}}
    main = evaluation.by_protocol[0]
    figures = {"froc": draw_froc(curves, {evaluation.name: main.intervals.sensitivity_at})}
    figures["protocols"] = draw_froc({scores.protocol.name: scores.result for scores in evaluation.by_protocol})
    figures["strata"] = draw_strata(evaluation.strata, evaluation.froc.mean_sensitivity)
    if evaluation.calibration is not None:
        figures["calibration"] = draw_reliability(evaluation.calibration, "Share that overlaps a lesion")
    if (lesions := evaluation.lesions_3d) is not None:
        name = lesions.result.protocol.name
        figures["lesions_3d"] = draw_froc({name: lesions.result}, {name: lesions.intervals.sensitivity_at})
    rates = evaluation.protocol.fps_per_image
    operating_fps = min(rates, key=lambda fps: abs(fps - 1))
    chosen = {score.chosen_for: score for score in evaluation.operating}
    threshold = (
        chosen[operating_fps].threshold if operating_fps in chosen else evaluation.froc.threshold_at[operating_fps]
    )
    facts, config = split_config(evaluation.provenance)
    page = template("page.html.j2").render(
        evaluation=evaluation,
        froc=evaluation.froc,
        main=main,
        protocol=evaluation.protocol,
        figures={name: data_url(png) for name, png in figures.items()},
        operating_fps=operating_fps,
        threshold=threshold,
        threshold_is_chosen=operating_fps in chosen,
        sections=_sections(evaluation, threshold, pixels_of),
        has_pictures=pixels_of is not None,
        num_with_lesion=sum(len(result.true_boxes) > 0 for result in evaluation.results),
        true_colour=TRUE_COLOUR,
        found_colour=FOUND_COLOUR,
        facts=facts,
        config=config,
    )
    numbers = detection_numbers(evaluation)
    return write_files(path, page, figures, numbers, flat_numbers(evaluation))


def _sections(evaluation: Evaluation, threshold: float, pixels_of: PixelsOf | None) -> list[dict[str, Any]]:
    gallery = choose_exhibits(evaluation.results, threshold, evaluation.protocol)
    kinds = (
        ("Found", "most confident first", gallery.num_found, gallery.found, "No lesion was found."),
        ("Missed", "largest first", gallery.num_missed, gallery.missed, "No lesion was missed."),
        (
            "False positives",
            "most confident first, of those around one lesion the most confident",
            gallery.num_false_positives,
            gallery.false_positives,
            "There was no false positive.",
        ),
    )
    return [
        {
            "title": title,
            "order": order,
            "total": total,
            "cards": [card for each in exhibits if (card := _card(each, threshold, pixels_of)) is not None],
            "if_empty": if_empty if total == 0 else "Their slices are not at hand.",
        }
        for title, order, total, exhibits, if_empty in kinds
    ]


def _card(exhibit: Exhibit, threshold: float, pixels_of: PixelsOf | None) -> dict[str, Any] | None:
    result = exhibit.result
    image = None if pixels_of is None else pixels_of(result)
    if image is None:
        return None
    window = display_window(image, exhibit.focus, exhibit.kind)
    width_mm, height_mm = exhibit.size_mm
    below = exhibit.score is not None and not exhibit.score >= threshold
    return {
        "image": data_url(draw_key_slice(image, result, exhibit.focus, threshold, window, exhibit.detection)),
        "alt": f"Slice {result.z_index} of series {result.series}, {exhibit.verdict}; whole slice and close-up",
        "verdict": exhibit.verdict + " (blue, dotted)" * below,
        "kind": exhibit.kind,
        "score": exhibit.score,
        "iou": exhibit.iou,
        "size": f"{width_mm:.0f} × {height_mm:.0f} mm",
        "window": window.in_words,
        "patient": result.patient,
        "series": result.series,
        "z_index": result.z_index,
    }
