"""RoIAlign and the box head as a CPU takes them where nothing is trained, against torchvision's and plain layers."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mp3d.models.faster_rcnn import BoxHead, PyramidRoIAlign
from mp3d.models.roi_align import ROI_STRIDES

SIZE = (96, 160)
RULES = pytest.mark.parametrize(("samples", "aligned"), [(2, False), (2, True), (0, True), (0, False)])


def maps(num_slices: int, dtype: torch.dtype = torch.float32) -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(num_slices, 8, SIZE[0] // stride, SIZE[1] // stride, dtype=dtype) for stride in ROI_STRIDES]
    return OrderedDict((str(n), each.contiguous(memory_format=torch.channels_last)) for n, each in enumerate(made))


def boxes(count: int, seed: int) -> Tensor:
    """Of every level, some thinner than a cell, some many cells long, some on and beyond the border."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([SIZE[1], SIZE[0]])
    size = 2 ** (torch.rand(count, 2, generator=generator) * 11 - 2)
    return torch.cat([corner - size / 2, corner + size / 2], 1)


def theirs(align: PyramidRoIAlign, features: OrderedDict[str, Tensor], rois: list[Tensor]) -> Tensor:
    """As in training: by torchvision's kernel, level by level."""
    with torch.enable_grad():
        return align(features, rois).detach()


@RULES
@pytest.mark.parametrize("counts", [(60,), (25, 0, 31), (0, 0)])
def test_equals_torchvision(counts: tuple[int, ...], samples: int, aligned: bool):
    features, rois = maps(len(counts)), [boxes(count, seed) for seed, count in enumerate(counts)]
    align = PyramidRoIAlign(samples, aligned)
    with torch.no_grad():
        found = align(features, rois)
    assert found.shape == (sum(counts), 8, 7, 7)
    torch.testing.assert_close(found, theirs(align, features, rois), rtol=1e-4, atol=1e-4)


@RULES
def test_boxes_that_run_along_the_last_cells(samples: int, aligned: bool):
    edge = torch.tensor([[0.0, 0, SIZE[1], SIZE[0]], [SIZE[1] - 4, SIZE[0] - 4, SIZE[1], SIZE[0]], [-9, -9, 3, 3]])
    align = PyramidRoIAlign(samples, aligned)
    with torch.no_grad():
        torch.testing.assert_close(align(maps(1), [edge]), theirs(align, maps(1), [edge]), rtol=1e-4, atol=1e-4)


def test_maps_in_bfloat16_are_mixed_in_float32():
    features = maps(1, torch.bfloat16)
    exact = OrderedDict((level, each.float()) for level, each in features.items())
    align = PyramidRoIAlign(0, True)
    with torch.no_grad():
        assert torch.equal(align(features, [boxes(30, 0)]), align(exact, [boxes(30, 0)]))


@pytest.mark.parametrize("count", [0, 5, 16, 45])
def test_the_first_layer_is_a_linear_one(count: int):
    torch.manual_seed(0)
    head = BoxHead(8, 24)
    features = torch.randn(count, 8, 7, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = F.relu(head.fc7(F.relu(head.fc6(features.flatten(1)))))
        torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)
