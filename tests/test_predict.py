"""The way back: from a clip's pixels to a slice of the series and to patient millimetres."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mp3d.checkpoint import open_checkpoint, save_checkpoint
from mp3d.config import ClassificationHead, ClipConfig
from mp3d.data.series import Volume
from mp3d.errors import CheckpointError
from mp3d.models import build_model
from mp3d.predict import Predictor, edge_to_lps_mm
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


def predictor(model=None, slice_spacing_mm: float | None = 2.5, nms_iou: float = 0.5) -> Predictor:
    clip = ClipConfig(num_slices=9, slice_spacing_mm=slice_spacing_mm)
    return Predictor(model or BrightBoxes(), clip, nms_iou, torch.device("cpu"))


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


def test_thick_slices_get_one_finding_though_several_positions_answer_for_them():
    volume = air(8, (5.0, 1.0, 1.0))
    volume.hu[2:6, 5:9, 5:9] = 600
    model = BrightBoxes()
    findings = predictor(model).find_lesions(volume, 0.1)
    assert sum(model.batches) == 15
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
