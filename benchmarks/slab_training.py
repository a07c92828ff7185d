"""Detectors trained on slabs beside those trained on windows, in equal steps: sensitivity on patients they never saw.

    python benchmarks/slab_training.py SHARDS RECIPE --out results/NAME --work FOLDER [--folds 2] [--seeds 1]
        [--field.of.the.recipe VALUE ...]

With ``--folds 0`` the network learns on the split ``train`` and is judged on ``test``, once for each seed. With more,
the patients of all splits are dealt into folds, each of which is judged by a network that learnt on the others. No
checkpoint is picked: the last one counts. Anchors stay as the recipe gives them.

Every network is judged on the annotated key slices as it was trained and with the whole series streamed. The intervals
are of a bootstrap over patients, those of differences of the same patients for both; seeds are averaged. FOLDER keeps
the runs, so that the command goes on where it was stopped; ``series_findings.py`` reads them too.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import cpu_model

from mp3d import recipes
from mp3d.config import EvaluateConfig, TrainConfig
from mp3d.data.shard import ShardSet, entry_as_dict, open_shards, write_manifest
from mp3d.evaluation import KeySlicePredictor, KeySliceResult, Variant, detection_samples, froc_of
from mp3d.metrics.average_precision import average_precision
from mp3d.run_folder import claim, resume_point
from mp3d.session import PlainSession
from mp3d.train import train

TRAINED_ON = {"windows": 1, "slabs": 9}
"""Key slices a clip may have."""
READ: tuple[Variant, ...] = ("trained", "streamed")
RESAMPLES = 1000
SCORES = ("sensitivity 0.5-4", "AP50")
Row = tuple[str, str]
"""What a network was trained on, and how series were read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("recipe", choices=[recipe.__name__ for recipe in recipes.FINETUNE])
    parser.add_argument("--out", type=Path, required=True, help="the study, .md and .json")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--key-slices", type=int, help="judged by each network, evenly spread; default: all")
    args, fields = parser.parse_known_args()
    torch.set_num_threads(1)
    recipe = getattr(recipes, args.recipe)().override(
        {name.removeprefix("--"): json.loads(value) for name, value in zip(fields[::2], fields[1::2], strict=True)}
    )
    shards = open_shards(args.shards)
    folds = fold_shards(shards, args.folds, args.work) if args.folds else [args.shards]
    judged_on = "val" if args.folds else "test"
    pooled: dict[Row, list[list[KeySliceResult]]] = {(on, read): [] for on in TRAINED_ON for read in READ}
    for seed in range(args.seeds):
        answers: dict[Row, list[KeySliceResult]] = {row: [] for row in pooled}
        for number, folder in enumerate(folds):
            for on, num_key_slices in TRAINED_ON.items():
                config = recipe.override(
                    {
                        "name": f"{on}_fold{number}_seed{seed}",
                        "shards": str(folder.absolute()),
                        "clip.num_key_slices": num_key_slices,
                        "model.head.anchors": "given",
                        "loop.seed": seed,
                        "loop.max_validation_clips": 8,
                        "launch.storage_path": str(args.work.absolute()),
                        "tracking.mode": "disabled",
                    }
                )
                run = trained(config)
                for read in READ:
                    answers[on, read] += judged(run, folder, judged_on, read, args.key_slices)
        for row, results in answers.items():
            pooled[row].append(results)
    write_study(args.out, recipe, shards, pooled, " ".join(["python", *map(os.path.relpath, sys.argv[:1]), *shown()]))


def shown() -> list[str]:
    """The arguments without the folders of this machine."""
    return [os.path.basename(word.rstrip("/")) if os.path.isabs(word) else word for word in sys.argv[1:]]


def fold_shards(shards: ShardSet, folds: int, work: Path) -> list[Path]:
    """Shards with the same files, the patients of one fold in the split ``val`` and all others in ``train``."""
    content = json.loads((shards.folder / "manifest.json").read_text())
    patients = sorted({entry.patient for entry in shards.entries})
    order = np.random.default_rng(0).permutation(len(patients))
    fold_of = {patients[index]: place % folds for place, index in enumerate(order.tolist())}
    folders = []
    for fold in range(folds):
        folder = work / f"shards_fold{fold}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in {entry.file for entry in shards.entries}:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to((shards.folder / name).absolute())
        entries = [
            replace(entry, split="val" if fold_of[entry.patient] == fold else "train") for entry in shards.entries
        ]
        rest = {key: value for key, value in content.items() if key not in ("format_version", "digest")}
        write_manifest(folder, {**rest, "series": [entry_as_dict(entry) for entry in entries]})
        folders.append(folder)
    return folders


def trained(config: TrainConfig) -> Path:
    """The last checkpoint of a run, which is begun or gone on with where it has not ended."""
    run = claim(Path(config.launch.storage_path) / config.name, config)
    found = resume_point(run)
    if found is None or found.epoch < config.loop.epochs:
        train(config, PlainSession(run, keep=1, device=torch.device("cpu")))
        found = resume_point(run)
    assert found is not None
    return found.path


def judged(run: Path, shards: Path, split: str, read: Variant, key_slices: int | None) -> list[KeySliceResult]:
    config = EvaluateConfig(
        checkpoint=str(run), shards=str(shards), out="", split=split, accelerator="cpu", max_clips=key_slices
    )
    predictor = KeySlicePredictor(config, read)
    results = predictor(detection_samples(config, predictor.shards))
    score = froc_of(results).mean_sensitivity
    print(f"{run.parent.name} {read}: {score:.3f} on {len(results)} key slices", flush=True)
    return results


def scores_of(results: Sequence[KeySliceResult]) -> np.ndarray:
    """Those named in SCORES."""
    precision = average_precision(
        [(each.boxes, each.scores) for each in results], [each.true_boxes for each in results]
    )
    return np.array([froc_of(results).mean_sensitivity, precision])


def resampled(pooled: Mapping[Row, list[list[KeySliceResult]]]) -> tuple[dict[Row, np.ndarray], dict[Row, np.ndarray]]:
    """Scores of all patients, and ``(RESAMPLES, scores)`` of as many patients drawn again and again, the same for all
    rows; means over the seeds.
    """
    patients = sorted({result.patient for result in next(iter(pooled.values()))[0]})
    draws = np.random.default_rng(0).integers(len(patients), size=(RESAMPLES, len(patients)))
    whole, drawn = {}, {}
    for row, seeds in pooled.items():
        whole[row] = np.mean([scores_of(results) for results in seeds], axis=0)
        of_seeds = []
        for results in seeds:
            of_patient = [[each for each in results if each.patient == patient] for patient in patients]
            of_seeds.append([scores_of([each for index in draw for each in of_patient[index]]) for draw in draws])
        drawn[row] = np.mean(of_seeds, axis=0)
    return whole, drawn


def write_study(
    out: Path, recipe: TrainConfig, shards: ShardSet, pooled: Mapping[Row, list[list[KeySliceResult]]], command: str
) -> None:
    whole, drawn = resampled(pooled)
    first = next(iter(pooled.values()))[0]
    loop, facts = recipe.loop, {"patients": len({each.patient for each in first}), "key slices": len(first)}
    facts["lesion boxes"] = sum(len(each.true_boxes) for each in first)
    facts["steps"] = loop.epochs * (loop.steps_per_epoch or 0)
    facts["clips a step"] = loop.batch_size
    facts["seeds"] = len(next(iter(pooled.values())))
    reference = ("windows", "trained")
    lines = [f"# {out.name}: trained on slabs and on windows", "", f"    {command}", ""]
    lines += [f"Data set {shards.dataset}; " + ", ".join(f"{value} {name}" for name, value in facts.items()) + "."]
    lines += [f"{recipe.model.backbone}, width {recipe.model.width:g}, {recipe.clip.image_size} pixels; {cpu_model()},"]
    lines += [f"torch {torch.__version__}. In brackets 95 % intervals over patients.", ""]
    lines += ["| trained on | series read | " + " | ".join(SCORES) + " | difference to windows, as trained |"]
    lines += ["| --- " * (len(SCORES) + 3) + "|"]
    rows = []
    for row, values in whole.items():
        intervals = np.percentile(drawn[row], (2.5, 97.5), axis=0)
        change = whole[row] - whole[reference]
        bounds = np.percentile(drawn[row] - drawn[reference], (2.5, 97.5), axis=0)
        cells = [f"{v:.3f} ({low:.3f} to {high:.3f})" for v, low, high in zip(values, *intervals, strict=True)]
        shown_change = "" if row == reference else f"{change[0]:+.3f} ({bounds[0, 0]:+.3f} to {bounds[1, 0]:+.3f})"
        read = "as trained" if row[1] == "trained" else "streamed"
        lines.append(f"| {row[0]} | {read} | " + " | ".join([*cells, shown_change]) + " |")
        rows.append(
            {
                "trained_on": row[0],
                "read": row[1],
                "scores": dict(zip(SCORES, values.tolist(), strict=True)),
                "intervals": dict(zip(SCORES, intervals.T.tolist(), strict=True)),
                "difference": dict(zip(SCORES, change.tolist(), strict=True)),
                "difference_intervals": dict(zip(SCORES, bounds.T.tolist(), strict=True)),
            }
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    study = {"command": command, "data": shards.dataset, **facts, "cpu": cpu_model(), "torch": torch.__version__}
    out.with_suffix(".json").write_text(json.dumps({**study, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
