"""The cost of a run, told before it starts, against the authors' figures and against real steps."""

import pytest
import torch
from torch import Tensor

from mp3d.config import BackboneName, ClassificationHead, ClipConfig, DetectionHead, ModelConfig, SegmentationHead
from mp3d.models import build_model
from mp3d.models.cost import estimate
from mp3d.models.folded import NormKind
from mp3d.sample import Clip, Target

PUBLISHED = {
    "mp3d63": 413.339, "p3d63": 194.691, "mp3d18ba": 219.356, "resnet3d18": 500.624, "resnet3d18_v1c": 573.592,
    "resnet3d50": 747.047,
}  # fmt: skip
"""GFLOP of a clip of 9 x 512 x 512: convolutions, two for each multiplication and addition."""


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_operations_of_the_published_backbones(backbone: BackboneName):
    to_2d = None if "p3d" in backbone else "centre"
    cost = estimate(ModelConfig(backbone=backbone, to_2d=to_2d), ClipConfig(), 512)
    assert round(cost.backbone_flops / 1e9, 3) == PUBLISHED[backbone]
    assert cost.parameters == cost.trained
    if backbone == "mp3d63":  # feature pyramid, proposals, boxes of a thousand of them
        assert (cost.flops - cost.backbone_flops) / 1e9 == pytest.approx(29.7 + 25.9 + 27.8, abs=0.1)


def test_a_slab_costs_its_slices_and_its_key_slices():
    """Nine answers from 17 slices: 86.7 GFLOP each, where a window takes 413."""
    slab = estimate(ModelConfig(), ClipConfig(num_key_slices=9), 512)
    assert slab.backbone_flops / 9 / 1e9 == pytest.approx(86.7, abs=0.2)


HEADS = {
    "detection": (DetectionHead(fpn_channels=8, box_features=8, box_samples=16), "boxes"),
    "classification": (ClassificationHead(num_classes=3), "label"),
    "segmentation": (SegmentationHead(channels=4), "mask"),
}
CLIP = ClipConfig(num_slices=3, slice_spacing_mm=None, image_size=64)
TARGET = Target(
    boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]), label=torch.tensor(1),
    mask=torch.ones(64, 64, dtype=torch.uint8),
)  # fmt: skip


def really_kept(model: ModelConfig) -> int:
    """Bytes that autograd keeps in a real step, weights aside."""
    torch.manual_seed(0)
    network = build_model(model, CLIP)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    clip = Clip(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), (1,))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network([clip], [TARGET])
    return sum(size for address, (size, _) in kept.items() if address not in weights)


@pytest.mark.parametrize(
    ("kind", "backbone", "norm", "frozen_stages"),
    [
        ("detection", "mp3d18ba", "slice_gn", -1),
        ("detection", "mp3d18ba", "slice_gn", 1),
        ("classification", "resnet3d18", "bn", -1),
        ("segmentation", "resnet3d18", "slice_gn", -1),
    ],
)
def test_memory_is_that_of_a_real_step(kind: str, frozen_stages: int, backbone: BackboneName, norm: NormKind):
    """But for losses and anchors, which are small at a real width."""
    head, _ = HEADS[kind]
    model = ModelConfig(backbone=backbone, norm=norm, width=0.25, frozen_stages=frozen_stages, head=head)
    cost = estimate(model, CLIP, 64)
    assert cost.training_bytes + cost.shared_bytes == pytest.approx(really_kept(model), rel=0.12)


def test_what_is_frozen_or_halved_takes_less():
    whole = estimate(ModelConfig(backbone="mp3d18ba"), ClipConfig(), 128)
    frozen = estimate(ModelConfig(backbone="mp3d18ba", frozen_stages=1), ClipConfig(), 128)
    half = estimate(ModelConfig(backbone="mp3d18ba"), ClipConfig(), 128, torch.bfloat16)
    assert frozen.training_bytes < 0.6 * whole.training_bytes
    assert half.training_bytes < 0.6 * whole.training_bytes
    assert half.shared_bytes == pytest.approx(2 * half.parameters, rel=0.01)
    assert frozen.parameters - frozen.trained == 3_136 + 128 + 197_632
    step = whole.of_step(2, adam=True)
    assert step == 2 * whole.training_bytes + whole.shared_bytes + 16 * whole.parameters
    assert frozen.flops == whole.flops
