import pytest
import torch

from mp3d.config import BackboneName, ClassificationHead, ClipConfig, DetectionHead, ModelConfig
from mp3d.errors import ConfigError
from mp3d.models import build_model
from mp3d.models.anchor_fit import STRIDES
from mp3d.models.anchors import build_anchor_generator
from mp3d.models.detector import LesionDetector
from mp3d.sample import Clip, Target

HEAD = DetectionHead(
    fpn_channels=16,
    box_features=32,
    anchor_sizes_px=((8,), (16,), (32,), (64,), (128,)),
    rpn_pre_nms=(100, 100),
    rpn_post_nms=(50, 50),
    rpn_samples=64,
    box_samples=64,
)
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


def detector(num_slices: int = 3, image_size: int = 64, seed: int = 0, **changes) -> LesionDetector:
    torch.manual_seed(seed)
    model = ModelConfig(backbone="mp3d18ba", width=0.125, head=HEAD).override(changes)
    built = build_model(model, ClipConfig(num_slices=num_slices, image_size=image_size))
    assert isinstance(built, LesionDetector)
    return built


def blob(height: int = 64, width: int = 48, depth: int = 3, keys: tuple[int, ...] = (1,)) -> tuple[Clip, list[Target]]:
    """A bright box in noise, seen on every slice."""
    slices = torch.randint(-50, 50, (depth, height, width), generator=torch.Generator().manual_seed(0)).short()
    slices[:, 20:36, 10:30] += 900
    target = Target(boxes=torch.tensor([[10.0, 20.0, 30.0, 36.0]]), labels=torch.tensor([1]))
    return Clip(slices, keys), [target] * len(keys)


def nothing() -> Target:
    return Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


def test_four_named_parts():
    assert [name for name, _ in detector().named_children()] == ["transform", "backbone", "rpn", "roi_heads"]


def test_finds_the_lesion_it_was_trained_on():
    model = detector(**{"head.rpn_border_px": None})  # of a picture as small as this most anchors leave it
    clip, targets = blob()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(120):
        loss = torch.stack(list(model([clip], targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    with torch.no_grad():
        (prediction,) = model.eval()([clip])
    x1, y1, x2, y2 = prediction["boxes"][0].tolist()
    overlap = max(min(x2, 30) - max(x1, 10), 0) * max(min(y2, 36) - max(y1, 20), 0)
    assert overlap / ((x2 - x1) * (y2 - y1) + 20 * 16 - overlap) > 0.5
    assert prediction["scores"][0] > 0.5


def test_losses_are_float32_under_autocast_and_near_the_exact_ones():
    clip, targets = blob()
    model = detector()
    torch.manual_seed(1)
    exact = model([clip], targets)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model([clip], targets)
    assert set(exact) == set(rounded) == LOSSES
    assert all(loss.dtype == torch.float32 for loss in rounded.values())
    assert rounded["loss_objectness"].item() == pytest.approx(exact["loss_objectness"].item(), rel=0.05)


def test_boxes_are_not_rounded_under_autocast():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (prediction,) = detector(image_size=256).eval()([blob(256, 256)[0]])
    boxes = prediction["boxes"]
    assert boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())


@pytest.mark.parametrize("backbone", ["mp3d18ba", "mp3d63", "resnet3d18", "resnet3d18_v1c"])
def test_key_slices_without_lesions_train(backbone):
    model = detector(backbone=backbone)
    clip, targets = blob(keys=(1,))
    for batch_targets in ([nothing(), nothing()], [targets[0], nothing()]):
        model.zero_grad()
        losses = model([clip, clip], batch_targets)
        torch.stack(list(losses.values())).sum().backward()
        assert all(bool(loss.isfinite()) for loss in losses.values())
        # every parameter takes part in every step, as distributed training needs
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_clips_of_two_sizes_and_an_image_size_for_training():
    model = detector()
    wide, wide_targets = blob(40, 100)
    tall, tall_targets = blob(64, 48)
    losses = model([wide, tall], [*wide_targets, *tall_targets], image_size=96)
    assert set(losses) == LOSSES
    with torch.no_grad():
        predictions = model.eval()([wide, tall])
    for prediction, (height, width) in zip(predictions, ((40, 100), (64, 48)), strict=True):
        boxes = prediction["boxes"]
        assert len(boxes) == len(prediction["scores"]) == len(prediction["labels"]) > 0
        assert bool((boxes >= 0).all())
        assert bool((boxes <= torch.tensor([width, height, width, height])).all())
        assert bool((prediction["scores"].diff() <= 0).all())


def test_a_slab_answers_for_each_of_its_key_slices():
    model = detector(num_slices=9).eval()
    slab, _ = blob(depth=17, keys=tuple(range(4, 13)))
    slab.slices[12:] += 300
    with torch.no_grad():
        together = model([slab])
        single = [model([Clip(slab.slices, (key,))])[0] for key in slab.key_slices]
    assert len(together) == 9
    for ours, alone in zip(together, single, strict=True):
        torch.testing.assert_close(ours["boxes"], alone["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours["scores"], alone["scores"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(together[0]["scores"], together[-1]["scores"])


def test_a_slab_of_labelled_slices_trains():
    model = detector(num_slices=9)
    slab, targets = blob(depth=17, keys=(4, 8, 12))
    assert set(model([slab], [targets[0], nothing(), targets[2]])) == LOSSES


def test_slabs_of_a_batch_may_differ_in_their_key_slices():
    model = detector(num_slices=9)
    slab, targets = blob(depth=17, keys=(4, 8, 12))
    other, _ = blob(depth=17, keys=(7,))
    losses = model([slab, other], [*targets, nothing()])
    assert set(losses) == LOSSES
    torch.stack(list(losses.values())).sum().backward()
    with torch.no_grad():
        model.eval()
        together = model([slab, other])
        alone = model([slab]) + model([other])
    assert len(together) == 4
    for one, same in zip(together, alone, strict=True):
        torch.testing.assert_close(one["boxes"], same["boxes"], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="3 targets for 4 key slices"):
        model.train()([slab, other], targets)


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        ([10, 20, 10, 36], 1, r"target 1 has the box \[10.0, 20.0, 10.0, 36.0\]; a box is .* 0 <= x1 < x2 <= 48"),
        ([10, 36, 30, 20], 1, "target 1 has the box"),
        ([-1, 20, 30, 36], 1, "target 1 has the box"),
        ([10, 20, 49, 36], 1, "target 1 has the box"),
        ([10, 20, 30, float("nan")], 1, "target 1 has the box"),
        ([10, 20, 30, 36], 2, r"target 1 has the labels \[2\]; lesions are 1..1"),
        ([10, 20, 30, 36], 0, r"target 1 has the labels \[0\]; lesions are 1..1"),
    ],
)
def test_impossible_targets_are_refused(box, label, message):
    clip, targets = blob()
    bad = Target(boxes=torch.tensor([box], dtype=torch.float32), labels=torch.tensor([label]))
    with pytest.raises(ValueError, match=message):
        detector()([clip, clip], [targets[0], bad])


def test_missing_targets_are_refused():
    clip, targets = blob()
    with pytest.raises(ValueError, match="targets is None"):
        detector()([clip])
    with pytest.raises(ValueError, match="1 targets for 2 key slices"):
        detector()([clip, clip], targets)
    with pytest.raises(ValueError, match=r"target 0 has \['label'\]; a detection target has boxes and labels"):
        detector()([clip], [Target(label=torch.tensor(1))])
    with pytest.raises(ValueError, match=r"target 0 has boxes of shape \(1, 4\) for 2 labels"):
        detector()([clip], [Target(boxes=targets[0]["boxes"], labels=torch.tensor([1, 1]))])


def test_frozen_stages_get_no_gradient():
    model = detector(frozen_stages=1)
    clip, targets = blob()
    torch.stack(list(model([clip], targets).values())).sum().backward()
    frozen = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == {"stem", "stage1"}


def test_anchors_stand_on_fixed_strides():
    generator = build_anchor_generator(HEAD)
    maps = [torch.zeros(2, 1, -(-96 // stride), -(-160 // stride), dtype=torch.bfloat16) for stride in STRIDES]
    from torchvision.models.detection.image_list import ImageList

    anchors, same = generator(ImageList(torch.zeros(2, 1, 96, 160), [(96, 160)] * 2), maps)
    assert torch.equal(anchors, same)
    assert anchors.dtype == torch.float32
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    last = centres[-2 * 3 * 3 :: 3]  # P6: 2 rows of 3 cells with 3 anchors each
    assert last.tolist() == [[0, 0], [64, 0], [128, 0], [0, 64], [64, 64], [128, 64]]
    assert len(anchors) == 3 * sum(map_.shape[2] * map_.shape[3] for map_ in maps)


def test_published_anchors():
    generator = build_anchor_generator(DetectionHead())
    assert generator.num_anchors_per_location() == [3] * 5
    sizes = [(cell[:, 2:] - cell[:, :2]).prod(1).sqrt().mean().item() for cell in generator.cell_anchors]
    assert sizes == pytest.approx([16, 32, 64, 128, 256], rel=1e-6)
    width, height = (generator.cell_anchors[4][0, 2:] - generator.cell_anchors[4][0, :2]).tolist()
    assert height / width == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("sizes", [((8,), (16,)), ((8,), (16, 20), (32,), (64,), (128,)), ((), (), (), (), ())])
def test_wrong_anchor_tables_are_refused(sizes):
    with pytest.raises(ConfigError, match="needs 5 tuples of the same length"):
        build_anchor_generator(DetectionHead(anchor_sizes_px=sizes))


def test_needs_a_detection_head():
    with pytest.raises(TypeError, match="a detector needs a DetectionHead"):
        LesionDetector(ModelConfig(head=ClassificationHead(num_classes=2)), ClipConfig())


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("mp3d63", 45_156_437), ("p3d63", 45_121_877), ("mp3d18ba", 32_369_045), ("resnet3d18", 50_262_869),
        ("resnet3d50", 63_995_221),
    ],
)  # fmt: skip
def test_parameter_counts_of_the_published_detectors(backbone: BackboneName, expected: int):
    """3D ResNets have no group transform there."""
    to_2d = "centre" if backbone.startswith("resnet") else None
    with torch.device("meta"):
        model = build_model(ModelConfig(backbone=backbone, to_2d=to_2d), ClipConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_parameter_counts_of_the_published_parts():
    with torch.device("meta"):
        model = LesionDetector(ModelConfig(), ClipConfig())
    counts = [
        sum(each.numel() for each in part.parameters()) for part in (model.backbone.fpn, model.rpn, model.roi_heads)
    ]
    assert counts == [3_344_384, 593_935, 13_901_830]
