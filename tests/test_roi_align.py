"""Our RoIAlign and RoI layers for CPUs against torchvision's."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from mp3d.models.roi_align import ROI_LEVELS, ROI_STRIDES, PyramidRoIAlign, RoIMLP

SIZE = (96, 160)


def maps(num_slices: int, dtype: torch.dtype = torch.float32) -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(num_slices, 8, SIZE[0] // stride, SIZE[1] // stride, dtype=dtype) for stride in ROI_STRIDES]
    return OrderedDict(
        zip(ROI_LEVELS, (each.contiguous(memory_format=torch.channels_last) for each in made), strict=True)
    )


def boxes(count: int, seed: int) -> Tensor:
    """Of every level, some thinner than a cell, some on and beyond the border."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([SIZE[1], SIZE[0]])
    size = 2 ** (torch.rand(count, 2, generator=generator) * 11 - 2)
    return torch.cat([corner - size / 2, corner + size / 2], 1)


def theirs() -> MultiScaleRoIAlign:
    align = MultiScaleRoIAlign(list(ROI_LEVELS), 7, 2)
    align.scales, align.map_levels = [1 / stride for stride in ROI_STRIDES], initLevelMapper(2, 5)
    return align


@pytest.mark.parametrize("counts", [(40,), (25, 0, 31), (0, 0)])
def test_equals_torchvision(counts: tuple[int, ...]):
    features, rois = maps(len(counts)), [boxes(count, seed) for seed, count in enumerate(counts)]
    with torch.no_grad():
        expected = theirs()(features, rois, [SIZE] * len(counts))
        found = PyramidRoIAlign()(features, rois, [SIZE] * len(counts))
    assert found.shape == expected.shape == (sum(counts), 8, 7, 7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_boxes_that_run_along_the_last_cells():
    edge = torch.tensor([[0.0, 0, SIZE[1], SIZE[0]], [SIZE[1] - 4, SIZE[0] - 4, SIZE[1], SIZE[0]], [-9, -9, 3, 3]])
    with torch.no_grad():
        expected = theirs()(maps(1), [edge], [SIZE])
        torch.testing.assert_close(PyramidRoIAlign()(maps(1), [edge], [SIZE]), expected, rtol=1e-4, atol=1e-4)


def test_maps_in_bfloat16_are_mixed_in_float32():
    features = maps(1, torch.bfloat16)
    exact = OrderedDict((level, each.float()) for level, each in features.items())
    with torch.no_grad():
        assert torch.equal(
            PyramidRoIAlign()(features, [boxes(30, 0)], [SIZE]), PyramidRoIAlign()(exact, [boxes(30, 0)], [SIZE])
        )


def gradients(align: MultiScaleRoIAlign) -> list[Tensor]:
    features = maps(1)
    for each in features.values():
        each.requires_grad_()
    pooled = align(features, [boxes(9, 1)], [SIZE])
    return list(torch.autograd.grad((pooled**2).sum(), list(features.values())))


def test_gradients_are_those_of_torchvision():
    for ours, expected in zip(gradients(PyramidRoIAlign()), gradients(theirs()), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("count", [0, 5, 16, 45])
def test_the_layers_take_channels_last_features_as_they_are(count: int):
    torch.manual_seed(0)
    ours, reference = RoIMLP(8 * 49, 24), TwoMLPHead(8 * 49, 24)
    reference.load_state_dict(ours.state_dict())
    features = torch.randn(count, 8, 7, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(ours(features), reference(features), rtol=1e-4, atol=1e-5)
