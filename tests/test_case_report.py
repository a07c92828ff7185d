"""The reports of classifiers and segmenters, and their figures."""

import json
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from jobs.evaluate import print_case_scores
from mp3d.evaluation import (
    ClassifiedCase,
    MaskedSlice,
    Predictions,
    SegmentedCase,
    evaluate_cases,
)
from mp3d.report import case_figures, write_case_report
from mp3d.report.case_figures import draw_masks
from mp3d.report.figures import (
    TRUE_COLOUR,
)
from tests.test_report import Outline, ct_slice, table_rows


def test_a_classifier_has_a_report(tmp_path):
    rng = np.random.default_rng(0)
    cases = [ClassifiedCase(f"p{i}", f"s{i}", i % 2, (0.0, float(rng.normal(2 * (i % 2) - 1, 1)))) for i in range(40)]
    point = {"threshold": 0.5, "chosen_on": "split 'val', 12 cases"}
    evaluation = evaluate_cases(
        Predictions("classification", cases, {"config": "{}"}, operating_point=point), "nodules", {"itself": cases},
        ("benign", "malignant"), num_replicates=100,
    )  # fmt: skip
    files = write_case_report(tmp_path / "report.html", evaluation, lambda _: ct_slice(), None)
    text = " ".join(Outline(files.page.read_text(encoding="utf-8")).text.split())
    assert set(files.pictures) == {"roc", "scores", "confusion", "calibration"}
    assert f"{evaluation.scores['auc']:.3f}" in text
    assert "It was chosen on: split 'val', 12 cases." in text
    assert "malignant, said malignant" in text
    assert "Wrong" in text
    assert files.numbers["auc"] == evaluation.scores["auc"]
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["comparisons"]["itself"]["p_value"] == 1
    assert numbers["metric_intervals"]["auc"][0] < numbers["metrics"]["auc"]


def test_a_segmenter_has_a_report(tmp_path):
    cases = [SegmentedCase(f"p{i}", f"s{i}", ((40 + 5 * i, 100, 100),), (float(i + 1),), i) for i in range(11)]
    evaluation = evaluate_cases(
        Predictions("segmentation", cases), "livers", class_names=("liver",), num_replicates=100
    )
    truth, answer = (np.zeros((96, 96), np.uint8) for _ in range(2))
    truth[30:50, 40:60], answer[32:52, 40:60] = 1, 1
    files = write_case_report(
        tmp_path / "report.html", evaluation, None, lambda _: MaskedSlice(ct_slice(), truth, answer)
    )
    text = " ".join(Outline(files.page.read_text(encoding="utf-8")).text.split())
    assert "Best 6 of 11" in text
    assert "Worst 5 of 11" in text
    assert "Dice 0.90" in text
    assert "liver, as answered" in text
    assert list(files.pictures) == ["dice"]


def test_the_dice_of_the_slice_stands_beside_that_of_the_case(tmp_path):
    """The slice has 10 of 20 and 20 pixels in common; a picture is all of its case, and has no second Dice."""
    truth, answer = (np.zeros((96, 96), np.uint8) for _ in range(2))
    truth[30, 40:60], answer[30, 50:70] = 1, 1
    case = SegmentedCase("p", "s", ((90, 100, 100),), (1.0,), 7)
    evaluation = evaluate_cases(Predictions("segmentation", [case]), "livers", num_replicates=100)
    for spacing_mm, said in (((3.0, 0.8, 0.8), "Dice 0.90 · HD95 1.0 mm · slice 7, its Dice 0.50"), (None, "1.0 mm")):
        masked = MaskedSlice(ct_slice(), truth, answer, spacing_mm)
        files = write_case_report(tmp_path / "report.html", evaluation, None, lambda _, of=masked: of)
        text = " ".join(Outline(files.page.read_text(encoding="utf-8")).text.split())
        assert said in text
        assert ("its Dice" in text) == (spacing_mm is not None)


def test_hd95_says_over_how_many_cases_it_is(tmp_path, capsys):
    """Of four cases one has no answer and one no truth."""
    undefined = (float("nan"),)
    cases = [
        SegmentedCase("p0", "s0", ((40, 100, 100),), (2.0,)),
        SegmentedCase("p1", "s1", ((50, 100, 100),), (4.0,)),
        SegmentedCase("p2", "s2", ((0, 0, 100),), undefined),
        SegmentedCase("p3", "s3", ((0, 100, 0),), undefined),
    ]
    evaluation = evaluate_cases(Predictions("segmentation", cases), "livers", num_replicates=100)
    files = write_case_report(tmp_path / "report.html", evaluation)
    page = files.page.read_text(encoding="utf-8")
    rows = {row[0]: row[1:] for row in table_rows(page)}
    assert rows["HD95, mm"][::2] == ["3.000", "2 of 4 cases"]
    assert rows["Dice per case"][2] == "4 of 4 cases"
    assert rows["Dice over all voxels"][2] == ""
    assert " ".join(Outline(page).text.split()).count("2 of 4 cases") == 2  # the headline says it too
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["num_cases_defined"] == {"dice_per_case": 4, "hausdorff_95_mm": 2}
    print_case_scores(evaluation, "test")
    assert re.search(r"hausdorff_95_mm .*, 2 of 4 cases$", capsys.readouterr().out, re.M)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of cases stay figures, so that a test can look at their parts."""
    monkeypatch.setattr(case_figures, "png_bytes", lambda figure: figure)


@pytest.mark.usefixtures("figures")
def test_counts_of_twenty_classes_can_be_read():
    """On the page, where a wide figure has 54 rem, letters are as tall as the page's small print, 9 pixels at least."""
    labels = np.arange(400) % 20
    figure = case_figures.draw_confusion(np.roll(labels, 7), labels, ["monarch butterfly"] * 20)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    scale = 54 * 16 / figure.get_figwidth()
    assert min(text.get_fontsize() for text in [*axes.texts, *axes.get_xticklabels()]) / 72 * scale >= 9
    assert axes.get_position().width * 54 * 16 / 20 > 24  # a count of three digits


def test_the_figure_of_many_classes_is_a_wide_one(tmp_path):
    for number, wide in ((2, False), (20, True)):
        cases = [ClassifiedCase(f"p{i}", f"s{i}", i % number, tuple(np.eye(number)[i % number])) for i in range(40)]
        evaluation = evaluate_cases(Predictions("classification", cases), "run", num_replicates=100)
        page = write_case_report(tmp_path / f"{number}.html", evaluation).page.read_text(encoding="utf-8")
        (shown,) = [
            of["class"] for tag, of in Outline(page).elements if tag == "figure" and of.get("id") == "confusion"
        ]
        assert ("narrow" not in shown) == wide


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize("number", [1, 2, 30])
def test_cases_are_counted_in_whole_numbers(number: int):
    cases = [SegmentedCase(f"p{i}", f"s{i}", ((40, 100, 90),), (1.0,)) for i in range(number)]
    figure = case_figures.draw_dice(cases, ["liver"])
    figure.draw_without_rendering()
    ranked, sized = figure.axes
    low, high = ranked.get_xlim()
    ticks = [tick for tick in ranked.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)
    assert sized.get_xlim() == pytest.approx((9, 110))  # a whole decade


@pytest.mark.usefixtures("figures")
def test_the_roc_figure_has_a_curve_for_every_run():
    labels = np.arange(20) % 2
    scores = np.linspace(0, 1, 20)
    patients = [str(number) for number in range(20)]
    figure = case_figures.draw_roc(scores, labels, patients, 0.5, 0.55, {"other, AUC 0.450": 1 - scores})
    (axes,) = figure.axes
    curves = {line.get_label(): line for line in axes.lines}
    assert "AUC 0.550" in curves
    x, y = curves["other, AUC 0.450"].get_data()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(0.45)


@pytest.mark.usefixtures("figures")
def test_masks_are_shown_in_the_proportions_of_the_patient():
    """Pixels twice as tall as wide; the panels do not touch."""
    mask = np.zeros((96, 96), np.uint8)
    mask[30:50, 40:60] = 1
    figure = draw_masks(MaskedSlice(ct_slice(), mask, mask, (3.0, 1.6, 0.8)))
    left, right = figure.axes
    assert left.get_aspect() == right.get_aspect() == 2
    assert right.get_position().x0 - left.get_position().x1 > 0.01
    assert [text.get_text() for text in left.texts] == ["5 mm"]  # a quarter of 48 pixels is 9.6 mm
    assert not draw_masks(MaskedSlice(ct_slice(), mask, mask)).axes[0].texts


def test_the_outline_is_drawn_on_the_true_mask():
    truth = np.zeros((96, 96), np.uint8)
    truth[30:50, 40:60] = 1
    with Image.open(BytesIO(draw_masks(MaskedSlice(ct_slice(), truth, np.zeros_like(truth))))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)[:, picture.width // 2 :]
    wanted = np.array([int(TRUE_COLOUR[i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(pixels - wanted).sum(axis=2) < 80)
    scale = pixels.shape[0] / 48  # the square around what is marked, 48 pixels wide
    assert (np.ptp(columns) / scale, np.ptp(rows) / scale) == (pytest.approx(20, abs=1), pytest.approx(20, abs=1))
