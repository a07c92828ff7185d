"""The report says what was measured, shows it, and needs nothing beside itself."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mp3d.data.series import Volume
from mp3d.evaluation import (
    Evaluation,
    KeySliceResult,
    Predictions,
    evaluate_detector,
)
from mp3d.findings import group_findings
from mp3d.metrics.calibration import calibration
from mp3d.metrics.protocols import MP3D_PORT
from mp3d.predict import Finding
from mp3d.report import figures, write_report
from mp3d.report.figures import (
    FOUND_COLOUR,
    OTHER_COLOUR,
    TRUE_COLOUR,
    draw_finding,
    draw_key_slice,
    finding_caption,
)
from mp3d.report.gallery import choose_exhibits
from mp3d.report.windows import BONE, LIVER, LUNG, SOFT_TISSUE, display_window

LESION = (40, 30, 60, 50)
ELSEWHERE = (70, 70, 90, 90)


def ct_slice(background_hu=40):
    """A bright square in an even body."""
    image = np.full((96, 96), background_hu, dtype=np.int16)
    x1, y1, x2, y2 = LESION
    image[y1:y2, x1:x2] = 120
    return image


def key_slice(index, detections, true_boxes=(LESION,)):
    table = np.array(detections, dtype=np.float32).reshape(-1, 5)
    return KeySliceResult(
        patient=f"patient{index // 2:02d}",
        series=f"series{index:02d}",
        z_index=10 + index,
        spacing_mm=(2.5, 0.8, 0.8),
        true_boxes=np.array(true_boxes, dtype=np.float32).reshape(-1, 4),
        true_labels=np.ones(len(true_boxes), dtype=np.int64),
        boxes=table[:, :4],
        scores=table[:, 4],
        labels=np.ones(len(table), dtype=np.int64),
        true_types=("lung",) * len(true_boxes),
        true_instances=np.ones(len(true_boxes), dtype=np.int64),
        true_diameters_mm=np.full(len(true_boxes), 13, dtype=np.float32),
    )


def made_evaluation() -> Evaluation:
    """Ten key slices: seven found, two too low, one without any detection; false positives on all."""
    results = []
    for index in range(10):
        detections = [(*ELSEWHERE, 0.5 - 0.01 * index), (0, 0, 9, 9, 0.1)]
        if index < 9:
            detections.append((*LESION, (0.9 if index < 7 else 0.05) + 0.001 * index))
        results.append(key_slice(index, detections))
    flat = [key_slice(index, [(*ELSEWHERE, 0.9), (*LESION, 0.1)][: 1 + index % 2]) for index in range(10)]
    provenance = {
        "checkpoint sha256": "ab" * 32,
        "command": "python jobs/evaluate.py --name 'a & b'",
        "config": json.dumps({"optim": {"lr": 0.02}}),
    }
    point = {
        "checkpoint": "ab" * 32, "thresholds": {"1": 0.4, "16": None}, "sensitivity": {"1": 0.5, "16": 0.6},
        "protocol": "MP3D port", "split": "val", "data": "d", "num_images": 9, "num_lesions": 9,
    }  # fmt: skip
    predictions = Predictions("detection", results, provenance, operating_point=point)
    return evaluate_detector(predictions, "run <b>7</b>", {"one slice nine times": flat}, num_replicates=100)


@pytest.fixture(scope="module")
def evaluation():
    return made_evaluation()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, evaluation):
    path = tmp_path_factory.mktemp("report") / "evaluation" / "report.html"
    assert write_report(path, evaluation, lambda _: ct_slice()).page == path
    return path.parent


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed where it should be."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def table_rows(page):
    cells = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)
    ]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in cells]


def test_the_page_is_self_contained(page):
    outline = Outline(page)
    assert not re.search(r"https?:|//[a-z]", page.split("</style>")[0] + outline.text)
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in outline.elements)
    assert "url(" not in page
    assert "@import" not in page
    assert all(image["src"].startswith("data:image/png;base64,") for image in outline.all("img"))
    assert {"charset": "utf-8"} in outline.all("meta")


def test_on_paper_no_table_is_cut(page):
    """Nothing can be scrolled to there: tables are not clipped and their cells may wrap, whatever the screen has."""
    style = page.split("<style>")[1].split("</style>")[0]
    before, printed = style.split("@media print {")
    for rule in (".scroll, pre { overflow: visible; }", "th, td { padding: .3rem .4rem; white-space: normal; }"):
        assert rule in printed
    assert ".scroll { overflow-x: auto; }" in before  # and what comes later wins
    assert printed.count("{") == printed.count("}") - 1
    assert printed.rstrip().endswith("}\n}")


def test_every_picture_opens_and_has_an_alt_text(page):
    images = Outline(page).all("img")
    assert len(images) == 4 + 6 + 3 + 6  # figures, found, missed, false positives
    for image in images:
        assert len(image["alt"]) > 20
        with Image.open(BytesIO(base64.b64decode(image["src"].split(",")[1]))) as picture:
            picture.load()
            assert min(picture.size) >= 300


def test_the_tables_hold_the_numbers(page, evaluation):
    rows = {row[0]: row[1:] for row in table_rows(page)[::-1]}  # of equal names the first
    froc, other = evaluation.froc, evaluation.comparisons["one slice nine times"]
    flat = other.froc
    end = froc.last_fps_per_image
    marked = [f"{value:.3f}" + ("†" if fps > end else "") for fps, value in froc.sensitivity_at.items()]
    assert rows["Sensitivity"] == [*marked, f"{froc.mean_sensitivity:.3f}"]
    low, high = evaluation.by_protocol[0].intervals.sensitivity_at[1]
    assert rows["95 % interval"][1] == f"{low:.3f}–{high:.3f}"
    assert rows["Score threshold"][:3] == ["0.460", "0.410", "0.057"]
    assert [text.rstrip("†") for text in rows["one slice nine times"][:6]] == [
        f"{v:.3f}" for v in flat.sensitivity_at.values()
    ]
    shown = rows["one slice nine times"]
    assert shown[7] == f"{other.test.difference:+.3f}".replace("-", "−")
    assert shown[9] == f"{other.test.p_value:.3f}"
    assert rows["checkpoint sha256"] == ["ab" * 32]
    assert rows["Chosen for false positives per image"] == ["1"]
    assert rows["type: lung"][0] == "10"
    for scores in evaluation.by_protocol:
        assert scores.protocol.name in rows


def test_the_text_names_protocol_sample_and_purpose(page, evaluation):
    text = " ".join(Outline(page).text.split())
    assert "10 slices with 10 lesion boxes of 5 patients" in text
    assert "too few for the intervals to be trusted" in text
    assert "Protocol: MP3D port" in text
    assert "IoU ≥ 0.5, sides x2 − x1" in text
    assert f"{evaluation.ap50:.3f} average precision" in text
    assert "Found 6 of 7" in text
    assert "Missed 3 of 3" in text
    assert "False positives 6 of 10" in text
    assert "lung window −1350 to 150 HU" in text
    assert "soft tissue window −160 to 240 HU" in text  # of false positives, which have no kind
    assert "patient patient00 · series series01 · slice 11" in text
    assert "16 × 16 mm" in text
    assert "size is the long diameter that the data set gives." in text
    assert '"lr": 0.02' in text
    assert "the threshold for 1 false positive per image, chosen on" in text
    assert "Research use only" in text


def test_text_from_outside_is_escaped(page):
    assert "<b>7</b>" not in page
    assert "run <b>7</b>" in Outline(page).text
    assert "--name 'a & b'" in Outline(page).text


def test_files_beside_the_page(folder, page, evaluation):
    for name in ("froc", "protocols", "strata", "calibration"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size[0] >= 1000
        assert base64.b64encode((folder / f"{name}.png").read_bytes()).decode() in page
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["protocol"]["name"] == "MP3D port"
    assert numbers["ap50"] == evaluation.ap50
    assert numbers["froc"]["sensitivity_at"]["1"] == evaluation.froc.sensitivity_at[1]
    assert numbers["froc"]["threshold_at"]["1"] == evaluation.froc.threshold_at[1]
    assert numbers["comparisons"]["one slice nine times"]["threshold_at"]["0.5"] is None
    assert (numbers["num_images"], numbers["num_lesions"], numbers["num_patients"]) == (10, 10, 5)
    assert len(numbers["protocols"]) == 6
    assert numbers["operating_points"] == [vars(evaluation.operating[0])]


def test_without_pixels_there_are_numbers_but_no_pictures(tmp_path):
    files = write_report(tmp_path / "report.html", made_evaluation())
    page = files.page.read_text(encoding="utf-8")
    assert "There are no pictures" in page
    assert len(Outline(page).all("img")) == 4
    assert files.numbers["froc_mean/LUNA16"] > 0
    assert set(files.pictures) == {"froc", "protocols", "strata", "calibration"}


@pytest.mark.parametrize(("number", "told"), [(300, True), (200, False), (100, False)])
def test_the_interval_of_cocos_ap_says_of_how_many_resamples_it_is(tmp_path, number: int, told: bool):
    of = evaluate_detector(Predictions("detection", [key_slice(0, [(*LESION, 0.9)])]), num_replicates=number)
    page = write_report(tmp_path / "report.html", of).page.read_text(encoding="utf-8")
    text = " ".join(Outline(page).text.split())
    assert ("is of the first 200 of them" in text) == told
    assert (", 200 resamples" in text) == told
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert (numbers["intervals"]["replicates"], numbers["ap50_95_replicates"]) == (number, min(number, 200))


def test_with_nothing_detected_the_report_still_stands(tmp_path):
    silent = evaluate_detector(Predictions("detection", [key_slice(0, [])]), num_replicates=100)
    page = write_report(tmp_path / "report.html", silent, lambda _: ct_slice()).page.read_text(encoding="utf-8")
    text = " ".join(Outline(page).text.split())
    assert "No lesion was found." in text
    assert "Missed 1 of 1" in text
    assert json.loads((tmp_path / "metrics.json").read_text())["froc"]["threshold_at"]["1"] is None


def test_slices_that_are_not_at_hand_are_left_out(tmp_path):
    page = write_report(tmp_path / "report.html", made_evaluation(), lambda _: None).page.read_text(encoding="utf-8")
    assert "Their slices are not at hand." in page


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


@pytest.mark.parametrize(("number", "scale"), [(8, "linear"), (3000, "log")])
def test_few_answers_are_counted_on_a_linear_axis(monkeypatch: pytest.MonkeyPatch, number: int, scale: str):
    monkeypatch.setattr(figures, "png_bytes", lambda figure: figure)
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
