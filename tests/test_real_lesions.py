"""Linking and the 3D metric on DeepLesion's fully annotated sub-volumes; no pixels are needed."""

import os
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.deeplesion_3d import BOXES, read_boxes
from mp3d.lesions import link_boxes
from mp3d.metrics.froc import froc
from mp3d.metrics.protocols import LENS_3D

SHARED = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
TABLE = SHARED / "deeplesion" / BOXES
pytestmark = pytest.mark.skipif(not TABLE.exists(), reason=f"{TABLE} is absent")


def slices_of(boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each 3D box on every slice that it crosses, its score that of its place in the list."""
    rows = [
        ((x1, y1, x2, y2), z, 0.9 - 0.01 * number)
        for number, (x1, y1, z1, x2, y2, z2) in enumerate(boxes)
        for z in range(z1, z2 + 1)
    ]
    on_slice, numbers, scores = zip(*rows, strict=True)
    return np.array(on_slice, float), np.array(numbers), np.array(scores)


def test_boxes_on_slices_become_the_annotated_lesions_again():
    """All 5,442 boxes of 999 sub-volumes, cut into slices and linked: few are torn or merged, where lesions touch."""
    found, true, equal = [], [], 0
    for sub_volume in read_boxes(TABLE):
        boxes = np.array(sub_volume.boxes, float).reshape(-1, 6)
        true.append(boxes)
        if not len(boxes):
            found.append((np.zeros((0, 6)), np.zeros(0)))
            continue
        on_slice, numbers, scores = slices_of(sub_volume.boxes)
        lesions = link_boxes(on_slice, numbers, scores, np.ones(len(scores), int))
        linked = np.array([lesion.box for lesion in lesions])
        equal += len({tuple(box) for box in boxes.tolist()} & {tuple(box) for box in linked.tolist()})
        found.append((linked, np.array([lesion.score for lesion in lesions])))
    number = sum(map(len, true))
    assert (len(true), number) == (999, 5442)
    assert equal / number > 0.97
    result = froc(found, true, LENS_3D)
    assert result.sensitivity[-1] > 0.99
    assert result.last_fps_per_image < 0.02
