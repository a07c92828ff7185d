"""Judge a model on a split, or the predictions that one made, with a report of pictures: a detector on its annotated
key slices, or on every slice (--slices all), by every FROC protocol; a classifier by AUC and accuracy, a segmenter by
Dice and HD95, case by case. Intervals resample patients.

    python jobs/evaluate.py --checkpoint RUN --shards FOLDER --out reports/NAME [--split test] [--slices all]
                            [--ablations] [--streamed] [--compare OTHER/predictions.parquet]
    python jobs/evaluate.py --predictions reports/NAME/predictions.parquet --out reports/AGAIN [--shards FOLDER]
    ray job submit --working-dir . -- python jobs/evaluate.py --checkpoint RUN ...

Writes predictions.parquet, metrics.json, report.html and the figures as PNG into --out. A detector's operating points
are chosen on the validation split and kept beside the checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mp3d import cli
from mp3d.actors import answers_of_actors
from mp3d.checkpoint import MIN_STREAMING_PATIENTS, Checkpoint, open_checkpoint
from mp3d.config import EvaluateConfig
from mp3d.data.samples import Sample
from mp3d.data.shard import ShardSet, open_shards
from mp3d.errors import ConfigError, DataError
from mp3d.evaluation import (
    ABLATIONS,
    CaseEvaluation,
    CasePredictor,
    ClassifiedCase,
    Evaluation,
    KeySlicePredictor,
    Pictures,
    Predictions,
    Record,
    SeriesPredictor,
    Variant,
    case_samples,
    chosen_threshold,
    detection_samples,
    evaluate_cases,
    evaluate_detector,
    froc_of,
    provenance_of,
    read_predictions,
    streaming_loss,
    write_predictions,
)
from mp3d.evaluation.prediction_file import RECORDS, Head
from mp3d.models.stream import check_streamable
from mp3d.operating_points import OperatingPoints, keep_operating_points, read_operating_points
from mp3d.predict import best_mode, trained_mode
from mp3d.report import of_cases, write_case_report, write_report
from mp3d.tracking import track_report

SAMPLES_PER_TASK = 32
CASES_PER_TASK = 4
OF_WHOLE_SERIES: tuple[Variant, ...] = ("unstreamed", "streamed")
"""Variants that read a series through for its key slices."""


@dataclass(frozen=True)
class Part:
    """Samples of one split, answered by one variant of the model."""

    variant: Variant
    split: str
    samples: list[Sample]


def main(argv: Sequence[str] | None = None) -> int:
    command = cli.parse(EvaluateConfig, about=__doc__ or "", argv=argv)
    config = command.config
    named = ("checkpoint", "shards", "predictions", "compare", "out")
    located = {name: cli.absolute(path) for name in named if (path := getattr(config, name)) is not None}
    return evaluate(config.override(located), dry_run=command.dry_run)


def evaluate(config: EvaluateConfig, *, dry_run: bool) -> int:
    others = {}
    if config.compare:
        other = read_predictions(Path(config.compare))
        others[f"compared: {other.provenance.get('run', 'unnamed')}"] = other
    shards = open_shards(config.shards) if config.shards else None
    if config.predictions is not None:
        predictions = read_predictions(Path(config.predictions))
        config = config.override({"split": predictions.split or config.split})
        if dry_run:
            plan = {"predictions": config.predictions, "split": config.split, "records": len(predictions.records)}
            cli.print_plan({**plan, "out": config.out})
            return 0
        report(config, predictions, predictions.provenance.get("run", "predictions"), others, shards)
        return 0
    checkpoint = open_checkpoint(config.checkpoint or "")
    if shards is None:
        raise ConfigError("a checkpoint is judged on data: give --shards")
    parts = planned(config, checkpoint, shards)
    if dry_run:
        cli.print_plan(
            {
                "checkpoint": f"{checkpoint.path} (epoch {checkpoint.epoch}, {checkpoint.digest[:12]})",
                **{f"{p.variant}, {p.split}": f"{len(p.samples)} {_what(config, checkpoint)}" for p in parts},
                "runs on": f"{config.runner}, {config.num_workers} x {config.cpus_per_worker:g} CPU",
                "writes": config.out,
            }
        )
        return 0
    head: Head = checkpoint.config.model.head.kind
    answers = (on_ray if config.runner == "ray" else here)(config, head, parts)
    trained = answers["trained", config.split]
    point = chosen_on_validation(config, checkpoint, shards, answers)
    predictions = Predictions(
        head=head,
        records=trained,
        provenance=provenance_of(checkpoint, shards, config),
        slices=config.slices,
        grid_spacing_mm=checkpoint.config.clip.slice_spacing_mm if config.slices == "all" else None,
        operating_point=point,
    )
    write_predictions(Path(config.out) / "predictions.parquet", predictions)
    shown = [p for p in parts if p.split == config.split and p.variant not in ("trained", "unstreamed")]
    variants = {p.variant: Predictions(head, answers[p.variant, p.split]) for p in shown}
    report(config, predictions, checkpoint.config.name, {**variants, **others}, shards)
    if config.streamed:
        keep_streaming_loss(config, checkpoint, shards, answers)
    return 0


def planned(config: EvaluateConfig, checkpoint: Checkpoint, shards: ShardSet) -> list[Part]:
    """What is to be answered: the judged split, the validation split where something is chosen on it, the variants."""
    model = checkpoint.config.model
    if model.head.kind != "detection":
        if config.streamed or config.ablations or config.slices == "all":
            told = "--streamed, --ablations and --slices are for detectors"
            raise ConfigError(f"{told}; {checkpoint.path} has a {model.head.kind} head")
        splits = [config.split]
        two_classes = model.head.kind == "classification" and model.head.num_classes == 2
        if two_classes and config.threshold == "val" and config.split != "val":
            splits.append("val")
        return [Part("trained", split, case_samples(config, model, shards, split)) for split in splits]
    samples = detection_samples(config, shards)
    parts = [Part("trained", config.split, samples)]
    if config.streamed:
        check_streamable(model)
        parts.append(Part("streamed", config.split, samples))
    if config.ablations:
        parts += [Part(variant, config.split, samples) for variant in ABLATIONS]
    if config.choose_on in ("train", "test"):
        raise ConfigError(
            f"choose_on is {config.choose_on!r}; thresholds are chosen on slices that the network has not learnt from "
            "and that are not reported: val"
        )
    if config.slices == "key" and config.max_clips is None:
        needed: set[Variant] = set(OF_WHOLE_SERIES) if config.streamed else set()
        if not read_operating_points(checkpoint):
            needed.add("trained")
        needed -= {part.variant for part in parts if part.split == config.choose_on}
        validation = _validation_samples(config, shards) if needed else []
        parts += [Part(variant, config.choose_on, validation) for variant in sorted(needed) if validation]
    return parts


def _validation_samples(config: EvaluateConfig, shards: ShardSet) -> list[Sample]:
    try:
        return detection_samples(config, shards, config.choose_on)
    except DataError as error:
        print(f"nothing is chosen on split {config.choose_on!r}: {error}")
        return []


def chosen_on_validation(
    config: EvaluateConfig, checkpoint: Checkpoint, shards: ShardSet, answers: dict[tuple[str, str], list[Record]]
) -> dict[str, Any] | None:
    """The operating point that goes with the predictions; a detector's are kept beside the checkpoint."""
    head = checkpoint.config.model.head
    if head.kind == "classification" and head.num_classes == 2 and config.threshold == "val":
        cases = [case for case in answers["trained", "val"] if isinstance(case, ClassifiedCase)]
        return {"threshold": chosen_threshold(cases), "chosen_on": f"split 'val', {len(cases)} cases"}
    if head.kind != "detection":
        return None
    validation = answers.get(("trained", config.choose_on))
    if config.slices == "key" and validation and config.max_clips is not None:
        print("note: no operating points are chosen: --max-clips judges only some of the slices")
    elif config.slices == "key" and validation:
        points = OperatingPoints.of(froc_of(validation), checkpoint.digest, config.choose_on, shards.digest)  # type: ignore[arg-type]
        keep_operating_points(checkpoint, points)
        print(f"operating points chosen on {points.num_images} slices of split {points.split!r}, kept beside the model")
    points = read_operating_points(checkpoint)
    return points.as_plain() if points else None


def keep_streaming_loss(
    config: EvaluateConfig, checkpoint: Checkpoint, shards: ShardSet, answers: dict[tuple[str, str], list[Record]]
) -> None:
    """Beside the checkpoint, what streaming costs on the validation split."""
    unstreamed, streamed = (answers.get((variant, config.choose_on)) for variant in OF_WHOLE_SERIES)
    if unstreamed is None or streamed is None:
        why = "--max-clips judges only some of the slices" if config.max_clips else "nothing was judged for it"
        print(f"note: how whole series are read stays as it is: {why}")
        return
    mode = trained_mode(checkpoint.config.clip)
    loss = streaming_loss(
        unstreamed,  # type: ignore[arg-type]
        streamed,  # type: ignore[arg-type]
        mode=mode,
        split=config.choose_on,
        data=shards.digest,
        num_replicates=config.replicates,
        seed=config.seed,
    )
    checkpoint.record_streaming(loss, provenance_of(checkpoint, shards, config.override({"split": loss.split})))
    low, high = loss.interval
    print(
        f"streaming costs {loss.mean_sensitivity_lost:+.3f} [{low:+.3f}, {high:+.3f}] of the mean sensitivity "
        f"{loss.mean_sensitivity:.3f} in mode {mode}, on {loss.num_key_slices} key slices of split {loss.split!r}; "
        f"whole series are read in mode {best_mode(checkpoint)} from now on"
    )
    if loss.num_patients < MIN_STREAMING_PATIENTS:
        print(f"note: it is of {loss.num_patients} patients; on fewer than {MIN_STREAMING_PATIENTS} it decides nothing")


def report(
    config: EvaluateConfig, predictions: Predictions, name: str, others: dict[str, Predictions], shards: ShardSet | None
) -> Evaluation | CaseEvaluation:
    """Metrics, page and pictures of predictions."""
    for other_name, other in others.items():
        if other.head != predictions.head:
            raise DataError(f"{other_name!r} is of a {other.head} head, the judged one of a {predictions.head} head")
    records = {other_name: other.records for other_name, other in others.items()}
    path, pictures = Path(config.out) / "report.html", Pictures(shards, config.split) if shards else None
    if pictures is not None:
        pictures.check_holds(predictions.records)
    if predictions.head == "detection":
        evaluation = evaluate_detector(predictions, name, records, config.replicates, config.seed)
        files = write_report(path, evaluation, pictures.key_slice if pictures else None)
        print_scores(evaluation)
    else:
        classes = shards.class_names if shards else ()
        evaluation = evaluate_cases(predictions, name, records, classes, config.replicates, config.seed)
        of = (pictures.classified, pictures.segmented) if pictures else (None, None)
        files = write_case_report(path, evaluation, *of)
        print_case_scores(evaluation, config.split)
    track_report(config.tracking, name, Path(config.out), files.numbers, files.pictures)
    print(f"report: {path}")
    return evaluation


def here(config: EvaluateConfig, head: Head, parts: Sequence[Part]) -> dict[tuple[str, str], list[Record]]:
    answers = {}
    for part in parts:
        print(f"{part.variant}, split {part.split!r}: {len(part.samples)} to answer", flush=True)
        answers[part.variant, part.split] = list(_predictor(config, head, part.variant)(part.samples))
    return answers


def on_ray(config: EvaluateConfig, head: Head, parts: Sequence[Part]) -> dict[tuple[str, str], list[Record]]:
    """Ray Data: a pool of actors that hold the model; tasks come ordered by variant and split."""
    per_task = SAMPLES_PER_TASK if head == "detection" and config.slices == "key" else CASES_PER_TASK
    tasks = [
        {"variant": p.variant, "split": p.split, "start": start, "stop": stop}
        for p in parts
        for start, stop in pieces(p, per_task)
    ]
    answers: dict[tuple[str, str], list[Record]] = {(p.variant, p.split): [] for p in parts}
    rows = answers_of_actors(
        PredictionActor,
        {"config": config.model_dump(), "head": head},
        tasks,
        num_workers=config.num_workers,
        cpus_per_worker=config.cpus_per_worker,
        accelerator=config.accelerator,
    )
    for done, row in enumerate(rows, 1):
        answers[row.pop("variant"), row.pop("split")].append(RECORDS[head].from_row(row))
        if done % SAMPLES_PER_TASK == 0:
            print(f"{done} answered", flush=True)
    return answers


def pieces(part: Part, per_task: int) -> list[tuple[int, int]]:
    """Where the samples of a part begin and end that make a task; series that are read as a whole are not cut."""
    starts = [0]
    for place in range(1, len(part.samples)):
        goes_on = part.variant in OF_WHOLE_SERIES and part.samples[place].entry == part.samples[place - 1].entry
        if place - starts[-1] >= per_task and not goes_on:
            starts.append(place)
    return list(pairwise([*starts, len(part.samples)]))


class PredictionActor:
    """Holds one variant of the model at a time."""

    def __init__(self, settings: dict) -> None:
        import torch

        self.config, self.head = EvaluateConfig.model_validate(settings["config"]), settings["head"]
        torch.set_num_threads(max(1, int(self.config.cpus_per_worker)))
        self.predictor = _predictor(self.config, self.head, "trained")
        self.model = open_checkpoint(self.config.checkpoint or "").config.model
        self.variant = "trained"

    def __call__(self, task: dict) -> list[dict]:
        if task["variant"] != self.variant:
            self.variant = task["variant"]
            self.predictor = _predictor(self.config, self.head, self.variant)
        shards = self.predictor.shards
        samples = (
            detection_samples(self.config, shards, task["split"])
            if self.head == "detection"
            else case_samples(self.config, self.model, shards, task["split"])
        )
        records = self.predictor(samples[task["start"] : task["stop"]])
        return [{"variant": task["variant"], "split": task["split"], **record.as_row()} for record in records]


def _predictor(
    config: EvaluateConfig, head: Head, variant: Variant
) -> CasePredictor | SeriesPredictor | KeySlicePredictor:
    if head != "detection":
        return CasePredictor(config)
    return SeriesPredictor(config) if config.slices == "all" else KeySlicePredictor(config, variant)


def _what(config: EvaluateConfig, checkpoint: Checkpoint) -> str:
    kind = checkpoint.config.model.head.kind
    return ("series" if config.slices == "all" else "key slices") if kind == "detection" else "cases"


def print_scores(evaluation: Evaluation) -> None:
    """The headline tables: the judged protocol, a line a variant; then every protocol's mean."""
    rates = evaluation.protocol.fps_per_image
    print(
        f"protocol {evaluation.protocol.name}, {evaluation.froc.num_images} slices of {evaluation.num_patients} "
        f"patients, AP50 {evaluation.ap50:.3f}, AP50:95 {evaluation.coco_ap:.3f}"
    )
    print(f"{'sensitivity at':<24}" + "".join(f"{rate:>8g}" for rate in rates) + f"{'mean':>8}")
    for name, froc in {"trained": evaluation.froc, **{n: c.froc for n, c in evaluation.comparisons.items()}}.items():
        shown = "".join(f"{froc.sensitivity_at[rate]:>8.3f}" for rate in rates)
        print(f"{name:<24}{shown}{froc.mean_sensitivity:>8.3f}")
    for scores in evaluation.by_protocol:
        low, high = scores.intervals.mean_sensitivity
        print(f"{scores.protocol.name:<24}mean {scores.result.mean_sensitivity:.3f} [{low:.3f}, {high:.3f}]")
    if evaluation.lesions_3d is not None:
        low, high = evaluation.lesions_3d.intervals.mean_sensitivity
        value = evaluation.lesions_3d.result.mean_sensitivity
        print(f"{evaluation.lesions_3d.result.protocol.name:<24}mean {value:.3f} [{low:.3f}, {high:.3f}]")
    for name, comparison in evaluation.comparisons.items():
        test = comparison.test
        print(
            f"{name}: difference {test.difference:+.3f} [{test.interval.low:+.3f}, {test.interval.high:+.3f}], "
            f"p = {test.p_value:.3f}"
        )


def print_case_scores(evaluation: CaseEvaluation, split: str) -> None:
    """A line a score, with its interval."""
    print(f"{len(evaluation.cases)} cases of split {split!r}")
    for name, value in evaluation.scores.items():
        spread = evaluation.intervals.get(name)
        told = f", {of_cases(evaluation, name)}" if name in evaluation.num_defined else ""
        print(f"{name:<24}{value:>8.3f}" + (f" [{spread.low:.3f}, {spread.high:.3f}]" if spread else "") + told)
    for name, other in evaluation.comparisons.items():
        print(f"{name}: {other.score} {other.value:.3f}, difference {other.difference:+.3f}, p = {other.p_value:.3f}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
