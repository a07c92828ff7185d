"""Classifiers and segmenters from shards to scores: trained for a second, judged by jobs/evaluate.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import evaluate
from mp3d.checkpoint import open_checkpoint
from mp3d.config import UNKNOWN, AugmentConfig, ClassificationHead, EvaluateConfig, SegmentationHead
from mp3d.errors import CheckpointError, ConfigError, DataError
from mp3d.evaluation import (
    ClassifiedCase,
    Predictions,
    SegmentedCase,
    chosen_threshold,
    classification_scores,
    evaluate_cases,
    num_defined,
    segmentation_scores,
)
from mp3d.evaluation.cases import most_wrong_slice
from mp3d.launch import run_training
from mp3d.predict import Predictor
from mp3d.segment import VolumeSegmenter
from tests.tiny import (
    ball_config,
    ball_series,
    ball_shards,
    classifier_config,
    detector_config,
    masked_picture_shards,
)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ball_shards(tmp_path_factory.mktemp("balls") / "shards")


@pytest.fixture(scope="module")
def nodules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ball_shards(tmp_path_factory.mktemp("nodules") / "shards", classified=True, per_split=6)


def judged(run: Path, shards: Path, out: Path, **changes) -> dict[str, float]:
    config = EvaluateConfig(checkpoint=str(run), shards=str(shards), out=str(out), runner="local")
    assert evaluate.evaluate(config.override(changes), dry_run=False) == 0
    content = json.loads((out / "metrics.json").read_text())
    assert content["num_cases"] == pq.read_metadata(out / "predictions.parquet").num_rows
    assert content["provenance"]["checkpoint"] == open_checkpoint(run).digest
    return content["metrics"]


@pytest.mark.parametrize("block", ["centre", "anywhere"])
def test_a_segmenter_learns_and_is_judged_on_whole_series(balls: Path, tmp_path: Path, block: str):
    config = ball_config(
        balls, tmp_path, SegmentationHead(dropout=0), clip__block=block, clip__num_slices=8, clip__image_size=16,
        loop__negatives=0.5, loop__steps_per_epoch=12,
    )  # fmt: skip
    run = run_training(config)
    assert open_checkpoint(run).metrics["dice"] > 0.7
    scores = judged(run, balls, tmp_path / "report", largest_component=True)
    assert scores["dice_global"] > 0.6
    assert scores["dice_per_case"] > 0.6
    assert scores["hausdorff_95_mm"] < 8
    series = ball_series(3)
    answer = VolumeSegmenter.open(run, "cpu").segment(series.volume.hu, series.volume.spacing_mm)
    true = np.stack([truth.mask for truth in series.truths if truth.mask is not None])
    assert 2 * (answer & true).sum() / (answer.sum() + true.sum()) > 0.6


def test_a_classifier_of_nodules_learns_and_its_threshold_comes_from_the_validation_split(
    nodules: Path, tmp_path: Path
):
    head = ClassificationHead(num_classes=2, label_smoothing=0)
    augment = AugmentConfig(image_sizes=(), shift_px=(1, 1), quarter_turns=True)
    config = ball_config(
        nodules, tmp_path, head, clip__num_slices=16, clip__image_size=16, clip__slice_spacing_mm=1.0,
        clip__pixel_spacing_mm=1.0, augment=augment, loop__batch_size=4,
    )  # fmt: skip
    run = run_training(config)
    assert open_checkpoint(run).metrics["auc"] == 1.0
    scores = judged(run, nodules, tmp_path / "report")
    assert (scores["auc"], scores["accuracy"], scores["sensitivity"], scores["specificity"]) == (1, 1, 1, 1)
    authors = judged(run, nodules, tmp_path / "authors", threshold="authors")
    assert authors["threshold"] in [tenth / 10 for tenth in range(10)]
    assert scores["threshold"] != authors["threshold"]


def test_pictures_are_segmented_and_their_backbone_starts_a_segmenter_of_ct(balls: Path, tmp_path: Path):
    pictures = masked_picture_shards(tmp_path / "pictures")
    head = SegmentationHead(dropout=0)
    config = classifier_config(
        pictures, tmp_path, name="proxy", model__head=head, model__backbone="resnet3d18", clip__image_size=32,
        augment__crop_scale=(0.5, 1.0), loop__epochs=3, loop__steps_per_epoch=8,
    )  # fmt: skip
    run = run_training(config)
    assert open_checkpoint(run).metrics["dice"] > 0.8
    scores = judged(run, pictures, tmp_path / "report", split="val")
    assert scores["dice_global"] > 0.8
    assert scores["hausdorff_95_mm"] is None
    with pytest.raises(CheckpointError, match="reads no blocks"):
        VolumeSegmenter.open(run)
    started = run_training(
        ball_config(balls, tmp_path, head, init_from=str(run), loop__epochs=1, loop__steps_per_epoch=1)
    )
    report = json.loads((started / "transfer.json").read_text())
    assert any("backbone.stage4" in key for key in report["moved"])
    assert any(item["key"].startswith("decoder") for item in report["reinitialised"])


def test_the_plan_of_an_evaluation(nodules: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    head = ClassificationHead(num_classes=2)
    run = run_training(ball_config(nodules, tmp_path, head, loop__epochs=1, loop__steps_per_epoch=1))
    config = EvaluateConfig(checkpoint=str(run), shards=str(nodules), out=str(tmp_path / "out"), runner="local")
    capsys.readouterr()
    assert evaluate.evaluate(config, dry_run=True) == 0
    plan = capsys.readouterr().out
    assert "trained, test  6 cases" in plan
    assert "trained, val" in plan
    assert not (tmp_path / "out").exists()
    assert evaluate.evaluate(config.override({"max_clips": 4}), dry_run=True) == 0
    assert "trained, test  4 cases" in capsys.readouterr().out  # of 6: not every second one
    with pytest.raises(ConfigError, match="--streamed, --ablations and --slices are for detectors"):
        evaluate.evaluate(config.override({"ablations": True}), dry_run=True)
    with pytest.raises(CheckpointError, match="finds no lesions"):
        Predictor.open(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip.block": "centre"}, "a detector reads whole slices"),
        ({"model.head": SegmentationHead()}, "of a CT a segmenter reads blocks"),
        ({"augment.shift_px": (1, 1)}, "are for blocks"),
        ({"augment.crop_scale": (0.5, 1.0)}, "crop_scale is for colour pictures"),
    ],
)
def test_configurations_that_cannot_be(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        detector_config(tmp_path, tmp_path).override(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment.image_sizes": (16, 24)}, "a block is not resized"),
        ({"augment.quarter_turns": True}, "needs equal sides"),
        ({"clip.num_key_slices": 3}, "set num_key_slices to 1"),
        ({"clip.block": None, "clip.pixel_spacing_mm": 1.0, "clip.num_slices": 9}, "pixel_spacing_mm is for blocks"),
    ],
)
def test_blocks_that_cannot_be(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ball_config(tmp_path, tmp_path, SegmentationHead()).override(changes)


def test_the_slice_shown_is_the_most_wrong_one():
    """Most is marked on slice 1, most is wrong on slice 3; on slice 2 nobody knows the truth."""
    true = np.zeros((5, 8, 8), np.uint8)
    true[1, :6], true[3, 0, :3] = 1, 1
    predicted = true.copy()
    assert most_wrong_slice(predicted, true) == 1
    predicted[3, 4:6] = 1
    predicted[1, 0, :5] = 0
    predicted[2], true[2] = 1, UNKNOWN
    assert most_wrong_slice(predicted, true) == 3


def test_means_over_cases_and_over_voxels():
    cases = [
        SegmentedCase("p", "a", ((10, 10, 10), (0, 0, 0)), (1.0, float("nan"))),
        SegmentedCase("p", "b", ((0, 20, 10), (0, 0, 5)), (3.0, float("nan"))),
    ]
    scores = segmentation_scores(cases)
    assert scores["dice_per_case_1"] == (1 + 0) / 2
    assert scores["dice_global_1"] == 2 * 10 / (30 + 20)
    assert scores["dice_per_case_2"] == scores["dice_global_2"] == 0
    assert scores["dice_per_case"] == 0.25
    assert scores["hausdorff_95_mm_1"] == scores["hausdorff_95_mm"] == 2
    assert np.isnan(scores["hausdorff_95_mm_2"])
    assert num_defined(cases) == {
        "dice_per_case": 2, "dice_per_case_1": 2, "dice_per_case_2": 1,
        "hausdorff_95_mm": 2, "hausdorff_95_mm_1": 2, "hausdorff_95_mm_2": 0,
    }  # fmt: skip


def test_a_threshold_of_other_cases():
    def cases(*pairs: tuple[float, int]) -> list[ClassifiedCase]:
        return [ClassifiedCase("p", "s", label, (0.0, logit)) for logit, label in pairs]

    judged_cases = cases((-2, 0), (0.5, 0), (1, 1), (3, 1))
    flattering = classification_scores(judged_cases, chosen_threshold(judged_cases))
    honest = classification_scores(judged_cases, chosen_threshold(cases((-1, 0), (0, 1))))
    assert (flattering["accuracy"], honest["accuracy"]) == (1, 0.75)
    assert honest["threshold"] == 0.5
    assert flattering["auc"] == honest["auc"] == 1
    # 1 / (1 + exp(-0.5)) = 0.622: of the tenths only 0.7 lies above it and below 0.731
    assert classification_scores(judged_cases)["threshold"] == 0.7


def test_many_classes_have_no_threshold():
    cases = [ClassifiedCase("p", "s", label, tuple(np.eye(7)[label])) for label in range(7)]
    assert classification_scores(cases) == {"top1": 1, "top5": 1}
    with pytest.raises(DataError, match="no case to judge"):
        evaluate_cases(Predictions("classification", []), "run")


def made_cases(quality: float) -> list[ClassifiedCase]:
    rng, noise = np.random.default_rng(2), np.random.default_rng(int(100 * quality))
    labels = rng.integers(0, 2, 80)
    logits = quality * (2 * labels - 1) + noise.normal(0, 1, 80)
    return [
        ClassifiedCase(f"p{i // 2}", f"s{i}", int(label), (0.0, float(x)))
        for i, (label, x) in enumerate(zip(labels, logits, strict=True))
    ]


def test_two_classifiers_are_told_apart_and_two_equal_ones_not():
    weak, strong = made_cases(0.1), made_cases(1.5)
    others = {"strong": strong, "itself": weak}
    evaluation = evaluate_cases(
        Predictions("classification", weak, {}, "key", None, {"threshold": 0.5}), "weak", others, num_replicates=300
    )
    apart, equal = evaluation.comparisons["strong"], evaluation.comparisons["itself"]
    assert apart.score == "auc"
    assert apart.p_value < 0.01
    assert apart.interval.low > 0
    assert (equal.difference, equal.p_value) == (0, 1)
    elsewhere = [replace(case, logits=(0.0, 0.2 * case.logits[1] + 4)) for case in strong]  # the same ROC curve
    again = evaluate_cases(Predictions("classification", weak), "weak", {"strong": elsewhere}, num_replicates=300)
    assert again.comparisons["strong"] == apart
    low, high = evaluation.intervals["auc"]
    assert low < evaluation.scores["auc"] < high
    assert set(evaluation.intervals) == {"top1", "auc", "accuracy", "sensitivity", "specificity", "precision", "f1"}


def test_two_segmenters_are_told_apart():
    rng = np.random.default_rng(0)
    good = [SegmentedCase(f"p{i}", f"s{i}", ((90, 100, 100),), (1.0 + i / 20,)) for i in range(20)]
    bad = [SegmentedCase(f"p{i}", f"s{i}", ((int(rng.integers(20, 60)), 100, 100),), (9.0,)) for i in range(20)]
    evaluation = evaluate_cases(Predictions("segmentation", good), "good", {"bad": bad}, num_replicates=300)
    assert evaluation.comparisons["bad"].p_value < 0.01
    assert evaluation.comparisons["bad"].interval.high < 0
    assert evaluation.intervals["dice_per_case"] == pytest.approx((0.9, 0.9))
    low, high = evaluation.intervals["hausdorff_95_mm"]
    assert low < evaluation.scores["hausdorff_95_mm"] < high
