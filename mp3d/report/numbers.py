"""The numbers of an evaluation as plain values, for ``metrics.json`` and for a tracker; what is undefined is null."""

import math
from collections.abc import Mapping
from typing import Any

from mp3d.evaluation import CaseEvaluation, Evaluation
from mp3d.metrics.bootstrap import LEVEL, Interval
from mp3d.metrics.calibration import Calibration
from mp3d.metrics.froc import FrocResult
from mp3d.metrics.froc_replicates import FrocIntervals


def detection_numbers(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the curves."""
    protocol, lesions = evaluation.protocol, evaluation.lesions_3d
    return {
        "name": evaluation.name,
        "protocol": {
            "name": protocol.name,
            "source": protocol.source,
            "overlap": protocol.overlap_name,
            "fps_per_image": protocol.fps_per_image,
            "mean_over": protocol.mean_over,
        },
        "slices": evaluation.slices,
        "num_images": evaluation.froc.num_images,
        "num_lesions": evaluation.froc.num_lesions,
        "num_patients": evaluation.num_patients,
        "intervals": _bootstrap(evaluation.num_replicates),
        "froc": _curve(evaluation.froc, evaluation.by_protocol[0].intervals),
        "protocols": {each.protocol.name: _curve(each.result, each.intervals) for each in evaluation.by_protocol},
        "ap50": evaluation.ap50,
        "ap50_interval": _interval(evaluation.ap50_interval),
        "ap50_95": evaluation.coco_ap,
        "ap50_95_interval": _interval(evaluation.coco_ap_interval),
        "ap50_95_replicates": evaluation.coco_replicates,
        "strata": [
            {
                "by": each.by,
                "name": each.name,
                "num_lesions": each.num_lesions,
                "sensitivity_at": _by_rate(each.sensitivity_at),
                "mean_sensitivity": each.mean_sensitivity,
                "interval": _interval(each.mean),
            }
            for each in evaluation.strata
        ],
        "size_is": evaluation.size_is,
        "calibration": _calibration(evaluation.calibration),
        "operating_points": [vars(each) for each in evaluation.operating],
        "chosen_on": evaluation.chosen_on,
        "comparisons": {
            name: _curve(each.froc)
            | {
                "difference": each.test.difference,
                "interval": _interval(each.test.interval),
                "p_value": each.test.p_value,
            }
            for name, each in evaluation.comparisons.items()
        },
        "lesions_3d": None
        if lesions is None
        else _curve(lesions.result, lesions.intervals)
        | {"protocol": lesions.result.protocol.name, "num_linked": lesions.num_linked, "num_boxes": lesions.num_boxes},
        "provenance": dict(evaluation.provenance),
    }


def case_numbers(evaluation: CaseEvaluation) -> dict[str, Any]:
    """Everything but the cases."""
    return {
        "name": evaluation.name,
        "head": evaluation.head,
        "metrics": {name: _defined(value) for name, value in evaluation.scores.items()},
        "metric_intervals": {name: _interval(spread) for name, spread in evaluation.intervals.items()},
        "num_cases_defined": dict(evaluation.num_defined),
        "threshold_from": evaluation.threshold_from,
        "num_cases": len(evaluation.cases),
        "num_patients": evaluation.num_patients,
        "intervals": _bootstrap(evaluation.num_replicates),
        "calibration": _calibration(evaluation.calibration),
        "comparisons": {
            name: {
                "score": each.score,
                "value": _defined(each.value),
                "difference": _defined(each.difference),
                "interval": _interval(each.interval),
                "p_value": each.p_value,
            }
            for name, each in evaluation.comparisons.items()
        },
        "provenance": dict(evaluation.provenance),
    }


def flat_numbers(evaluation: Evaluation) -> dict[str, float]:
    """The headline numbers of a detector, by name."""
    numbers = {"ap50": evaluation.ap50, "ap50_95": evaluation.coco_ap}
    for scores in evaluation.by_protocol:
        numbers[f"froc_mean/{scores.protocol.name}"] = scores.result.mean_sensitivity
    numbers |= {f"sensitivity@{fps:g}": value for fps, value in evaluation.froc.sensitivity_at.items()}
    if evaluation.lesions_3d is not None:
        numbers["froc_mean/LENS 3D"] = evaluation.lesions_3d.result.mean_sensitivity
    if evaluation.calibration is not None:
        numbers["ece"] = evaluation.calibration.ece
    return numbers


def _curve(result: FrocResult, intervals: FrocIntervals | None = None) -> dict[str, Any]:
    content = {
        "sensitivity_at": _by_rate(result.sensitivity_at),
        "threshold_at": _by_rate(result.threshold_at),
        "mean_sensitivity": result.mean_sensitivity,
        "last_fps_per_image": result.last_fps_per_image,
    }
    if intervals is not None:
        spreads = {f"{fps:g}": _interval(spread) for fps, spread in intervals.sensitivity_at.items()}
        content |= {"sensitivity_intervals": spreads, "mean_interval": _interval(intervals.mean_sensitivity)}
    return content


def _calibration(of: Calibration | None) -> dict[str, Any] | None:
    if of is None:
        return None
    bins = zip(of.counts.tolist(), of.mean_score.tolist(), of.share_right.tolist(), strict=True)
    return {
        "ece": of.ece,
        "brier": of.brier,
        "bins": [
            {"count": count, "mean_score": _defined(score), "share_right": _defined(share)}
            for count, score, share in bins
        ],
    }


def _bootstrap(num_replicates: int) -> dict[str, Any]:
    return {"level": LEVEL, "resampled": "patients", "replicates": num_replicates}


def _by_rate(values: Mapping[float, float]) -> dict[str, float | None]:
    return {f"{fps:g}": _defined(value) for fps, value in values.items()}


def _interval(spread: Interval) -> list[float | None]:
    return [_defined(spread.low), _defined(spread.high)]


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
