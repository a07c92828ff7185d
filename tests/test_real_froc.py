"""FROC on DeepLesion's real annotation, with detections made from a formula.

The values of the test split are what the authors' own code returns.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from mp3d.metrics.froc import froc
from mp3d.metrics.protocols import MP3D_PORT, THREE_DCE_MULAN, FrocProtocol

SHARED_DATA = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
ANNOTATIONS = SHARED_DATA / "deeplesion" / "DL_info_subset.csv"
VAL, TEST = "2", "3"

pytestmark = pytest.mark.skipif(not ANNOTATIONS.exists(), reason=f"{ANNOTATIONS.parent} is absent")


def made_detections(n: int, true_boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits of varying quality, second hits and false positives of image ``n``; no random numbers."""
    boxes, scores = [], []
    for k, (x1, y1, x2, y2) in enumerate(true_boxes):
        w, h, t = x2 - x1, y2 - y1, 7 * n + 3 * k
        u = 0.5 * ((37 * t) % 101) / 100
        if t % 13:
            boxes.append([x1 + 0.6 * u * w, y1 + 0.4 * u * h, x2 + 0.6 * u * w, y2 + 0.4 * u * h])
            scores.append(0.2 + 0.79 * ((53 * t) % 997) / 997)
        if t % 4 == 0:
            boxes.append([x1 - 0.05 * w, y1, x2, y2 + 0.05 * h])
            scores.append(0.1 + 0.5 * ((29 * t) % 991) / 991)
    for q in range(8):
        s = (31 * n + 17 * q) % 500
        boxes.append([s, (3 * s) % 480, s + 20 + q, (3 * s) % 480 + 18 + q])
        scores.append(0.6 * (((8 * n + q) * 67) % 10007) / 10007)
    return np.array(boxes, dtype=float), np.array(scores)


def read_truths(split: str, keep_noisy: bool) -> list[np.ndarray]:
    """True boxes of the split's key slices, in the order in which the files first appear. The CSV counts from 1."""
    boxes_of: dict[str, list[list[float]]] = {}
    with ANNOTATIONS.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["Train_Val_Test"] == split and (keep_noisy or int(row["Possibly_noisy"]) == 0):
                boxes_of.setdefault(row["File_name"], []).append(
                    [float(v) - 1 for v in row["Bounding_boxes"].split(",")]
                )
    return [np.array(boxes) for boxes in boxes_of.values()]


# split, noisy kept, protocol, images, boxes, detections, end of the curve, percent at 0.5 1 2 4 8 (or at the end), mean
TABLE = [
    (TEST, True, THREE_DCE_MULAN, 4831, 4927, 44431, None, (37.690, 41.932, 50.152, 65.273, 77.288), 48.761924),
    (TEST, True, MP3D_PORT, 4831, 4927, 44431, 8.2503, (36.574, 40.714, 48.813, 63.751, 75.726), 47.462959),
    (TEST, False, THREE_DCE_MULAN, 4817, 4912, 44295, None, (37.541, 41.816, 50.020, 65.289, 77.321), 48.666531),
    (TEST, False, MP3D_PORT, 4817, 4912, 44295, 8.2481, (36.625, 40.737, 48.819, 63.803, 75.835), 47.495928),
    (VAL, True, THREE_DCE_MULAN, 4793, 4889, 44072, None, (37.390, 41.665, 49.826, 65.146, 77.112), 48.506852),
    (VAL, True, MP3D_PORT, 4793, 4889, 44072, 8.2502, (36.490, 40.622, 48.640, 63.592, 75.619), 47.335856),
    (VAL, False, THREE_DCE_MULAN, 4791, 4887, 44061, None, (37.753, 42.009, 50.113, 65.378, 77.266), 48.813178),
    (VAL, False, MP3D_PORT, 4791, 4887, 44061, 8.2505, (36.607, 40.864, 48.864, 63.720, 75.670), 47.513812),
]

FULL_PRECISION = {
    (True, THREE_DCE_MULAN): (
        0.376902780596712, 0.4193221026994114, 0.5015222244773696, 0.6527298558960828, 0.7728841079764562,
    ),
    (True, MP3D_PORT): (
        0.3657398010960016, 0.40714430688045466, 0.48812664907651715, 0.6375076111223869, 0.7572559366754618,
    ),
    (False, THREE_DCE_MULAN): (
        0.3754071661237785, 0.4181596091205212, 0.5002035830618893, 0.6528908794788274, 0.7732084690553745,
    ),
    (False, MP3D_PORT): (
        0.36624592833876224, 0.40736970684039087, 0.48819218241042345, 0.6380293159609121, 0.7583469055374593,
    ),
}  # fmt: skip
"""Test split. Without the extra pixel the last value is the one at the end of the curve."""


@pytest.mark.parametrize(
    ("split", "keep_noisy", "protocol", "images", "boxes", "detections", "end", "percent", "mean"), TABLE
)
def test_reference_values(
    split: str,
    keep_noisy: bool,
    protocol: FrocProtocol,
    images: int,
    boxes: int,
    detections: int,
    end: float | None,
    percent: tuple[float, ...],
    mean: float,
):
    truths = read_truths(split, keep_noisy)
    result = froc([made_detections(n, true_boxes) for n, true_boxes in enumerate(truths)], truths, protocol)
    assert (result.num_images, result.num_lesions, len(result.thresholds)) == (images, boxes, detections)

    values = [result.sensitivity_at[fps] for fps in (0.5, 1, 2, 4)]
    values.append(result.sensitivity_at[8] if end is None else result.sensitivity[-1])
    assert [100 * value for value in values] == pytest.approx(percent, abs=5.1e-4)
    assert 100 * result.mean_sensitivity == pytest.approx(mean, abs=5.1e-7)
    assert result.sensitivity_at[16] == result.sensitivity[-1]
    if end is not None:
        assert result.last_fps_per_image == pytest.approx(end, abs=5.1e-5)
    if split == TEST:
        expected = FULL_PRECISION[keep_noisy, protocol]
        assert values == pytest.approx(expected, abs=1e-9)
        assert result.mean_sensitivity == pytest.approx(np.mean(expected[:4]), abs=1e-9)
