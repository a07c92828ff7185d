"""Judge a model on a split: a detector on its annotated key slices, by the authors' FROC, with a report of pictures;
a classifier by AUC and accuracy, a segmenter by Dice and HD95, case by case.

    python jobs/evaluate.py --checkpoint RUN --shards FOLDER --out reports/NAME [--split test] [--ablations]
                            [--streamed]
    ray job submit --working-dir . -- python jobs/evaluate.py --checkpoint RUN ...

Writes metrics.json and predictions.parquet into --out, and of a detector report.html and froc.png.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mp3d import cli
from mp3d.checkpoint import Checkpoint, open_checkpoint
from mp3d.config import EvaluateConfig
from mp3d.data.part import quiet_ray_data
from mp3d.data.samples import Sample
from mp3d.data.shard import ShardSet, open_shards
from mp3d.errors import ConfigError
from mp3d.evaluation import (
    ABLATIONS,
    Case,
    CasePredictor,
    Evaluation,
    KeySlicePredictor,
    KeySliceResult,
    Variant,
    as_row,
    case_from_row,
    case_samples,
    case_scores,
    evaluate_detector,
    key_slice_samples,
    provenance_of,
    with_pictures,
    write_cases,
    write_predictions,
)
from mp3d.launch import check_resources, connect_ray, worker_resources
from mp3d.models.stream import check_streamable
from mp3d.predict import best_mode
from mp3d.report import write_report

SAMPLES_PER_TASK = 32
CASES_PER_TASK = 4


def main(argv: Sequence[str] | None = None) -> int:
    command = cli.parse(EvaluateConfig, about=__doc__ or "", argv=argv)
    config = command.config
    located = {name: cli.absolute(getattr(config, name)) for name in ("checkpoint", "shards", "out")}
    return evaluate(config.override(located), dry_run=command.dry_run)


def evaluate(config: EvaluateConfig, *, dry_run: bool) -> int:
    checkpoint, shards = open_checkpoint(config.checkpoint), open_shards(config.shards)
    if checkpoint.config.model.head.kind != "detection":
        return evaluate_cases(config, checkpoint, shards, dry_run=dry_run)
    samples = key_slice_samples(config, shards)
    variants: list[Variant] = ["trained"]
    if config.streamed:
        check_streamable(checkpoint.config.model)
        variants.append("streamed")
    if config.ablations:
        variants += ABLATIONS
    if dry_run:
        cli.print_plan(
            {
                "checkpoint": f"{checkpoint.path} (epoch {checkpoint.epoch}, {checkpoint.digest[:12]})",
                "key slices": f"{len(samples)} of split {config.split!r} of {config.shards}",
                "variants": ", ".join(variants),
                "runs on": f"{config.runner}, {config.num_workers} x {config.cpus_per_worker:g} CPU",
                "writes": config.out,
            }
        )
        return 0
    predict = predict_on_ray if config.runner == "ray" else predict_here
    answers = predict(config, samples, variants)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    provenance = provenance_of(checkpoint, shards, config)
    write_predictions(out / "predictions.parquet", answers["trained"], provenance)
    evaluation = evaluate_detector(
        with_pictures(answers["trained"], samples, shards),
        name=checkpoint.config.name,
        provenance=provenance,
        comparisons={variant: answers[variant] for variant in variants[1:]},
    )
    report = write_report(out / "report.html", evaluation)
    print_scores(evaluation)
    if config.streamed:
        streamed = evaluation.comparisons["streamed"].mean_sensitivity
        checkpoint.record_streaming(evaluation.froc.mean_sensitivity, streamed, provenance)
        print(f"whole series are read in mode {best_mode(checkpoint)} from now on")
    print(f"report: {report}")
    return 0


def evaluate_cases(config: EvaluateConfig, checkpoint: Checkpoint, shards: ShardSet, *, dry_run: bool) -> int:
    """Of a classifier or a segmenter."""
    head = checkpoint.config.model.head
    if config.streamed or config.ablations:
        raise ConfigError(f"--streamed and --ablations are for detectors; {checkpoint.path} has a {head.kind} head")
    splits = [config.split]
    if head.kind == "classification" and head.num_classes == 2 and config.threshold == "val" and config.split != "val":
        splits.append("val")
    samples = {split: case_samples(config, checkpoint.config.model, shards, split) for split in splits}
    if dry_run:
        cli.print_plan(
            {
                "checkpoint": f"{checkpoint.path} (epoch {checkpoint.epoch}, {checkpoint.digest[:12]})",
                **{f"cases of {split!r}": f"{len(found)} of {config.shards}" for split, found in samples.items()},
                "runs on": f"{config.runner}, {config.num_workers} x {config.cpus_per_worker:g} CPU",
                "writes": config.out,
            }
        )
        return 0
    predict = cases_on_ray if config.runner == "ray" else cases_here
    cases = predict(config, samples)
    scores = case_scores(cases[config.split], None if config.threshold == "authors" else cases[splits[-1]])
    write_cases(Path(config.out), cases[config.split], scores, provenance_of(checkpoint, shards, config))
    print(f"{len(cases[config.split])} cases of split {config.split!r}")
    for name, value in scores.items():
        print(f"{name:<24}{value:>8.3f}")
    print(f"metrics: {Path(config.out) / 'metrics.json'}")
    return 0


def predict_here(
    config: EvaluateConfig, samples: list[Sample], variants: list[Variant]
) -> dict[Variant, list[KeySliceResult]]:
    answers = {}
    for variant in variants:
        print(f"{variant}: {len(samples)} key slices", flush=True)
        answers[variant] = KeySlicePredictor(config, variant)(samples)
    return answers


def cases_here(config: EvaluateConfig, samples: dict[str, list[Sample]]) -> dict[str, list[Case]]:
    predictor = CasePredictor(config)
    return {split: predictor(found) for split, found in samples.items()}


def predict_on_ray(
    config: EvaluateConfig, samples: list[Sample], variants: list[Variant]
) -> dict[Variant, list[KeySliceResult]]:
    tasks = [
        {"variant": variant, "start": start, "stop": min(start + SAMPLES_PER_TASK, len(samples))}
        for variant in variants
        for start in range(0, len(samples), SAMPLES_PER_TASK)
    ]
    answers: dict[Variant, list[KeySliceResult]] = {variant: [] for variant in variants}
    for row in rows_on_ray(config, PredictionActor, tasks, len(samples) * len(variants), "key slices"):
        answers[row.pop("variant")].append(KeySliceResult.from_row(row))
    return answers


def cases_on_ray(config: EvaluateConfig, samples: dict[str, list[Sample]]) -> dict[str, list[Case]]:
    tasks = [
        {"split": split, "start": start, "stop": min(start + CASES_PER_TASK, len(found))}
        for split, found in samples.items()
        for start in range(0, len(found), CASES_PER_TASK)
    ]
    answers: dict[str, list[Case]] = {split: [] for split in samples}
    for row in rows_on_ray(config, CaseActor, tasks, sum(map(len, samples.values())), "cases"):
        answers[row.pop("split")].append(case_from_row(row))
    return answers


def rows_on_ray(
    config: EvaluateConfig, actor: type, tasks: list[dict[str, Any]], total: int, what: str
) -> Iterator[dict[str, Any]]:
    """Ray Data: the answers to small tasks, in their order, by a pool of actors that hold the model."""
    import ray.data

    connect_ray()
    quiet_ray_data()
    worker = worker_resources(config.cpus_per_worker, config.accelerator)
    check_resources([worker] * config.num_workers)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    answered = ray.data.from_items(tasks, override_num_blocks=len(tasks)).flat_map(
        actor,  # type: ignore[arg-type]  # a class: one instance an actor
        fn_constructor_kwargs={"config": config.model_dump()},
        compute=ray.data.ActorPoolStrategy(size=config.num_workers),
        num_cpus=config.cpus_per_worker,
        num_gpus=worker.get("GPU", 0),
    )
    for done, row in enumerate(answered.iter_rows(), 1):
        yield row
        if done % SAMPLES_PER_TASK == 0 or done == total:
            print(f"{done}/{total} {what}", flush=True)


class PredictionActor:
    """Holds one variant of the model at a time; tasks come ordered by variant."""

    def __init__(self, config: dict) -> None:
        self.config = _config_of_actor(config)
        self.predictor = KeySlicePredictor(self.config)
        self.samples = key_slice_samples(self.config, self.predictor.shards)

    def __call__(self, task: dict) -> list[dict]:
        if task["variant"] != self.predictor.variant:
            self.predictor = KeySlicePredictor(self.config, task["variant"])
        results = self.predictor(self.samples[task["start"] : task["stop"]])
        return [{"variant": task["variant"], **result.as_row()} for result in results]


class CaseActor:
    """Holds the model."""

    def __init__(self, config: dict) -> None:
        self.config = _config_of_actor(config)
        self.predictor = CasePredictor(self.config)
        self.model = open_checkpoint(self.config.checkpoint).config.model

    def __call__(self, task: dict) -> list[dict]:
        samples = case_samples(self.config, self.model, self.predictor.shards, task["split"])
        cases = self.predictor(samples[task["start"] : task["stop"]])
        return [{"split": task["split"], **as_row(case)} for case in cases]


def _config_of_actor(config: dict) -> EvaluateConfig:
    import torch

    validated = EvaluateConfig.model_validate(config)
    torch.set_num_threads(max(1, int(validated.cpus_per_worker)))
    return validated


def print_scores(evaluation: Evaluation) -> None:
    """The headline table, one line a variant."""
    rates = evaluation.protocol.fps_per_image
    print(f"protocol {evaluation.protocol.name}, {evaluation.froc.num_images} key slices, AP50 {evaluation.ap50:.3f}")
    print(f"{'sensitivity at':<24}" + "".join(f"{rate:>8g}" for rate in rates) + f"{'mean':>8}")
    for name, froc in {"trained": evaluation.froc, **evaluation.comparisons}.items():
        shown = "".join(f"{froc.sensitivity_at[rate]:>8.3f}" for rate in rates)
        print(f"{name:<24}{shown}{froc.mean_sensitivity:>8.3f}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
