"""The report's page: numbers in tables, pictures inlined, plain HTML and CSS.

Beside the page lie ``froc.png`` and ``metrics.json`` with the same numbers for programs.
"""

import json
import math
from pathlib import Path
from typing import Any

from mp3d.evaluation import Evaluation
from mp3d.metrics.froc import FrocResult
from mp3d.report.figures import FOUND_COLOUR, TRUE_COLOUR, display_window, draw_froc, draw_key_slice
from mp3d.report.gallery import Exhibit, choose_exhibits
from mp3d.report.html import data_url, signed, template


def write_report(path: Path, evaluation: Evaluation) -> Path:
    """Write the page at ``path``, and ``froc.png`` and ``metrics.json`` into the same folder; returns ``path``.

    Results whose pixels were kept make up the gallery; without any the page has numbers and the curve only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = {evaluation.name: evaluation.froc, **evaluation.comparisons}
    froc_png = draw_froc(curves)
    operating_fps = min(evaluation.protocol.fps_per_image, key=lambda fps: abs(fps - 1))
    page = template("page.html.j2").render(
        evaluation=evaluation,
        froc=evaluation.froc,
        protocol=evaluation.protocol,
        curves=curves,
        froc_image=data_url(froc_png),
        operating_fps=operating_fps,
        threshold=evaluation.froc.threshold_at[operating_fps],
        sections=_sections(evaluation, evaluation.froc.threshold_at[operating_fps]),
        num_drawable=sum(result.image is not None for result in evaluation.results),
        num_with_lesion=sum(len(result.true_boxes) > 0 for result in evaluation.results),
        true_colour=TRUE_COLOUR,
        found_colour=FOUND_COLOUR,
    )
    (path.parent / "froc.png").write_bytes(froc_png)
    (path.parent / "metrics.json").write_text(json.dumps(_numbers(evaluation), indent=2, allow_nan=False) + "\n")
    path.write_text(page, encoding="utf-8")
    return path


def _sections(evaluation: Evaluation, threshold: float) -> list[dict[str, Any]]:
    gallery = choose_exhibits(evaluation.results, threshold, evaluation.protocol)
    kinds = (
        ("Found", "most confident first", gallery.num_found, gallery.found, "No lesion was found."),
        ("Missed", "largest first", gallery.num_missed, gallery.missed, "No lesion was missed."),
        (
            "False positives",
            "most confident first",
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
            "cards": [_card(exhibit, threshold) for exhibit in exhibits],
            "if_empty": if_empty,
        }
        for title, order, total, exhibits, if_empty in kinds
    ]


def _card(exhibit: Exhibit, threshold: float) -> dict[str, Any]:
    result = exhibit.result
    window = display_window(exhibit.image, exhibit.focus)
    width_mm, height_mm = exhibit.size_mm
    return {
        "image": data_url(draw_key_slice(exhibit.image, result, exhibit.focus, threshold, window)),
        "alt": f"Slice {result.z_index} of series {result.series}, {exhibit.verdict}; whole slice and close-up",
        "verdict": exhibit.verdict,
        "score": exhibit.score,
        "iou": exhibit.iou,
        "size": f"{width_mm:.0f} × {height_mm:.0f} mm",
        "window": f"{window.name} window {signed(window.low)} to {signed(window.high)} HU",
        "patient": result.patient,
        "series": result.series,
        "z_index": result.z_index,
    }


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    """What ``metrics.json`` holds; a threshold that does not exist is null."""

    def curve(result: FrocResult) -> dict[str, Any]:
        return {
            "sensitivity_at": {f"{fps:g}": value for fps, value in result.sensitivity_at.items()},
            "threshold_at": {
                f"{fps:g}": None if math.isnan(value) else value for fps, value in result.threshold_at.items()
            },
            "mean_sensitivity": result.mean_sensitivity,
            "last_fps_per_image": result.last_fps_per_image,
        }

    protocol = evaluation.protocol
    return {
        "name": evaluation.name,
        "protocol": {
            "name": protocol.name,
            "iou_threshold": protocol.iou_threshold,
            "plus_one": protocol.plus_one,
            "fps_per_image": protocol.fps_per_image,
            "mean_over": protocol.mean_over,
        },
        "num_images": evaluation.froc.num_images,
        "num_lesions": evaluation.froc.num_lesions,
        "num_patients": evaluation.num_patients,
        "froc": curve(evaluation.froc),
        "ap50": evaluation.ap50,
        "comparisons": {name: curve(result) for name, result in evaluation.comparisons.items()},
        "provenance": dict(evaluation.provenance),
    }
