"""The way back: from a clip's pixels to a slice of the series and to patient millimetres."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mp3d.checkpoint import STREAMING, Checkpoint, StreamingLoss, open_checkpoint, save_checkpoint
from mp3d.config import ClassificationHead, ClipConfig
from mp3d.data.clips import resample_z, series_grid
from mp3d.data.series import Volume
from mp3d.errors import CheckpointError, ConfigError
from mp3d.models import LesionDetector, build_model
from mp3d.predict import Predictor, SeriesMode, edge_to_lps_mm, resampled_on_device
from mp3d.sample import Clip, Prediction
from tests.serving_world import BrightBoxes, save_tiny, tiny_config

AIR = -1000


def oblique_affine(spacing_zyx_mm: tuple[float, float, float]) -> np.ndarray:
    """Columns, rows and slices along three oblique axes, every spacing and offset its own."""
    z, y, x = spacing_zyx_mm
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [17, -23, 41], degrees=True).as_matrix() @ np.diag([x, y, z])
    affine[:3, 3] = [-112.3, 84.5, -371.9]
    return affine


def air(num_slices: int, spacing_mm: tuple[float, float, float], rows: int = 20, columns: int = 30) -> Volume:
    return Volume(np.full((num_slices, rows, columns), AIR, np.int16), oblique_affine(spacing_mm))


def predictor(
    model=None, slice_spacing_mm: float | None = 2.5, nms_iou: float = 0.5, mode: SeriesMode = "window"
) -> Predictor:
    clip = ClipConfig(num_slices=9, slice_spacing_mm=slice_spacing_mm)
    return Predictor(model or BrightBoxes(), clip, nms_iou, torch.device("cpu"), mode=mode)


def test_one_voxel_comes_back_to_its_millimetres():
    volume = air(12, (2.5, 0.7, 1.1))
    volume.hu[5, 4, 21] = 800
    (found,) = predictor().find_lesions(volume, 0.1)
    assert found.slice_index == 5
    assert found.box_px == (21, 4, 22, 5)
    assert found.centre_lps_mm == pytest.approx((volume.affine @ [21, 4, 5, 1])[:3], abs=1e-9)
    corners = [(20.5, 3.5), (21.5, 3.5), (21.5, 4.5), (20.5, 4.5)]
    for corner, (column, row) in zip(found.box_lps_mm, corners, strict=True):
        assert corner == pytest.approx((volume.affine @ [column, row, 5, 1])[:3], abs=1e-9)
    assert found.diameter_mm == pytest.approx(1.1)
    assert (found.score, found.label) == (pytest.approx(0.8), 1)


def test_diameter_is_the_longer_side_in_millimetres_not_in_pixels():
    volume = air(9, (2.5, 2.0, 0.5))
    volume.hu[4, 3:7, 10:16] = 500  # 4 rows of 2 mm, 6 columns of 0.5 mm
    (found,) = predictor().find_lesions(volume, 0.1)
    assert found.diameter_mm == pytest.approx(8)
    sides = np.linalg.norm(np.diff(np.array(found.box_lps_mm), axis=0), axis=1)
    assert sides == pytest.approx([3, 8, 3])


@pytest.mark.parametrize("slice_spacing_mm", [1.0, 1.25, 2.5, 3.0, 5.0])
def test_position_survives_every_grid(slice_spacing_mm: float):
    """A blob 10 mm long: its best finding lies within half a grid step and half a slice of its middle."""
    num_slices = int(80 / slice_spacing_mm)
    for middle_mm in (20.0, 33.3, 41.7):
        volume = air(num_slices, (slice_spacing_mm, 0.8, 0.9))
        distance_mm = np.abs(np.arange(num_slices) * slice_spacing_mm - middle_mm)
        volume.hu[:, 6:9, 12:17] = (1000 - 100 * distance_mm).clip(AIR)[:, None, None]
        findings = predictor().find_lesions(volume, 0.05)
        best = findings[0]
        truth = (volume.affine @ [14, 7, middle_mm / slice_spacing_mm, 1])[:3]
        assert np.linalg.norm(np.array(best.centre_lps_mm) - truth) <= 2.5 / 2 + slice_spacing_mm / 2 + 1e-6
        assert best.centre_lps_mm == pytest.approx(edge_to_lps_mm(volume, 14.5, 7.5, best.slice_index))
        assert [each.score for each in findings] == sorted((each.score for each in findings), reverse=True)


@pytest.mark.parametrize(("spacing_mm", "phases"), [(1.0, 3), (0.7, 4), (1.25, 2), (2.5, 1), (5.0, 1)])
def test_with_enough_phases_every_slice_is_answered_for(spacing_mm: float, phases: int):
    """The slice on which a lesion is brightest, each in turn, has the best finding."""
    for index in range(9):
        volume = air(9, (spacing_mm, 1.0, 1.0))
        volume.hu[:, 4:8, 4:8] = 100
        volume.hu[index, 4:8, 4:8] = 600
        found = replace(predictor(), phases=phases).find_lesions(volume, 0.0)
        assert {each.slice_index for each in found} == set(range(9))
        assert found[0].slice_index == index


def test_a_series_shorter_than_a_step_is_read_on_as_many_grids_as_reach_it():
    progress = []
    found = replace(predictor(), phases=5).find_lesions(
        air(2, (1.0, 1, 1)), 0.0, progress=lambda *counts: progress.append(counts)
    )
    assert progress[-1] == (3, 3), "at 0, 0.5 and 1 mm"
    assert found == []


@pytest.mark.parametrize(("mode", "num_clips"), [("window", 15), ("slab", 2)])
def test_thick_slices_get_one_finding_though_several_positions_answer_for_them(mode: SeriesMode, num_clips: int):
    volume = air(8, (5.0, 1.0, 1.0))
    volume.hu[2:6, 5:9, 5:9] = 600
    model = BrightBoxes()
    findings = predictor(model, mode=mode).find_lesions(volume, 0.1)
    assert sum(model.batches) == num_clips
    assert sorted(found.slice_index for found in findings) == [2, 3, 4, 5]


def test_boxes_apart_on_one_slice_are_both_kept():
    class TwoBoxes(BrightBoxes):
        def on_slice(self, hu: torch.Tensor) -> Prediction:
            boxes = torch.tensor([[1.0, 1, 5, 5], [1.5, 1, 5, 5], [10, 10, 14, 14], [10, 10, 14, 14]])
            return {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]), "labels": torch.tensor([1, 1, 1, 2])}

    findings = predictor(TwoBoxes()).find_lesions(air(1, (2.5, 1, 1)), 0.0)
    assert [(round(found.score, 3), found.label) for found in findings] == [(0.9, 1), (0.7, 1), (0.6, 2)]


def test_neighbouring_slices_do_not_suppress_each_other():
    volume = air(400, (2.5, 1.0, 1.0))
    volume.hu[:, 5:9, 5:9] = 600
    assert len(predictor().find_lesions(volume, 0.1, at_once=64)) == 400


def test_threshold_is_inclusive_and_nothing_is_an_empty_list():
    volume = air(3, (2.5, 1, 1))
    assert predictor().find_lesions(volume, 0.0) == []
    volume.hu[1, 2, 2] = 500
    assert len(predictor().find_lesions(volume, 0.5)) == 1
    assert predictor().find_lesions(volume, 0.5001) == []


def test_series_as_stored_where_the_clip_has_no_spacing():
    volume = air(7, (4.0, 1, 1))
    volume.hu[6, 2, 2] = 500
    (found,) = predictor(slice_spacing_mm=None).find_lesions(volume, 0.1)
    assert found.slice_index == 6


def test_clips_are_made_batch_by_batch_and_progress_may_stop_them():
    class Stopped(Exception):
        pass

    def stop_after_two(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 2:
            raise Stopped

    calls: list[tuple[int, int]] = []
    model = BrightBoxes()
    with pytest.raises(Stopped):
        predictor(model).find_lesions(air(10, (2.5, 1, 1)), 0.1, at_once=3, progress=stop_after_two)
    assert model.batches == [3, 3]
    assert calls == [(3, 10), (6, 10)]


def test_opened_checkpoint_answers_as_the_model_it_holds(tmp_path: Path):
    model = save_tiny(tmp_path / "c", tiny_config())
    opened = Predictor.open(tmp_path / "c", device="cpu")
    volume = air(3, (2.5, 1, 1), 40, 64)
    volume.hu[:] = np.random.default_rng(0).integers(-1000, 1000, volume.hu.shape, np.int16)
    findings = opened.find_lesions(volume, 0.0)
    index = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2])  # the middle slice with its neighbours, clamped at the ends
    with torch.no_grad():
        expected = model([Clip(torch.from_numpy(volume.hu)[index], (4,))])[0]
    scores = [found.score for found in findings if found.slice_index == 1]
    assert len(scores) > 0
    assert scores == pytest.approx(expected["scores"].tolist(), abs=1e-5)


class Recorded:
    """A detector, and the clips that it was asked about."""

    def __init__(self, model: LesionDetector) -> None:
        self.model, self.clips = model, []

    def __call__(self, clips: list[Clip]) -> list[Prediction]:
        self.clips += clips
        return self.model(clips)


def tiny_detector() -> LesionDetector:
    torch.manual_seed(0)
    config = tiny_config()
    return LesionDetector(config.model.override({"backbone": "mp3d18ba", "width": 0.125}), config.clip).eval()


def noise(num_slices: int, spacing_mm: float) -> Volume:
    volume = air(num_slices, (spacing_mm, 1.0, 1.0), 40, 64)
    volume.hu[:] = np.random.default_rng(num_slices).integers(-1000, 1000, volume.hu.shape)
    return volume


def assert_same(ours: list[Prediction], theirs: list[Prediction]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert len(one["scores"]) > 0
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_slices", "spacing_mm"), [(1, 2.5), (5, 2.5), (9, 2.5), (21, 2.5), (12, 5.0), (40, 1.0)])
def test_a_slab_answers_as_trained_for_every_position_once(num_slices: int, spacing_mm: float):
    """Seventeen slices around nine positions; the last slab ends with the series."""
    model, volume = Recorded(tiny_detector()), noise(num_slices, spacing_mm)
    grid = series_grid(num_slices, spacing_mm, ClipConfig())
    ours = [each for part in predictor(model, mode="slab").answers(volume.hu, grid) for each in part]
    total, asked = len(grid.positions), []
    for clip in model.clips:
        start = min(len(asked), max(total - 9, 0))
        np.testing.assert_array_equal(clip.slices, resample_z(volume.hu, grid.stretch(start - 4, start + 13)))
        asked += [start + key - 4 for key in clip.key_slices]
        assert all(4 <= key <= 12 for key in clip.key_slices)
    assert asked == list(range(total))
    with torch.no_grad():
        alone = [model.model([Clip(clip.slices, (key,))])[0] for clip in model.clips for key in clip.key_slices]
    assert_same(ours, alone)


@pytest.mark.parametrize(("num_slices", "spacing_mm"), [(1, 2.5), (5, 2.5), (25, 2.5), (14, 5.0), (60, 1.0)])
def test_a_streamed_series_is_one_long_clip(num_slices: int, spacing_mm: float):
    model, volume = tiny_detector(), noise(num_slices, spacing_mm)
    grid = series_grid(num_slices, spacing_mm, ClipConfig())
    total = len(grid.positions)
    whole = torch.from_numpy(resample_z(volume.hu, grid.stretch(-4, total + 4)))
    with torch.no_grad():
        expected = model([Clip(whole, tuple(range(4, total + 4)))])
    for at_once in (3, 16, None):
        streamed = predictor(model, mode="stream").answers(volume.hu, grid, at_once)
        assert_same([each for part in streamed for each in part], expected)


def test_streamed_findings_lie_on_the_slices_that_their_positions_answer_for():
    model, volume = tiny_detector(), noise(14, 5.0)
    calls = []
    findings = predictor(model, mode="stream", nms_iou=1.0).find_lesions(
        volume, 0.0, progress=lambda done, total: calls.append((done, total))
    )
    grid = series_grid(14, 5.0, ClipConfig())
    answers = [each for part in predictor(model, mode="stream").answers(volume.hu, grid) for each in part]
    expected = sorted(
        (int(slice_index), round(score, 5))
        for answer, slice_index in zip(answers, grid.nearest_source, strict=True)
        for score in answer["scores"].tolist()
    )
    assert sorted((found.slice_index, round(found.score, 5)) for found in findings) == expected
    assert calls[-1] == (27, 27)
    assert calls == sorted(calls)


@pytest.mark.parametrize("mode", ["window", "slab", "stream"])
def test_only_the_slices_of_the_moment_are_interpolated(mode: SeriesMode, monkeypatch: pytest.MonkeyPatch):
    def recorded(hu: np.ndarray, positions: np.ndarray) -> np.ndarray:
        asked.append(len(positions))
        return resample_z(hu, positions)

    asked: list[int] = []
    monkeypatch.setattr("mp3d.predict.resample_z", recorded)
    predictor(tiny_detector(), mode=mode).find_lesions(noise(50, 2.0), 0.5)
    assert max(asked) == {"window": 9, "slab": 17, "stream": 16}[mode]


@pytest.mark.parametrize("spacing_mm", [0.7, 1.0, 2.5, 3.27, 5.0])
def test_a_gpu_interpolates_to_the_same_bits(spacing_mm: float):
    hu = np.random.default_rng(0).integers(-2000, 3000, (20, 16, 16)).astype(np.int16)
    grid = series_grid(len(hu), spacing_mm, ClipConfig())
    for start in range(-4, len(grid.positions) + 4, 5):
        positions = grid.stretch(start, start + 5)
        assert np.array_equal(resampled_on_device(torch.from_numpy(hu), positions), resample_z(hu, positions))


def test_only_a_detector_can_be_streamed():
    with pytest.raises(TypeError, match="a BrightBoxes cannot be streamed"):
        predictor(mode="stream").find_lesions(air(9, (2.5, 1, 1)), 0.1)


def saved(folder: Path, **changes) -> Checkpoint:
    config = tiny_config().override(changes)
    save_tiny(folder, config)
    return open_checkpoint(folder)


def loss_of(mean_sensitivity: float, streamed: float) -> StreamingLoss:
    return StreamingLoss(mean_sensitivity, streamed, (-0.01, 0.01), 90, 30, "slab", "MP3D port", "val", "digest")


def test_the_mode_follows_the_training_and_what_streaming_was_found_to_cost(tmp_path: Path):
    windows, slabs = saved(tmp_path / "w"), saved(tmp_path / "s", **{"clip.num_key_slices": 9})
    assert Predictor.open(windows, "cpu").mode == "window"
    assert Predictor.open(slabs, "cpu").mode == "slab"
    for mean_sensitivity, streamed, mode in (
        (0.8, 0.796, "stream"), (0.8, 0.81, "stream"), (0.8, 0.795, "stream"), (0.8, 0.794, "slab"), (0, 0, "slab"),
    ):  # fmt: skip
        for checkpoint in (windows, slabs):
            checkpoint.record_streaming(loss_of(mean_sensitivity, streamed), {"data set": "made"})
        assert Predictor.open(tmp_path / "s", "cpu").mode == mode
        assert Predictor.open(tmp_path / "w", "cpu").mode == "window"
    assert Predictor.open(slabs, "cpu", mode="window").mode == "window"
    assert Predictor.open(windows, "cpu", mode="stream").mode == "stream"


def test_what_was_measured_on_other_weights_does_not_count(tmp_path: Path):
    first = saved(tmp_path / "a", **{"clip.num_key_slices": 9})
    second = saved(tmp_path / "b", **{"clip.num_key_slices": 9, "name": "other"})
    first.record_streaming(loss_of(0.8, 0.8), {})
    (second.path / STREAMING).write_bytes((first.path / STREAMING).read_bytes())
    assert first.may_be_streamed()
    assert not second.may_be_streamed()
    first.record_streaming(replace(loss_of(0.8, 0.8), num_patients=9), {})
    assert not first.may_be_streamed(), "of too few patients"
    older = {"checkpoint": first.digest, "mean_sensitivity": 0.8, "mean_sensitivity_streamed": 0.8}
    for damaged in ("torn", json.dumps(older)):  # measured on whatever split was judged
        (first.path / STREAMING).write_text(damaged)
        assert not first.may_be_streamed()


def test_statistics_over_the_clip_cannot_be_streamed(tmp_path: Path):
    checkpoint = saved(tmp_path / "c", **{"model.norm": "gn3d", "clip.num_key_slices": 9})
    with pytest.raises(ConfigError, match="model.norm is gn3d"):
        Predictor.open(checkpoint, "cpu", mode="stream")
    assert Predictor.open(checkpoint, "cpu").mode == "slab"


def test_classifier_cannot_be_opened_as_a_detector(tmp_path: Path):
    save_tiny(tmp_path / "c", tiny_config(ClassificationHead(num_classes=3)))
    with pytest.raises(CheckpointError, match="finetune"):
        Predictor.open(tmp_path / "c")


def test_weights_of_another_model_are_refused(tmp_path: Path):
    config = tiny_config()
    state = build_model(config.model, config.clip).state_dict()
    (tmp_path / "c").mkdir()
    other = config.override({"model.width": 0.1})
    save_checkpoint(tmp_path / "c", config=other, model_state=state, epoch=1, score=0.0, metrics={})
    with pytest.raises(CheckpointError, match="do not fit"):
        Predictor.open(open_checkpoint(tmp_path / "c"))
