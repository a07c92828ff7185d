"""The FROC protocols of the field, by name: what counts as a hit, what as a false positive, where the curve is read.

Published figures differ by protocol more than by method: on the same 400 images two of these rules are 5 points apart.
So a figure without its protocol's name means nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mp3d.metrics.boxes import Boxes, Shares, box_iobb, box_iobb_plus_one, box_iou, box_iou_plus_one, centre_closeness

ANY = float(np.nextafter(0, 1))
"""The least overlap above none."""
KEY_SLICE_RATES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
FIRST_FOUR = (0.5, 1.0, 2.0, 4.0)
"""What the usual mean of DeepLesion is over."""
EIGHTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""LUNA16's seven rates, all in its mean."""


@dataclass(frozen=True)
class FrocProtocol:
    """The rules behind a FROC figure.

    Attributes:
        name: how the protocol is called in outputs.
        source: where the rules were read.
        overlap: of found and true boxes; ``overlap_name`` says it in words.
        threshold: a true box is found from this overlap on.
        further_hits: what a hit on a lesion already found is: ``ignored``, and one detection may find several lesions;
            or ``false positives``, and detections and lesions are matched one to one, each detection to the free lesion
            that it overlaps most.
        equal_scores: how they enter the curve: the false positives among them first, then what they find; or together,
            as one straight piece.
        in_mm: boxes are given in mm, in pixels else.
        fps_per_image: where the sensitivity is read, ascending.
        mean_over: those of them that enter the mean.
        per: what false positives are counted for.
    """

    name: str
    source: str
    overlap: Callable[[Boxes, Boxes], Shares]
    overlap_name: str
    threshold: float
    further_hits: Literal["ignored", "false positives"] = "ignored"
    equal_scores: Literal["false positives first", "together"] = "false positives first"
    in_mm: bool = False
    fps_per_image: tuple[float, ...] = KEY_SLICE_RATES
    mean_over: tuple[float, ...] = FIRST_FOUR
    per: str = "image"

    def __post_init__(self) -> None:
        if not set(self.mean_over) <= set(self.fps_per_image):
            raise ValueError(f"mean_over {self.mean_over} must be among fps_per_image {self.fps_per_image}")


MP3D_PORT = FrocProtocol(
    name="MP3D port",
    source="MP3D, lesion.py (the authors' port to MMDetection 2)",
    overlap=box_iou,
    overlap_name="IoU ≥ 0.5, sides x2 − x1",
    threshold=0.5,
)
"""Our default: no extra pixel."""

THREE_DCE_MULAN = FrocProtocol(
    name="3DCE/MULAN",
    source="CADLab, 3DCE and MULAN (without MULAN's limit of 50 boxes of a score from 0.05 on); AlignShift, A3D, SATr",
    overlap=box_iou_plus_one,
    overlap_name="IoU ≥ 0.5, sides x2 − x1 + 1",
    threshold=0.5,
)
"""One extra pixel in every width and height."""

IOBB = FrocProtocol(
    name="IoBB",
    source="Yan et al., DeepLesion, J. Med. Imaging 2018",
    overlap=box_iobb,
    overlap_name="intersection over found box ≥ 0.5",
    threshold=0.5,
)

LUNA16 = FrocProtocol(
    name="LUNA16",
    source="LUNA16, noduleCADEvaluationLUNA16.py",
    overlap=centre_closeness,
    overlap_name="found centre within the lesion's radius",
    threshold=ANY,
    equal_scores="together",
    in_mm=True,
    fps_per_image=EIGHTHS,
    mean_over=EIGHTHS,
)
"""The radius is half the longer side of the true box. LUNA16 knows findings that count for nothing; there are none."""

NNDETECTION_10 = FrocProtocol(
    name="nnDetection, IoU 0.1",
    source="nnDetection, froc.py and matching.py",
    overlap=box_iou,
    overlap_name="IoU ≥ 0.1, one to one",
    threshold=0.1,
    further_hits="false positives",
    equal_scores="together",
    fps_per_image=EIGHTHS,
    mean_over=EIGHTHS,
)

NNDETECTION_50 = FrocProtocol(
    name="nnDetection, IoU 0.5",
    source="nnDetection, froc.py and matching.py",
    overlap=box_iou,
    overlap_name="IoU ≥ 0.5, one to one",
    threshold=0.5,
    further_hits="false positives",
    equal_scores="together",
    fps_per_image=EIGHTHS,
    mean_over=EIGHTHS,
)

PROTOCOLS = (MP3D_PORT, THREE_DCE_MULAN, IOBB, LUNA16, NNDETECTION_10, NNDETECTION_50)
"""Of boxes on slices, all from one prediction file."""

LENS_3D = FrocProtocol(
    name="LENS 3D",
    source="DeepLesion_manual_test_set, evaluation_sample.py (Yan et al., TMI 2020)",
    overlap=box_iobb_plus_one,
    overlap_name="3D intersection over found box ≥ 0.3, the last slice counted",
    threshold=0.3,
    fps_per_image=(*EIGHTHS, 16.0),
    mean_over=EIGHTHS,
    per="sub-volume",
)
"""Of 3D boxes ``x1 y1 z1 x2 y2 z2`` in voxels, both slices included."""
