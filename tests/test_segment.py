"""Whole series by overlapping blocks: every voxel once, on the series' own grid."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mp3d.config import ClipConfig, ModelConfig, SegmentationHead
from mp3d.models import ClipSegmenter
from mp3d.sample import Clip, Prediction
from mp3d.segment import VolumeSegmenter, cover, largest_components

CPU = torch.device("cpu")


class Threshold(ClipSegmenter):
    """Says class 1 above 100 HU, and notes how often it was asked about a voxel."""

    def __init__(self, clip: ClipConfig) -> None:
        super().__init__(ModelConfig(backbone="resnet3d18", width=0.05, head=SegmentationHead()), clip)
        self.asked = 0

    def forward(self, clips: Sequence[Clip], *_, **__) -> list[Prediction]:
        self.asked += len(clips)
        return [
            Prediction(mask_logits=torch.stack([torch.zeros(plane.shape), (plane.float() - 100)]))
            for clip in clips
            for plane in clip.slices
        ]


def threshold_segmenter(depth: int, size: int, z_mm: float | None, pixel_mm: float | None) -> VolumeSegmenter:
    clip = ClipConfig(
        num_slices=depth, image_size=size, slice_spacing_mm=z_mm, pixel_spacing_mm=pixel_mm, block="anywhere"
    )
    return VolumeSegmenter(Threshold(clip).eval(), clip, CPU)


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 8, 8), (13, 9, 30), (1, 40, 3), (31, 8, 17)])
def test_every_voxel_gets_its_class(shape: tuple[int, int, int]):
    hu = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    hu[hu == 100] = 101
    classes = threshold_segmenter(8, 8, None, None).segment(hu, (3.0, 0.7, 0.7))
    assert np.array_equal(classes, hu > 100)


@pytest.mark.parametrize(("z_mm", "pixel_mm"), [(1.0, 1.0), (4.0, 0.5), (2.5, 0.8)])
def test_the_answer_lies_where_the_object_is(z_mm: float, pixel_mm: float):
    """A sphere of 9 mm; on another grid its rim moves by half a voxel of that grid at most."""
    spacing_mm = (2.5, 0.8, 0.8)
    z, y, x = np.ogrid[:14, :40, :44]
    radius = np.sqrt(((z - 6) * 2.5) ** 2 + ((y - 17) * 0.8) ** 2 + ((x - 25) * 0.8) ** 2)
    hu = np.clip((9 - radius) * 100 + 100, -1000, 1000).astype(np.int16)
    classes = threshold_segmenter(6, 16, z_mm, pixel_mm).segment(hu, spacing_mm)
    reach = np.linalg.norm([max(z_mm, 2.5) / 2, pixel_mm, pixel_mm])
    assert classes[radius < 9 - reach].all()
    assert not classes[radius > 9 + reach].any()
    assert classes.sum() == pytest.approx((radius < 9).sum(), rel=0.12)


def test_blocks_overlap_by_half():
    segmenter = threshold_segmenter(8, 8, None, None)
    segmenter.segment(np.zeros((16, 16, 16), np.int16), (1.0, 1.0, 1.0))
    assert isinstance(segmenter.model, Threshold)
    assert segmenter.model.asked == 3**3


@given(st.integers(1, 60), st.floats(0.2, 4), st.integers(1, 20))
def test_blocks_cover_an_axis(num_source: int, step: float, count: int):
    axis = cover(num_source, step, count)
    covered = np.zeros(len(axis.positions), int)
    for start in axis.starts:
        assert 0 <= start <= len(axis.positions) - count
        covered[start : start + count] += 1
    assert covered.min() >= 1
    assert len(axis.nearest) == num_source
    offsets = axis.positions[axis.nearest] - np.arange(num_source)
    assert np.abs(offsets[: max(1, int((num_source - 1) // step * step) + 1)]).max() <= step / 2 + 1e-9
    assert np.abs(offsets).max() < step


def test_only_the_largest_part_of_each_class_is_kept():
    classes = np.zeros((4, 6, 6), np.uint8)
    classes[0, 0, 0] = classes[1, 1, 1] = classes[2, 2, 2] = 1  # touch by corners: one part of 3
    classes[3, 5, 4:] = 1
    classes[0, 5, 5] = 2
    kept = largest_components(classes)
    assert (kept == 1).sum() == 3
    assert kept[1, 1, 1] == 1
    assert kept[3, 5, 4] == 0
    assert kept[0, 5, 5] == 2
