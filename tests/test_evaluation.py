"""From clips to predictions to metrics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mp3d.data.batches import Batch, SliceInfo
from mp3d.errors import DataError
from mp3d.evaluation import (
    KeySliceResult,
    Predictions,
    evaluate_detector,
    predict_clips,
    without_context,
)
from mp3d.evaluation.lesions_3d import judge_lesions_3d, true_boxes_3d
from mp3d.metrics.protocols import MP3D_PORT
from mp3d.sample import Clip


def result(z_index, true_boxes, boxes, scores, patient="p0", series="s0", types=(), instances=None, diameters=None):
    return KeySliceResult(
        patient=patient,
        series=series,
        z_index=z_index,
        spacing_mm=(2.5, 0.8, 0.7),
        true_boxes=np.array(true_boxes, dtype=np.float32).reshape(-1, 4),
        true_labels=np.ones(len(true_boxes), dtype=np.int64),
        true_types=types or ("",) * len(true_boxes),
        true_instances=np.array(instances or [0] * len(true_boxes), dtype=np.int64),
        true_diameters_mm=np.array(diameters or [np.nan] * len(true_boxes), dtype=np.float32),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.array(scores, dtype=np.float32),
        labels=np.ones(len(scores), dtype=np.int64),
    )


RESULTS = [
    result(4, [[10, 10, 30, 30]], [[10, 10, 30, 31], [0, 0, 5, 5]], [0.9, 0.3]),
    result(9, [[50, 50, 70, 70], [80, 80, 90, 90]], [[50, 50, 70, 70]], [1 / 3]),
    result(2, [], [], [], patient="p1", series="s1"),
]


CPU = torch.device("cpu")
INFO = SliceInfo("p0", "s0", 4, (2.5, 0.8, 0.7))


class BrightestSlice(nn.Module):
    """For every key slice one box whose score tells how bright that slice is among its clip."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(1, 1, bias=False)

    def forward(self, clips):
        assert torch.is_inference_mode_enabled()
        assert not self.training
        answers = []
        for clip in clips:
            means = clip.slices.float().mean(dim=(1, 2))
            for key_slice in clip.key_slices:
                score = self.weight(means[key_slice].reshape(1, 1) / means.max()) / self.weight.weight
                answers.append(
                    {
                        "boxes": torch.tensor([[0.0, 0, 8, 8]]),
                        "scores": score[0],
                        "labels": torch.ones(1, dtype=torch.int64),
                    }
                )
        return answers


def clip(*levels, key_slices):
    return Clip(torch.tensor(levels, dtype=torch.int16)[:, None, None].expand(-1, 8, 8), key_slices)


def test_predictions_come_back_per_key_slice_with_their_targets():
    targets = [{"boxes": torch.zeros(0, 4)} for _ in range(3)]
    infos = [SliceInfo("p", "s", z, (2.5, 1.0, 1.0)) for z in range(3)]
    batches = [
        Batch([clip(100, 200, 400, key_slices=(1,))], targets[:1], infos[:1]),
        Batch([clip(100, 300, 400, key_slices=(1, 2))], targets[1:], infos[1:]),
    ]
    model = BrightestSlice().train()
    answers = list(predict_clips(model, batches, CPU))
    assert [info for _, _, info in answers] == infos
    assert [target is expected for (_, target, _), expected in zip(answers, targets, strict=True)] == [True] * 3
    assert [float(prediction["scores"]) for prediction, _, _ in answers] == pytest.approx([0.5, 0.75, 1.0])


def test_low_precision_answers_come_back_as_float32():
    batches = [Batch([clip(100, 200, 400, key_slices=(1,))], [{}], [INFO])]
    ((prediction, _, _),) = predict_clips(BrightestSlice(), batches, CPU, torch.bfloat16)
    assert prediction["scores"].dtype == torch.float32
    assert prediction["labels"].dtype == torch.int64


def test_inference_mode_ends_before_the_caller_goes_on():
    batches = [Batch([clip(1, 2, 3, key_slices=(1,))], [{}], [INFO])]
    for _ in predict_clips(BrightestSlice(), batches, CPU):
        assert not torch.is_inference_mode_enabled()


def test_a_missing_target_is_an_error():
    batches = [Batch([clip(1, 2, 3, key_slices=(0, 1))], [{}], [INFO])]
    with pytest.raises(ValueError, match="zip"):
        list(predict_clips(BrightestSlice(), batches, CPU))


def test_without_context_every_slice_is_the_key_slice():
    flat = without_context(clip(100, 200, 400, key_slices=(1,)))
    assert flat.slices.shape == (3, 8, 8)
    assert flat.slices.dtype == torch.int16
    assert (flat.slices == 200).all()
    assert flat.key_slices == (1,)
    with pytest.raises(ValueError, match="2 key slices"):
        without_context(clip(1, 2, 3, key_slices=(0, 1)))


def test_result_of_a_prediction():
    prediction = {"boxes": torch.ones(2, 4), "scores": torch.rand(2), "labels": torch.ones(2, dtype=torch.int64)}
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    made = KeySliceResult.of(prediction, target, SliceInfo("p", "s", z_index=3, spacing_mm=(1.0, 1.0, 1.0)))
    assert made.boxes.dtype == np.float32
    assert made.true_boxes.shape == (0, 4)
    with pytest.raises(DataError, match="is a picture"):
        KeySliceResult.of(prediction, target, SliceInfo("p", "s", z_index=3, spacing_mm=None))


def test_evaluation_of_results():
    other = [result(r.z_index, r.true_boxes, [], [], r.patient, r.series) for r in RESULTS]
    predictions = Predictions("detection", RESULTS, {"date": "today"})
    evaluation = evaluate_detector(predictions, "run", {"blind": other}, num_replicates=100)
    # Score order: hit, hit, false positive; three images, three lesions.
    assert evaluation.froc.sensitivity == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert evaluation.froc.mean_sensitivity == pytest.approx(2 / 3)
    assert evaluation.ap50 == pytest.approx(67 / 101)
    assert evaluation.coco_ap <= evaluation.ap50
    low, high = evaluation.coco_ap_interval
    assert 0 <= low <= evaluation.coco_ap <= high <= 1
    assert evaluation.protocol == MP3D_PORT
    assert evaluation.num_patients == 2
    assert evaluation.comparisons["blind"].froc.mean_sensitivity == 0
    assert evaluation.comparisons["blind"].test.difference == pytest.approx(-2 / 3)
    assert [scores.result.num_lesions for scores in evaluation.by_protocol] == [3] * 6
    assert evaluation.lesions_3d is None
    assert evaluation.operating == ()


def test_strata_of_kind_size_and_spacing():
    """Boxes of 20 x 20 pixels are 14 x 16 mm; the kind of one lesion is not known."""
    results = [
        result(4, [[10, 10, 30, 30]], [[10, 10, 30, 31]], [0.9], types=("lung",)),
        result(9, [[50, 50, 70, 70], [80, 80, 90, 90]], [], [], patient="p1", types=("liver", "")),
    ]
    strata = evaluate_detector(Predictions("detection", results), num_replicates=100).strata
    assert {(each.by, each.name): (each.num_lesions, each.mean_sensitivity) for each in strata} == {
        ("type", "not known"): (1, 0),
        ("type", "liver"): (1, 0),
        ("type", "lung"): (1, 1),
        ("size", "below 10 mm"): (1, 0),
        ("size", "10 to 30 mm"): (2, 0.5),
        ("slice spacing", "above 2 mm"): (3, pytest.approx(1 / 3)),
    }


def test_strata_of_size_take_the_long_diameter_where_the_data_set_gives_one():
    """Of 14 x 16 mm with its margin, the first lesion measures 8 mm; of the last the box is all that is known."""
    results = [
        result(4, [[10, 10, 30, 30]], [[10, 10, 30, 31]], [0.9], diameters=[8.0]),
        result(9, [[50, 50, 70, 70], [80, 80, 90, 90]], [], [], patient="p1", diameters=[31.0, np.nan]),
    ]

    def sizes(of):
        evaluation = evaluate_detector(Predictions("detection", of), num_replicates=100)
        return {each.name: each.num_lesions for each in evaluation.strata if each.by == "size"}, evaluation.size_is

    measured = "the long diameter that the data set gives"
    assert sizes(results[:1]) == ({"below 10 mm": 1}, measured)
    assert sizes([replace(results[0], true_diameters_mm=np.full(1, np.nan))])[1] == "the longer side of the box"
    parts, told = sizes(results)
    assert parts == {"below 10 mm": 2, "30 mm and more": 1}
    assert told == f"{measured} for 2 of 3, else the longer side of the box"


def test_a_centre_is_measured_in_millimetres():
    """8 pixels beside the centre along rows of 0.8 mm: 6.4 mm, within half of 14 mm; along 10 columns it is 7 mm."""
    inside = [result(4, [[10, 10, 30, 26]], [[10, 18, 30, 34]], [0.9])]
    outside = [result(4, [[10, 10, 30, 26]], [[20, 10, 40, 26]], [0.9])]
    found = [
        evaluate_detector(Predictions("detection", of), num_replicates=100).by_protocol[3].result.mean_sensitivity
        for of in (inside, outside)
    ]
    assert found == [1, 0]


def test_only_the_same_key_slices_are_compared():
    moved = [result(5, RESULTS[0].true_boxes, [], []), *RESULTS[1:]]
    for other in (RESULTS[::-1], RESULTS[:2], moved):
        with pytest.raises(DataError, match="'other' was not judged on the slices or cases of 'run'"):
            evaluate_detector(Predictions("detection", RESULTS), "run", {"other": other})


def test_boxes_of_series_are_judged_as_lesions():
    """Two series of one lesion each: one found by a chain of boxes, the other missed, and one chain beside."""
    chain = [result(z, [[10, 10, 30, 30]], [[12, 12, 29, 29]], [0.5 + z / 100], instances=[7]) for z in range(4, 8)]
    beside = [result(8, [], [[60, 60, 70, 70]], [0.3])]
    missed = [result(3, [[40, 40, 50, 50]], [], [], patient="p1", series="s1", instances=[1])]
    predictions = Predictions("detection", [*chain, *beside, *missed], slices="all", grid_spacing_mm=2.5)
    lesions = judge_lesions_3d(predictions, 100, 0)
    assert (lesions.num_boxes, lesions.num_linked) == (5, 2)
    assert lesions.result.sensitivity.tolist() == [0.5, 0.5]
    assert lesions.result.fps_per_image.tolist() == [0, 0.5]
    assert true_boxes_3d(chain).tolist() == [[10, 10, 4, 30, 30, 7]]
    unknown = [result(z, [[10, 10, 30, 30]], [], []) for z in (4, 5, 9)]
    assert true_boxes_3d(unknown).tolist() == [[10, 10, 4, 30, 30, 5], [10, 10, 9, 30, 30, 9]]
