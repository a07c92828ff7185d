"""The pictures of a report and of findings: what they show, and which of it they say."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from mp3d.data.series import Volume
from mp3d.findings import group_findings
from mp3d.metrics.calibration import calibration
from mp3d.metrics.protocols import MP3D_PORT
from mp3d.predict import Finding
from mp3d.report import figures
from mp3d.report.figures import (
    FOUND_COLOUR,
    OTHER_COLOUR,
    TRUE_COLOUR,
    draw_finding,
    draw_key_slice,
    finding_caption,
)
from mp3d.report.gallery import choose_exhibits
from mp3d.report.orientation import edge_letters
from mp3d.report.windows import BONE, LIVER, LUNG, SOFT_TISSUE, display_window
from tests.test_report import ELSEWHERE, LESION, ct_slice, key_slice


@pytest.fixture
def kept_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures stay figures, so that a test can look at their parts."""
    monkeypatch.setattr(figures, "png_bytes", lambda figure: figure)


def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where a picture has a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(pixels.astype(int) - wanted).sum(axis=2) < 60


def test_the_picture_of_a_finding_marks_which_box_is_meant():
    """Two lesions on one slice: the one that the picture is of is bold, the other thin and of another colour."""
    volume = Volume(np.stack([ct_slice()] * 9), np.diag([0.8, 0.8, 2.5, 1]))
    boxes = {LESION: 0.9, ELSEWHERE: 0.6}
    nowhere = (0.0, 0.0, 0.0)
    findings = [Finding(box, 4, (nowhere,) * 4, nowhere, 16.0, score, 1) for box, score in boxes.items()]
    lesions = group_findings(findings, volume, 2.5)
    for number, box in enumerate(boxes, 1):
        with Image.open(BytesIO(draw_finding(volume, lesions, number))) as picture:
            assert picture.size == (800, 430)
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels[405:] > 200).any()  # the caption
        x1, _, x2, y2 = np.array(box) * 400 / 96  # in the whole slice, the left half of the picture
        below = (slice(int(y2) - 4, int(y2) + 4), slice(int(x1) + 10, int(x2) - 10))
        assert coloured(pixels[below], FOUND_COLOUR).any()
        assert not coloured(pixels[below], OTHER_COLOUR).any()
        marked = [int(coloured(pixels[:400, :400], colour).sum()) for colour in (FOUND_COLOUR, OTHER_COLOUR)]
        assert marked[0] > 1.5 * marked[1] > 0
    assert finding_caption(volume, lesions[1], 2, SOFT_TISSUE) == (
        "lesion 2 · slice 4 of 0–8 · score 0.60 · 16 × 16 × 2 mm (x, y, z) · soft tissue window −160 to 240 HU"
    )


AXES_LPS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}


def volume_shown(right, down) -> Volume:
    """Slices whose columns and rows run in these directions (LPS)."""
    right, down = np.array(right, float), np.array(down, float)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([0.8 * right, 0.8 * down, 2.5 * np.cross(right, down)], axis=1)
    return Volume(np.stack([ct_slice()] * 9), affine)


@pytest.mark.usefixtures("kept_figures")
@pytest.mark.parametrize("sides", ["RLAP", "LRAP", "RLPA", "APHF", "RLHF"])
def test_the_edges_of_a_picture_say_which_side_of_the_patient_they_are(sides: str):
    """Left, right, top, bottom of axial, mirrored, flipped, sagittal and coronal slices, on both views."""
    volume = volume_shown(AXES_LPS[sides[1]], AXES_LPS[sides[3]])
    assert "".join(edge_letters(volume.affine)) == sides
    finding = Finding(LESION, 4, ((0.0, 0.0, 0.0),) * 4, (0.0, 0.0, 0.0), 16.0, 0.9, 1)
    figure = draw_finding(volume, group_findings([finding], volume, 2.5), 1)
    for axes in figure.axes:
        at = {text.xy: text.get_text() for text in axes.texts if text.get_text() in AXES_LPS}
        assert [at[place] for place in ((0, 0.5), (1, 0.5), (0.5, 1), (0.5, 0))] == list(sides)


def test_oblique_edges_have_the_letters_of_all_sides_they_lean_to():
    turn = np.deg2rad(30)
    tilted = volume_shown((np.cos(turn), np.sin(turn), 0), (-np.sin(turn), np.cos(turn), 0))
    assert edge_letters(tilted.affine) == ("RA", "LP", "AL", "PR")
    turn = np.deg2rad(10)
    tilted = volume_shown((np.cos(turn), np.sin(turn), 0), (-np.sin(turn), np.cos(turn), 0))
    assert edge_letters(tilted.affine) == ("R", "L", "A", "P")


@pytest.mark.parametrize(("number", "scale"), [(8, "linear"), (3000, "log")])
@pytest.mark.usefixtures("kept_figures")
def test_few_answers_are_counted_on_a_linear_axis(number: int, scale: str):
    scores = np.linspace(0.01, 0.99, number) ** 4
    figure = figures.draw_reliability(calibration(scores, scores > 0.5), "Share that is right")
    figure.draw_without_rendering()
    bars = figure.axes[1]
    assert bars.get_yscale() == scale
    if scale == "linear":
        assert all(tick == round(tick) for tick in bars.get_yticks())


def test_exhibits_say_why_a_lesion_was_missed():
    overlapping = (LESION[0] - 15, LESION[1], LESION[2] - 15, LESION[3])
    results = [
        key_slice(0, [(*LESION, 0.9), (*LESION, 0.95)]),
        key_slice(1, [(*LESION, 0.3)]),
        key_slice(2, [(*overlapping, 0.9)]),
        key_slice(3, [(*ELSEWHERE, 0.9)]),
    ]
    gallery = choose_exhibits(results, threshold=0.5, protocol=MP3D_PORT)
    assert [(each.verdict, each.score) for each in gallery.found] == [("found", pytest.approx(0.95))]
    assert {each.result.z_index: (each.verdict, each.score) for each in gallery.missed} == {
        11: ("missed: below the threshold", pytest.approx(0.3)),
        12: ("missed: overlap too small", pytest.approx(0.9)),
        13: ("missed: no detection there", None),
    }
    assert [each.iou for each in gallery.false_positives] == pytest.approx([100 / 700, 0])


def test_of_several_near_misses_of_a_lesion_one_is_shown():
    """On two slices of one lesion five boxes lie around it, beside one that lies elsewhere; all of them are counted."""
    x1, y1, x2, y2 = LESION
    around = [(x1 - 12, y1, x2 - 12, y2, 0.8), (x1 + 12, y1, x2 + 12, y2, 0.9), (x1, y1 - 12, x2, y2 - 12, 0.6)]
    first = key_slice(0, [*around, (*ELSEWHERE, 0.7)])
    second = replace(first, z_index=11, boxes=first.boxes[1:3], scores=first.scores[1:3], labels=first.labels[1:3])
    gallery = choose_exhibits([first, second], threshold=0.5, protocol=MP3D_PORT)
    assert [(each.score, each.verdict) for each in gallery.false_positives] == [
        (pytest.approx(0.9), "false positive, best of 5 around one lesion"),
        (pytest.approx(0.7), "false positive"),
    ]
    assert gallery.num_false_positives == 6
    unknown = [replace(each, true_instances=np.zeros(1, np.int64)) for each in (first, second)]  # two lesions, maybe
    gallery = choose_exhibits(unknown, threshold=0.5, protocol=MP3D_PORT)
    assert [each.score for each in gallery.false_positives] == pytest.approx([0.9, 0.9, 0.7])


@pytest.mark.usefixtures("kept_figures")
def test_scores_do_not_cover_each_other_and_the_one_in_question_is_always_there():
    """Many detections of one lesion: the best is on top and labelled; also where another one is cited."""
    x1, y1, x2, y2 = LESION
    many = [(x1 + i / 4, y1 + i / 4, x2 + i / 4, y2 + i / 4, 0.9 - 0.04 * i) for i in range(9)]
    result = key_slice(0, [*many[4:], *many[:4]])
    for cited, first in ((None, "0.90"), (3, "0.62")):
        figure = draw_key_slice(ct_slice(), result, result.true_boxes[0], 0.5, SOFT_TISSUE, cited)
        figure.draw_without_rendering()
        _, close = figure.axes
        scale_bar, *labels = close.texts
        assert labels[0].get_text() == first
        assert 1 <= len(labels) < 9
        extents = [text.get_window_extent() for text in (scale_bar, *labels)]
        assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
        assert close.patches[-1].get_x() == x1  # of the best


@pytest.mark.usefixtures("kept_figures")
def test_the_detection_that_was_too_low_is_drawn_with_its_score():
    result = key_slice(1, [(*LESION, 0.3), (*ELSEWHERE, 0.9)])
    (missed,) = choose_exhibits([result], threshold=0.5, protocol=MP3D_PORT).missed
    figure = draw_key_slice(ct_slice(), result, missed.focus, 0.5, SOFT_TISSUE, missed.detection)
    _, close = figure.axes
    dotted = [patch for patch in close.patches if to_hex(patch.get_edgecolor()).upper() == OTHER_COLOUR]
    assert [(patch.get_x(), patch.get_y()) for patch in dotted] == [LESION[:2]]
    assert "0.30" in [text.get_text() for text in close.texts]


def test_exhibits_prefer_different_series():
    many = key_slice(0, [(*ELSEWHERE, 0.9), (0, 0, 9, 9, 0.8)])
    other = key_slice(1, [(*ELSEWHERE, 0.6)])
    gallery = choose_exhibits([many, other], threshold=0.5, protocol=MP3D_PORT, num_each=2)
    assert [each.score for each in gallery.false_positives] == pytest.approx([0.9, 0.6])
    assert gallery.num_false_positives == 3


def test_the_window_follows_the_kind_or_what_surrounds_the_box():
    box = np.array(LESION, dtype=np.float32)
    assert display_window(ct_slice(-850), box) == LUNG
    assert display_window(ct_slice(40), box) == SOFT_TISSUE
    assert display_window(ct_slice(-90), box) == SOFT_TISSUE
    assert display_window(ct_slice(-850), np.array([0.0, 0, 96, 96])) == SOFT_TISSUE
    assert display_window(ct_slice(-1000), box) == SOFT_TISSUE  # the room around an arm
    assert display_window(ct_slice(600), np.array([5.0, 5, 20, 20])) == BONE
    assert display_window(ct_slice(40), box, "liver") == LIVER
    assert display_window(ct_slice(40), box, "lung") == LUNG
    assert display_window(ct_slice(-850), box, "kidney") == SOFT_TISSUE


def test_the_true_box_is_drawn_on_the_lesion():
    """On the left half, the whole slice, green lies on the lesion's edges and nowhere else."""
    result = key_slice(0, [])
    png = draw_key_slice(ct_slice(), result, result.true_boxes[0], threshold=0.5, window=SOFT_TISSUE)
    with Image.open(BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)[:, : picture.width // 2]
    wanted = np.array([int(TRUE_COLOUR[i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(pixels - wanted).sum(axis=2) < 60)
    scale = pixels.shape[0] / 96
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale
    assert found == pytest.approx(LESION, abs=0.5)
