"""Judge a detector on the annotated key slices of a split, by the authors' FROC, and write a report with pictures.

    python jobs/evaluate.py --checkpoint RUN --shards FOLDER --out reports/NAME [--split test] [--ablations]
                            [--streamed]
    ray job submit --working-dir . -- python jobs/evaluate.py --checkpoint RUN ...

Writes report.html, froc.png, metrics.json and predictions.parquet into --out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from mp3d import cli
from mp3d.checkpoint import open_checkpoint
from mp3d.config import EvaluateConfig
from mp3d.data.batches import Sample
from mp3d.data.part import quiet_ray_data
from mp3d.data.shard import open_shards
from mp3d.evaluation import (
    ABLATIONS,
    Evaluation,
    KeySlicePredictor,
    KeySliceResult,
    Variant,
    evaluate_detector,
    key_slice_samples,
    provenance_of,
    with_pictures,
    write_predictions,
)
from mp3d.launch import check_resources, connect_ray, worker_resources
from mp3d.models.stream import check_streamable
from mp3d.predict import best_mode
from mp3d.report import write_report

SAMPLES_PER_TASK = 32


def main(argv: Sequence[str] | None = None) -> int:
    command = cli.parse(EvaluateConfig, about=__doc__ or "", argv=argv)
    config = command.config
    located = {name: cli.absolute(getattr(config, name)) for name in ("checkpoint", "shards", "out")}
    return evaluate(config.override(located), dry_run=command.dry_run)


def evaluate(config: EvaluateConfig, *, dry_run: bool) -> int:
    checkpoint, shards = open_checkpoint(config.checkpoint), open_shards(config.shards)
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


def predict_here(
    config: EvaluateConfig, samples: list[Sample], variants: list[Variant]
) -> dict[Variant, list[KeySliceResult]]:
    answers = {}
    for variant in variants:
        print(f"{variant}: {len(samples)} key slices", flush=True)
        answers[variant] = KeySlicePredictor(config, variant)(samples)
    return answers


def predict_on_ray(
    config: EvaluateConfig, samples: list[Sample], variants: list[Variant]
) -> dict[Variant, list[KeySliceResult]]:
    """Ray Data: tasks of a few key slices, on a pool of actors that hold the model."""
    import ray.data

    connect_ray()
    quiet_ray_data()
    worker = worker_resources(config.cpus_per_worker, config.accelerator)
    check_resources([worker] * config.num_workers)
    tasks = [
        {"variant": variant, "start": start, "stop": min(start + SAMPLES_PER_TASK, len(samples))}
        for variant in variants
        for start in range(0, len(samples), SAMPLES_PER_TASK)
    ]
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    answered = ray.data.from_items(tasks, override_num_blocks=len(tasks)).flat_map(
        PredictionActor,  # type: ignore[arg-type]  # a class: one instance an actor
        fn_constructor_kwargs={"config": config.model_dump()},
        compute=ray.data.ActorPoolStrategy(size=config.num_workers),
        num_cpus=config.cpus_per_worker,
        num_gpus=worker.get("GPU", 0),
    )
    answers: dict[Variant, list[KeySliceResult]] = {variant: [] for variant in variants}
    for done, row in enumerate(answered.iter_rows(), 1):
        answers[row.pop("variant")].append(KeySliceResult.from_row(row))
        if done % SAMPLES_PER_TASK == 0 or done == len(samples) * len(variants):
            print(f"{done}/{len(samples) * len(variants)} key slices", flush=True)
    return answers


class PredictionActor:
    """Holds one variant of the model at a time; tasks come ordered by variant."""

    def __init__(self, config: dict) -> None:
        import torch

        self.config = EvaluateConfig.model_validate(config)
        torch.set_num_threads(max(1, int(self.config.cpus_per_worker)))
        self.predictor = KeySlicePredictor(self.config)
        self.samples = key_slice_samples(self.config, self.predictor.shards)

    def __call__(self, task: dict) -> list[dict]:
        if task["variant"] != self.predictor.variant:
            self.predictor = KeySlicePredictor(self.config, task["variant"])
        results = self.predictor(self.samples[task["start"] : task["stop"]])
        return [{"variant": task["variant"], **result.as_row()} for result in results]


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
