"""A series to lesions with their place and size in the patient: findings on slices, linked, in millimetres."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mp3d.data.series import Volume
from mp3d.lesions import LINK_OVERLAP, LinkedLesion, link_boxes, reach_in_slices, without_parts
from mp3d.predict import Finding, Point, edge_to_lps_mm


@dataclass(frozen=True)
class Lesion:
    """Findings on neighbouring slices that are taken for one lesion.

    Attributes:
        findings: by rising slice; one a slice.
        best: the one with the highest score.
        box_px: ``x1 y1 x2 y2`` around all of them, half-open; ``slices`` from the first to the last, both included.
        size_mm: extent of that box along columns, rows and slices.
        diameter_mm: the longest side of a box on a slice.
        centre_lps_mm: of the box around all of them.
    """

    findings: tuple[Finding, ...]
    best: Finding
    box_px: tuple[float, float, float, float]
    slices: tuple[int, int]
    size_mm: tuple[float, float, float]
    diameter_mm: float
    centre_lps_mm: Point

    @property
    def score(self) -> float:
        return self.best.score

    @property
    def label(self) -> int:
        return self.best.label


def group_findings(
    findings: Sequence[Finding], volume: Volume, grid_spacing_mm: float | None, min_overlap: float = LINK_OVERLAP
) -> list[Lesion]:
    """The findings of one series as lesions, best first: linked by :func:`~mp3d.lesions.link_boxes`, and each once by
    :func:`~mp3d.lesions.without_parts`.

    Args:
        grid_spacing_mm: of the z grid that the detector answered on (``clip.slice_spacing_mm``).
    """
    linked = link_boxes(
        boxes=np.array([finding.box_px for finding in findings], float).reshape(-1, 4),
        slices=np.array([finding.slice_index for finding in findings], int),
        scores=np.array([finding.score for finding in findings], float),
        labels=np.array([finding.label for finding in findings], int),
        reach=reach_in_slices(volume.spacing_mm[0], grid_spacing_mm),
        min_overlap=min_overlap,
    )
    return [_lesion(each, findings, volume) for each in without_parts(linked, min_overlap)]


def _lesion(linked: LinkedLesion, findings: Sequence[Finding], volume: Volume) -> Lesion:
    x1, y1, z1, x2, y2, z2 = linked.box.tolist()
    own = tuple(findings[index] for index in linked.members)
    return Lesion(
        findings=own,
        best=findings[linked.best],
        box_px=(x1, y1, x2, y2),
        slices=(int(z1), int(z2)),
        size_mm=linked.size_mm(volume.spacing_mm),
        diameter_mm=max(finding.diameter_mm for finding in own),
        centre_lps_mm=edge_to_lps_mm(volume, (x1 + x2) / 2, (y1 + y2) / 2, (z1 + z2) / 2),
    )
