"""Predictions of a detector to metrics: every FROC protocol side by side, intervals, strata, 3D lesions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from mp3d.checkpoint import StreamingLoss
from mp3d.evaluation.lesions_3d import Lesions3D, judge_lesions_3d
from mp3d.evaluation.prediction_file import Predictions, check_same_truth
from mp3d.evaluation.results import KeySliceResult
from mp3d.metrics.average_precision import (
    COCO_IOU_THRESHOLDS,
    average_precision,
    average_precision_replicates,
    mean_average_precision,
)
from mp3d.metrics.bootstrap import NUM_REPLICATES, Interval, interval, patient_weights
from mp3d.metrics.calibration import Calibration, calibration
from mp3d.metrics.froc import Detections, FrocResult, Matching, match, read_curve
from mp3d.metrics.froc_replicates import FrocIntervals, PairedTest, froc_intervals, paired_test, stratum_sensitivities
from mp3d.metrics.protocols import MP3D_PORT, PROTOCOLS, FrocProtocol
from mp3d.operating_points import OperatingPoints

SIZES_MM = (10.0, 30.0)
"""Where lesions are parted by size, as DeepLesion's papers do it by the long RECIST diameter."""
THIN_MM = 2.0
"""Slices that are not thicker count as thin (AlignShift)."""


COCO_REPLICATES = 200
"""Most resamples for the interval of COCO's AP, which takes ten times as long as others."""


@dataclass(frozen=True, eq=False)
class ProtocolScores:
    """One FROC protocol."""

    result: FrocResult
    intervals: FrocIntervals

    @property
    def protocol(self) -> FrocProtocol:
        return self.result.protocol


@dataclass(frozen=True)
class Stratum:
    """Some of the lesions, at the false positives of all slices.

    Attributes:
        by: what the lesions are parted by.
        mean: interval of the mean sensitivity.
    """

    by: str
    name: str
    num_lesions: int
    sensitivity_at: dict[float, float]
    mean_sensitivity: float
    mean: Interval


@dataclass(frozen=True)
class OperatingScore:
    """What a threshold chosen elsewhere does here; ``chosen_for``: the false positives per image it was chosen for."""

    chosen_for: float
    threshold: float
    sensitivity: float
    fps_per_image: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Another model on the same slices; ``test`` is of its difference from the judged one."""

    froc: FrocResult
    test: PairedTest


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One detector on one set of slices.

    Attributes:
        name: what was evaluated, e.g. the run's name.
        by_protocol: the judged protocol first.
        coco_ap: mean over the IoU thresholds 0.5 to 0.95; its interval is of the first ``coco_replicates`` resamples.
        size_is: what size of a lesion the strata mean, in words.
        operating: what the thresholds chosen on the validation split do here; empty where there are none.
        provenance: where the numbers come from: digests of checkpoint and data, config, versions, date.
        comparisons: other models, or the same one fed otherwise, on the same slices.
        lesions_3d: of predictions for whole series.
    """

    name: str
    by_protocol: Sequence[ProtocolScores]
    ap50: float
    ap50_interval: Interval
    coco_ap: float
    coco_ap_interval: Interval
    strata: Sequence[Stratum]
    size_is: str
    calibration: Calibration | None
    operating: Sequence[OperatingScore]
    results: Sequence[KeySliceResult]
    provenance: Mapping[str, str] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    lesions_3d: Lesions3D | None = None
    num_replicates: int = NUM_REPLICATES
    slices: str = "key"
    split: str = ""
    chosen_on: str = ""
    """Which slices the thresholds of ``operating`` were chosen on, in words."""

    @property
    def froc(self) -> FrocResult:
        return self.by_protocol[0].result

    @property
    def protocol(self) -> FrocProtocol:
        return self.froc.protocol

    @property
    def coco_replicates(self) -> int:
        return min(COCO_REPLICATES, self.num_replicates)

    @property
    def num_patients(self) -> int:
        return len({result.patient for result in self.results})


def evaluate_detector(
    predictions: Predictions,
    name: str = "detector",
    comparisons: Mapping[str, Sequence[KeySliceResult]] | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> Evaluation:
    """All labels taken as one class, *lesion*.

    Args:
        comparisons: the results of other models on the same slices, by name.
        num_replicates: of the bootstrap over patients.

    Raises:
        DataError: no result, none with a true box, or a comparison on other slices or another truth.
    """
    results: Sequence[KeySliceResult] = predictions.records
    comparisons = comparisons or {}
    for other_name, other in comparisons.items():
        check_same_truth(name, results, other_name, other)
    patients = [result.patient for result in results]
    matchings = {protocol.name: matching_of(results, protocol) for protocol in PROTOCOLS}
    main = matchings[MP3D_PORT.name]
    boxes, truths = boxes_of(results, MP3D_PORT)
    weights = patient_weights(patients, num_replicates, seed)
    ones = [np.ones(len(scores), int) for _, scores in boxes]
    true_ones = [np.ones(len(true), int) for true in truths]
    points = predictions.operating_point
    return Evaluation(
        name=name,
        by_protocol=[
            ProtocolScores(
                read_curve(matchings[protocol.name], protocol),
                froc_intervals(matchings[protocol.name], patients, protocol, None, num_replicates, seed),
            )
            for protocol in PROTOCOLS
        ],
        ap50=average_precision(boxes, truths),
        ap50_interval=interval(average_precision_replicates(boxes, truths, weights)),
        coco_ap=mean_average_precision(boxes, ones, truths, true_ones),
        coco_ap_interval=interval(
            np.mean(
                [
                    average_precision_replicates(boxes, truths, weights[:COCO_REPLICATES], threshold)
                    for threshold in COCO_IOU_THRESHOLDS
                ],
                axis=0,
            )
        ),
        strata=strata_of(results, main, num_replicates, seed),
        size_is=_size_in_words(results),
        calibration=calibration(main.scores, ~main.is_false_positive) if len(main.scores) else None,
        operating=operating_scores(main, OperatingPoints.from_plain(points)) if points else (),
        results=results,
        provenance=predictions.provenance,
        comparisons={
            other_name: Comparison(
                froc_of(other), paired_test(main, matching_of(other), patients, MP3D_PORT, num_replicates, seed)
            )
            for other_name, other in comparisons.items()
        },
        lesions_3d=judge_lesions_3d(predictions, num_replicates, seed) if predictions.slices == "all" else None,
        num_replicates=num_replicates,
        slices=predictions.slices,
        split=predictions.split or "",
        chosen_on=_chosen_on(OperatingPoints.from_plain(points), predictions) if points else "",
    )


def _chosen_on(points: OperatingPoints, predictions: Predictions) -> str:
    judged = predictions.provenance.get("data manifest"), predictions.split
    these = ", the very slices that are judged here" if judged == (points.data, points.split) else ""
    return f"{points.num_images} slices of split {points.split!r}{these}"


def boxes_of(results: Sequence[KeySliceResult], protocol: FrocProtocol) -> tuple[list[Detections], list[np.ndarray]]:
    """Detections and true boxes of each slice, in the unit of the protocol."""
    scales = [_scale(result) if protocol.in_mm else np.ones(4) for result in results]
    detections = [(each.boxes * scale, each.scores) for each, scale in zip(results, scales, strict=True)]
    return detections, [each.true_boxes * scale for each, scale in zip(results, scales, strict=True)]


def matching_of(results: Sequence[KeySliceResult], protocol: FrocProtocol = MP3D_PORT) -> Matching:
    """Raises: DataError, no result, or none with a true box."""
    return match(*boxes_of(results, protocol), protocol)


def froc_of(results: Sequence[KeySliceResult], protocol: FrocProtocol = MP3D_PORT) -> FrocResult:
    """Raises: DataError, no result, or none with a true box."""
    return read_curve(matching_of(results, protocol), protocol)


def operating_scores(matching: Matching, points: OperatingPoints) -> list[OperatingScore]:
    """What the thresholds of a validation split make of these slices."""
    scores = []
    for chosen_for, threshold in points.thresholds.items():
        if threshold is None:
            continue
        kept = int((matching.scores >= threshold).sum())
        found = float((matching.found_at < kept).mean())
        false = int(matching.is_false_positive[:kept].sum())
        scores.append(OperatingScore(chosen_for, threshold, found, false / matching.num_images))
    return scores


def streaming_loss(
    unstreamed: Sequence[KeySliceResult],
    streamed: Sequence[KeySliceResult],
    *,
    mode: str,
    split: str,
    data: str,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> StreamingLoss:
    """What streaming costs on the key slices of a split; attributes as of :class:`~mp3d.checkpoint.StreamingLoss`.

    Raises:
        DataError: the two are of different slices, or none has a true box.
    """
    check_same_truth("unstreamed", unstreamed, "streamed", streamed)
    patients = [result.patient for result in unstreamed]
    without, with_streaming = matching_of(unstreamed), matching_of(streamed)
    test = paired_test(with_streaming, without, patients, MP3D_PORT, num_replicates, seed)
    return StreamingLoss(
        mean_sensitivity=read_curve(without, MP3D_PORT).mean_sensitivity,
        mean_sensitivity_streamed=read_curve(with_streaming, MP3D_PORT).mean_sensitivity,
        interval=(test.interval.low, test.interval.high),
        num_key_slices=len(unstreamed),
        num_patients=len(set(patients)),
        mode=mode,
        protocol=MP3D_PORT.name,
        split=split,
        data=data,
    )


def strata_of(results: Sequence[KeySliceResult], matching: Matching, num_replicates: int, seed: int) -> list[Stratum]:
    """Sensitivity by kind of lesion (where it is known), by size (:func:`_sizes_mm`) and by slice spacing."""
    kinds = np.array([kind for result in results for kind in result.true_types])
    sizes = np.concatenate([_sizes_mm(result) for result in results])
    spacings = np.concatenate([np.full(len(result.true_boxes), result.spacing_mm[0]) for result in results])
    small, large = SIZES_MM
    parts: list[tuple[str, str, Bool[np.ndarray, " t"]]] = [
        *(("type", kind or "not known", kinds == kind) for kind in np.unique(kinds).tolist() if (kinds != "").any()),
        ("size", f"below {small:g} mm", sizes < small),
        ("size", f"{small:g} to {large:g} mm", (sizes >= small) & (sizes < large)),
        ("size", f"{large:g} mm and more", sizes >= large),
        ("slice spacing", f"up to {THIN_MM:g} mm", spacings <= THIN_MM),
        ("slice spacing", f"above {THIN_MM:g} mm", spacings > THIN_MM),
    ]
    patients = [result.patient for result in results]
    strata = []
    for by, name, lesions in parts:
        if not lesions.any():
            continue
        at = stratum_sensitivities(matching, lesions, MP3D_PORT)
        spread = froc_intervals(matching, patients, MP3D_PORT, lesions, num_replicates, seed)
        mean = float(np.mean([at[fps] for fps in MP3D_PORT.mean_over]))
        strata.append(Stratum(by, name, int(lesions.sum()), at, mean, spread.mean_sensitivity))
    return strata


def _scale(result: KeySliceResult) -> np.ndarray:
    _, row_mm, column_mm = result.spacing_mm
    return np.array([column_mm, row_mm, column_mm, row_mm])


def _sizes_mm(result: KeySliceResult) -> np.ndarray:
    """Of each lesion its long diameter; where the data set gives none, the longer side of its box."""
    boxes = result.true_boxes * _scale(result)
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
    return np.where(np.isnan(result.true_diameters_mm), sides, result.true_diameters_mm)


def _size_in_words(results: Sequence[KeySliceResult]) -> str:
    """What :func:`_sizes_mm` gives. The two differ: DeepLesion's boxes have a margin of 5 pixels on each side."""
    known = ~np.isnan(np.concatenate([result.true_diameters_mm for result in results]))
    if not known.any():
        return "the longer side of the box"
    measured = "the long diameter that the data set gives"
    return measured if known.all() else f"{measured} for {known.sum()} of {len(known)}, else the longer side of the box"
