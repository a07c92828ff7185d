"""The numbers of a data passport, as they stand in its JSON: one function for each of its parts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mp3d.data.intensity import Intensities
from mp3d.data.leaks import Shared
from mp3d.data.shard import Reject
from mp3d.data.survey import SplitSurvey
from mp3d.models.anchor_fit import AnchorSet, centred_iou, coverage, evenly_spread, placed_iou

PERCENTS = (1, 5, 25, 50, 75, 95, 99)
LISTED_IDS = 100
"""Hashed ids of one kind and pair of splits that a leak names; more are counted only."""
PLACED_BOXES = 5000
"""Boxes over which placed overlaps are told; of more, those evenly spread over the areas."""

Numbers = dict[str, Any]


def count_split(of: SplitSurvey, class_names: Sequence[str]) -> Numbers:
    def per_class(counts: Counter[int], first: int) -> dict[str, int]:
        return {name: counts[number] for number, name in enumerate(class_names, first)} if counts else {}

    return {
        "patients": len(of.patients),
        "studies": len(of.studies),
        "series": len(of.series),
        "rows": of.num_rows,
        "searched_rows": of.num_searched,
        "key_rows": of.num_key_rows,
        "boxes": len(of.boxes),
        "instances": of.num_instances,
        "boxes_per_class": per_class(Counter(of.boxes.labels.tolist()), 1),
        "images_per_class": per_class(of.image_labels, 0),
    }


def geometry(of: SplitSurvey) -> Numbers:
    numbers: Numbers = {
        "image_sizes": [
            {"rows": rows, "columns": columns, "count": count}
            for (rows, columns), count in sorted(of.image_sizes.items(), key=lambda each: (-each[1], each[0]))
        ]
    }
    if len(of.spacing_mm):
        numbers |= {
            "slice_spacing_mm": summary(of.spacing_mm[:, 0]),
            "row_spacing_mm": summary(of.spacing_mm[:, 1]),
            "column_spacing_mm": summary(of.spacing_mm[:, 2]),
            "slices_per_series": summary(of.slices_per_series),
            "height_mm": summary(of.spacing_mm[:, 0] * of.slices_per_series),
        }
    return numbers


def intensity(of: Intensities) -> Numbers:
    occurring = of.values[of.counts > 0]
    return {
        "unit": of.unit,
        "sampled_rows": of.num_rows,
        "min": int(occurring[0]),
        **{f"p{percent}": of.percentile(percent) for percent in PERCENTS},
        "max": int(occurring[-1]),
        "mean": _rounded(of.mean),
        "std": _rounded(of.std),
    }


def boxes(of: SplitSurvey) -> Numbers:
    """Sizes are square roots of areas; in mm where every box has a scale."""
    width, height = of.boxes.widths_heights.T
    numbers = {"size_px": summary(np.sqrt(width * height)), "height_over_width": summary(height / width)}
    sizes_mm = np.sqrt(of.boxes.widths_heights_mm.prod(axis=1))
    return numbers | ({"size_mm": summary(sizes_mm)} if np.isfinite(sizes_mm).all() else {})


def anchor_table(
    sets: Mapping[str, AnchorSet], widths_heights: Mapping[str, np.ndarray]
) -> tuple[list[Numbers], dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """How well each set of anchors meets the boxes of each split.

    Returns:
        A row for each set; and the centred and the placed overlaps, by split and set.
    """
    rows, centred, placed = [], {split: {} for split in widths_heights}, {split: {} for split in widths_heights}
    for name, anchors in sets.items():
        of_splits = {}
        for split, boxes_wh in widths_heights.items():
            centred[split][name] = centred_iou(boxes_wh, anchors)
            placed[split][name] = placed_iou(evenly_spread(boxes_wh, PLACED_BOXES), anchors)
            of_splits[split] = {
                "boxes": len(boxes_wh),
                "centred": _rounded_values(asdict(coverage(centred[split][name]))),
                "placed": _rounded_values(asdict(coverage(placed[split][name]))),
            }
        rows.append({"name": name, **asdict(anchors), "splits": of_splits})
    return rows, centred, placed


def rejected(rejects: Sequence[Reject]) -> Numbers:
    return {
        "count": len(rejects),
        "by_reason": dict(Counter(reject.reason for reject in rejects).most_common()),
        "list": [asdict(reject) for reject in rejects],
    }


def shared(found: Sequence[Shared]) -> list[Numbers]:
    return [
        {
            "kind": each.kind,
            "split": each.split,
            "other_split": each.other_split,
            "count": len(each.ids),
            "is_leak": each.is_leak,
            "ids": list(each.ids[:LISTED_IDS]),
        }
        for each in found
    ]


def summary(values: np.ndarray) -> Numbers:
    """Count, mean, least, greatest and percentiles of at least one value."""
    percentiles = np.percentile(values, PERCENTS)
    return {
        "count": len(values),
        "mean": _rounded(values.mean()),
        "min": _rounded(values.min()),
        **{f"p{percent}": _rounded(value) for percent, value in zip(PERCENTS, percentiles, strict=True)},
        "max": _rounded(values.max()),
    }


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _rounded_values(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: _rounded(value) for name, value in numbers.items()}
