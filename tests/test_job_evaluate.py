"""jobs/evaluate.py on a tiny detector of slabs: what is judged, on which split, and what is kept of it."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.evaluate import Part, evaluate, pieces
from mp3d.checkpoint import STREAMING, open_checkpoint, save_checkpoint
from mp3d.config import ClipConfig, EvaluateConfig
from mp3d.data.samples import Sample
from mp3d.data.series import Volume
from mp3d.data.shard import decode_image, open_shards
from mp3d.errors import ConfigError, DataError
from mp3d.evaluation import (
    KeySlicePredictor,
    Predictions,
    SeriesPredictor,
    answers_for,
    detection_samples,
    evaluate_detector,
    froc_of,
)
from mp3d.models import build_model
from mp3d.operating_points import read_operating_points
from mp3d.predict import Predictor
from mp3d.sample import Clip
from tests.test_evaluation import CPU, BrightestSlice
from tests.tiny import ct_shards, detector_config


@pytest.fixture(scope="module")
def slab_run(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """A tiny detector of slabs, as initialised, and the shards that it is judged on."""
    folder = tmp_path_factory.mktemp("slab")
    config = detector_config(ct_shards(folder / "shards"), folder, clip__num_key_slices=9)
    torch.manual_seed(0)
    (folder / "c").mkdir()
    save_checkpoint(
        folder / "c",
        config=config,
        model_state=build_model(config.model, config.clip).state_dict(),
        epoch=1,
        score=0,
        metrics={},
    )
    return EvaluateConfig(
        checkpoint=str(folder / "c"), shards=config.shards, out=str(folder / "out"), runner="local", streamed=True
    )


def test_streamed_answers_are_those_of_the_whole_series(slab_run: EvaluateConfig):
    shards = open_shards(slab_run.shards)
    samples = detection_samples(slab_run, shards)
    predictor = KeySlicePredictor(slab_run, "streamed")
    results = predictor(samples)
    trained = KeySlicePredictor(slab_run)(samples)
    assert [(r.series, r.z_index) for r in results] == [(s.entry.series, s.row) for s in samples]
    for sample, result, other in zip(samples, results, trained, strict=True):
        np.testing.assert_array_equal(result.true_boxes, other.true_boxes)
        hu = np.stack([decode_image(row) for row in shards.iter_rows(sample.entry)])
        whole = torch.from_numpy(np.pad(hu, ((4, 4), (0, 0), (0, 0)), mode="edge"))
        with torch.no_grad():
            (expected,) = predictor.model([Clip(whole, (sample.row + 4,))])
        np.testing.assert_allclose(result.scores, expected["scores"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(result.boxes, expected["boxes"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spacing_mm", [0.7, 1.0, 2.0, 2.5, 5.0])
def test_a_series_is_streamed_once_for_all_its_key_slices(spacing_mm: float):
    """On the grid that begins at its first slice; each key slice has the answer of the position nearest to it."""

    class Centred(Predictor):
        def answers(self, hu, grid, at_once=None):
            grids.append(grid)
            yield [{"scores": torch.tensor([position])} for position in grid.positions]

    grids = []
    predictor = Centred(BrightestSlice(), ClipConfig(), 0.5, CPU)
    wanted = [0, 3, 4, 8, 12, 13, 15, 19]
    answers = answers_for(predictor, np.zeros((20, 4, 4), np.int16), spacing_mm, wanted)
    (grid,) = grids
    assert grid.positions[0] == 0
    assert list(answers) == wanted
    for number, answer in answers.items():
        distances = np.abs(grid.positions - number)
        assert abs(float(answer["scores"]) - number) == pytest.approx(distances.min())
        assert distances.min() * spacing_mm <= 2.5 / 2 or number == 19  # beyond the last position


def test_so_many_key_slices_are_judged_as_were_asked_for(slab_run: EvaluateConfig):
    shards = open_shards(slab_run.shards or "")
    there = detection_samples(slab_run, shards)
    for number in range(1, len(there) + 2):
        chosen = detection_samples(slab_run.override({"max_clips": number}), shards)
        assert len(chosen) == min(number, len(there))
        assert [sample for sample in there if sample in chosen] == chosen


def test_tasks_cut_no_series_that_is_streamed(slab_run: EvaluateConfig):
    (first, second, *_) = open_shards(slab_run.shards or "").entries
    samples = [Sample(first, row) for row in range(5)] + [Sample(second, row) for row in range(2)]
    assert pieces(Part("trained", "val", samples), 3) == [(0, 3), (3, 6), (6, 7)]
    assert pieces(Part("streamed", "val", samples), 3) == [(0, 5), (5, 7)]
    assert pieces(Part("streamed", "val", samples), 1) == [(0, 5), (5, 7)]
    assert pieces(Part("streamed", "val", samples), 9) == [(0, 7)]


def test_evaluating_writes_down_what_streaming_costs(slab_run: EvaluateConfig, capsys: pytest.CaptureFixture[str]):
    assert evaluate(slab_run, dry_run=False) == 0
    said = capsys.readouterr().out
    checkpoint = open_checkpoint(slab_run.checkpoint)
    found = json.loads((checkpoint.path / STREAMING).read_text())
    metrics = json.loads((Path(slab_run.out) / "metrics.json").read_text())
    assert set(metrics["comparisons"]) == {"streamed"}  # on the judged split it is shown, on val it is measured
    predictor = KeySlicePredictor(slab_run)
    samples = detection_samples(slab_run, predictor.shards, "val")
    for variant, name in (("unstreamed", "mean_sensitivity"), ("streamed", "mean_sensitivity_streamed")):
        expected = froc_of(KeySlicePredictor(slab_run, variant)(samples)).mean_sensitivity
        assert found[name] == pytest.approx(expected)
    assert found["mean_sensitivity_lost"] == found["mean_sensitivity"] - found["mean_sensitivity_streamed"]
    low, high = found["interval"]
    assert low <= found["mean_sensitivity_lost"] <= high
    assert (found["split"], found["data"], found["num_key_slices"]) == ("val", predictor.shards.digest, len(samples))
    assert (found["mode"], found["checkpoint"]) == ("slab", checkpoint.digest)
    mode = "stream" if checkpoint.may_be_streamed() else "slab"
    assert f"whole series are read in mode {mode}" in said
    assert "on fewer than 10 it decides nothing" in said


def test_unstreamed_key_slices_lie_where_they_do_in_the_slabs_of_a_series(slab_run: EvaluateConfig):
    """Their answers are those that predict has in mode slab, not those of a clip with the key slice in its middle."""
    shards = open_shards(slab_run.shards or "")
    samples = detection_samples(slab_run, shards)
    judge = KeySlicePredictor(slab_run, "unstreamed")
    results = judge(samples)
    assert {sample.row % 9 for sample in samples} != {4}
    predictor = replace(Predictor.open(slab_run.checkpoint or "", "cpu", "slab"), nms_iou=1.0)
    for sample, result in zip(samples, results, strict=True):
        hu = np.stack([decode_image(row) for row in shards.iter_rows(sample.entry)])
        volume = Volume(hu, np.diag([*sample.entry.spacing_mm[::-1], 1.0]))
        findings = [each for each in predictor.find_lesions(volume, 0.0) if each.slice_index == sample.row]
        expected = sorted(each.score for each in findings)
        np.testing.assert_allclose(sorted(result.scores), expected, rtol=1e-5)
    windows = KeySlicePredictor(slab_run)(samples)
    assert any(
        len(one.scores) != len(other.scores) or not np.allclose(one.scores, other.scores, rtol=1e-5)
        for one, other in zip(results, windows, strict=True)
    )


def test_streaming_is_not_judged_on_a_few_slices_nor_without_a_validation_split(
    slab_run: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = open_checkpoint(slab_run.checkpoint or "").path / STREAMING
    before = path.read_bytes() if path.exists() else b""
    for number, (changes, why) in enumerate(
        (({"max_clips": 1}, "--max-clips judges only"), ({"choose_on": "other"}, "nothing was judged for it"))
    ):
        assert evaluate(slab_run.override({**changes, "out": str(tmp_path / str(number))}), dry_run=False) == 0
        assert f"note: how whole series are read stays as it is: {why}" in capsys.readouterr().out
    assert (path.read_bytes() if path.exists() else b"") == before


def test_operating_points_are_chosen_on_the_validation_split_and_kept(slab_run: EvaluateConfig, tmp_path: Path):
    checkpoint = open_checkpoint(slab_run.checkpoint or "")
    points = read_operating_points(checkpoint)  # the evaluation before chose them
    assert points is not None
    assert (points.split, points.checkpoint) == ("val", checkpoint.digest)
    predictor = KeySlicePredictor(slab_run)
    validation = predictor(detection_samples(slab_run, predictor.shards, "val"))
    expected = evaluate_detector(Predictions("detection", validation), num_replicates=100).froc
    assert points.sensitivity == pytest.approx(expected.sensitivity_at)
    assert points.num_images == len(validation)
    metrics = json.loads((Path(slab_run.out) / "metrics.json").read_text())
    for point in metrics["operating_points"]:
        assert point["threshold"] == points.thresholds[point["chosen_for"]]


def test_predictions_are_judged_again_without_the_checkpoint(slab_run: EvaluateConfig, tmp_path: Path):
    """The same numbers from the file alone; beside itself a model is not told apart."""
    file = str(Path(slab_run.out) / "predictions.parquet")
    again = EvaluateConfig(predictions=file, compare=file, out=str(tmp_path / "again"), runner="local")
    assert evaluate(again, dry_run=False) == 0
    first, second = (json.loads((Path(of) / "metrics.json").read_text()) for of in (slab_run.out, again.out))
    for name in (
        "froc",
        "protocols",
        "ap50",
        "ap50_interval",
        "ap50_95_interval",
        "strata",
        "calibration",
        "operating_points",
    ):
        assert second[name] == first[name]
    (comparison,) = second["comparisons"].values()
    assert (comparison["difference"], comparison["p_value"]) == (0, 1)
    assert second["provenance"]["checkpoint"] == open_checkpoint(slab_run.checkpoint or "").digest


def test_predictions_are_of_the_split_that_their_file_names(
    slab_run: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Judged again beside the shards, with nothing said of the split, those of val find their pictures in val."""
    of_val = slab_run.override({"split": "val", "streamed": False, "out": str(tmp_path / "val")})
    assert evaluate(of_val, dry_run=False) == 0
    file = str(tmp_path / "val" / "predictions.parquet")
    again = EvaluateConfig(predictions=file, shards=slab_run.shards, out=str(tmp_path / "again"), runner="local")
    assert evaluate(again, dry_run=False) == 0
    page = (tmp_path / "again" / "report.html").read_text()
    assert "Their slices are not at hand" not in page
    assert page.count("close-up") == (tmp_path / "val" / "report.html").read_text().count("close-up") > 0
    capsys.readouterr()
    assert evaluate(again, dry_run=True) == 0
    assert re.search(r"split +val\n", capsys.readouterr().out)
    elsewhere = again.override({"shards": str(ct_shards(tmp_path / "others", id_key=b"another" * 4))})
    with pytest.raises(DataError, match="split 'val' of .* holds nothing that the predictions are of"):
        evaluate(elsewhere, dry_run=False)


def test_every_slice_of_searched_series_is_judged(slab_run: EvaluateConfig, tmp_path: Path):
    config = slab_run.override({"slices": "all", "streamed": False, "out": str(tmp_path / "all")})
    assert evaluate(config, dry_run=False) == 0
    metrics = json.loads((tmp_path / "all" / "metrics.json").read_text())
    shards = open_shards(config.shards or "")
    assert metrics["num_images"] == sum(entry.num_rows for entry in shards.split("test"))
    assert metrics["lesions_3d"]["protocol"] == "LENS 3D"
    answers = SeriesPredictor(config)(detection_samples(config, shards))
    assert [answer.z_index for answer in answers[:3]] == [0, 1, 2]
    with pytest.raises(ValueError, match="ablations and streamed are for key slices"):
        config.override({"streamed": True})
    with pytest.raises(ValueError, match="either checkpoint or predictions"):
        EvaluateConfig(out="x")


def test_a_norm_over_the_clip_cannot_be_judged_streamed(slab_run: EvaluateConfig, tmp_path: Path):
    config = open_checkpoint(slab_run.checkpoint).config.override({"model.norm": "gn3d"})
    state = build_model(config.model, config.clip).state_dict()
    save_checkpoint(tmp_path, config=config, model_state=state, epoch=1, score=0, metrics={})
    with pytest.raises(ConfigError, match="model.norm is gn3d"):
        evaluate(slab_run.override({"checkpoint": str(tmp_path)}), dry_run=False)


def test_thresholds_are_not_chosen_on_the_test_split_nor_on_a_few_slices(slab_run: EvaluateConfig, tmp_path: Path):
    for split in ("test", "train"):
        changed = {"choose_on": split, "out": str(tmp_path / "a")}
        with pytest.raises(ConfigError, match=f"choose_on is '{split}'"):
            evaluate(EvaluateConfig.model_validate(slab_run.model_dump() | changed), dry_run=False)
    before = read_operating_points(open_checkpoint(slab_run.checkpoint or ""))
    few = {"split": "val", "max_clips": 1, "streamed": False, "ablations": False, "out": str(tmp_path / "b")}
    assert evaluate(EvaluateConfig.model_validate(slab_run.model_dump() | few), dry_run=False) == 0
    assert read_operating_points(open_checkpoint(slab_run.checkpoint or "")) == before
    settings = json.loads(json.loads((tmp_path / "b" / "metrics.json").read_text())["provenance"]["evaluation"])
    assert settings["max_clips"] == 1


@pytest.mark.parametrize("times", [1.0, 2.2, 3.0])
def test_a_series_thinner_than_the_grid_is_read_on_several(
    slab_run: EvaluateConfig, times: float, monkeypatch: pytest.MonkeyPatch
):
    judge = SeriesPredictor(slab_run.override({"slices": "all", "streamed": False}))
    (sample, *_) = detection_samples(slab_run, judge.shards)
    assert sample.entry.spacing_mm is not None
    clip = judge.predictor.clip.override({"slice_spacing_mm": times * sample.entry.spacing_mm[0]})
    judge.predictor = replace(judge.predictor, clip=clip)
    phases: list[int] = []
    monkeypatch.setattr(Predictor, "find_lesions", lambda self, *_: phases.append(self.phases) or [])
    judge([sample])
    assert phases == [math.ceil(times)]
