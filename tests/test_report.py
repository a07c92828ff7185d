"""The report says what was measured, shows it, and needs nothing beside itself."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mp3d.evaluation import (
    Evaluation,
    KeySliceResult,
    Predictions,
    evaluate_detector,
)
from mp3d.report import write_report

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


def test_the_page_says_how_a_detection_below_the_threshold_is_drawn(page):
    assert "Missed: below the threshold (blue, dotted)" in page
    assert page.count("(blue, dotted)") == 2


def test_slices_that_are_not_at_hand_are_left_out(tmp_path):
    page = write_report(tmp_path / "report.html", made_evaluation(), lambda _: None).page.read_text(encoding="utf-8")
    assert "Their slices are not at hand." in page
