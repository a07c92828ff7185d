import json

import pytest
import torch
from torch import nn

from mp3d.config import ClassificationHead, ClipConfig, DetectionHead, ModelConfig
from mp3d.errors import CheckpointError
from mp3d.models import build_model
from mp3d.models.backbone import build_backbone
from mp3d.models.transfer import Reinitialised, TransferReport, initialise_backbone

DETECTION = DetectionHead(fpn_channels=8, box_features=8)


def model(head=DETECTION, num_slices: int = 9, seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    config = ModelConfig(backbone="mp3d18ba", width=0.125, head=head).override(changes)
    return build_model(config, ClipConfig(num_slices=num_slices))


def classifier(**changes) -> nn.Module:
    return model(ClassificationHead(num_classes=5), num_slices=3, seed=1, **changes)


def test_a_classifier_starts_a_detector():
    source, detector = classifier(), model()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    report = initialise_backbone(detector, source.state_dict())
    after = detector.state_dict()
    for key, value in source.backbone.state_dict().items():
        assert torch.equal(after[f"backbone.backbone.{key}"], value)
    assert set(report.moved) == {key for key in after if key.startswith("backbone.backbone.")}
    for item in report.reinitialised:
        assert torch.equal(after[item.key], before[item.key])
    assert report.unused == ("fc.weight", "fc.bias")


def test_every_tensor_of_both_sides_is_accounted_for():
    source, detector = classifier(), model()
    report = initialise_backbone(detector, source.state_dict())
    fresh = [item.key for item in report.reinitialised]
    assert sorted([*report.moved, *fresh]) == sorted(detector.state_dict())
    assert len(report.moved) + len(report.unused) == len(source.state_dict())


def test_a_detector_only_lends_its_backbone():
    """Group transforms of another number of slices are named with both shapes."""
    source, detector = model(num_slices=3, seed=1), model()
    report = initialise_backbone(detector, source.state_dict())
    assert Reinitialised("backbone.group_transforms.0.weight", (8, 9, 1, 1), (8, 3, 1, 1)) in report.reinitialised
    assert any(item.key == "rpn.head.cls_logits.weight" for item in report.reinitialised)
    assert report.unused == ()


def test_a_detector_starts_a_classifier_and_a_bare_backbone_a_detector():
    target = classifier()
    report = initialise_backbone(target, model().state_dict())
    assert {item.key for item in report.reinitialised} == {"fc.weight", "fc.bias"}
    bare = build_backbone(ModelConfig(backbone="mp3d18ba", width=0.125))
    report = initialise_backbone(model(), bare.state_dict())
    assert len(report.moved) == len(bare.state_dict())


def test_batch_norm_weights_start_a_group_norm_network():
    source = classifier(norm="bn")
    detector = model()
    report = initialise_backbone(detector, source.state_dict())
    assert len(report.moved) == len(detector.backbone.backbone.state_dict())
    assert (
        sum(key.endswith("running_mean") for key in report.unused) == 36
    )  # the stem, four in each of eight blocks, three shortcuts


def test_another_stem_is_the_only_thing_left_behind():
    source = classifier(backbone="resnet3d18")
    target = model(ClassificationHead(num_classes=2), num_slices=3, backbone="resnet3d18_v1c")
    report = initialise_backbone(target, source.state_dict())
    fresh = {item.key.rsplit(".", 4)[0] for item in report.reinitialised if item.key.startswith("backbone")}
    assert fresh == {"backbone.stem"}
    assert Reinitialised("backbone.stem.layers.0.conv.weight", (4, 1, 3, 3, 3), (8, 1, 7, 7, 7)) in report.reinitialised


@pytest.mark.parametrize("changes", [{"width": 0.25}, {"backbone": "mp3d63"}, {"backbone": "resnet3d18"}])
def test_another_network_is_refused_and_nothing_is_changed(changes):
    detector = model()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(CheckpointError, match="backbone weights have a counterpart in the source, first missing: "):
        initialise_backbone(detector, classifier(**changes).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_a_source_without_a_backbone_is_refused():
    with pytest.raises(CheckpointError, match="0 keys ending in stem.layers.0.conv.weight.* begin with weight, bias"):
        initialise_backbone(model(), nn.Linear(2, 2).state_dict())


def test_summary_names_every_key_once():
    report = TransferReport(
        moved=("backbone.stem.layers.0.conv.weight", "backbone.stem.layers.0.norm.weight"),
        reinitialised=(
            Reinitialised("fc.weight", (5, 8), (3, 8)),
            Reinitialised("fc.bias", (5,), None),
        ),
        unused=("rpn.weight",),
    )
    assert report.summary().splitlines() == [
        "moved 2 tensors, re-initialised 2, unused 1 of the source",
        "moved:",
        "  backbone.stem.layers.0.conv: weight",
        "  backbone.stem.layers.0.norm: weight",
        "re-initialised (shape here, in the source):",
        "  fc: weight (5, 8), (3, 8); bias (5,), none",
        "unused (only in the source):",
        "  rpn: weight",
    ]
    assert json.loads(json.dumps(report.as_dict()))["reinitialised"][0] == {
        "key": "fc.weight",
        "shape": [5, 8],
        "source_shape": [3, 8],
    }
