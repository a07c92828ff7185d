"""The rules of MMDetection 2's Faster R-CNN, written out plainly, against the heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, roi_align

from mp3d.config import DetectionHead
from mp3d.models import nms
from mp3d.models.faster_rcnn import (
    BoxPredictor,
    LesionRoIHeads,
    LesionRPN,
    MaxIoUMatcher,
    PyramidRoIAlign,
)
from mp3d.models.nms import kept_by_nms

HEAD = DetectionHead(fpn_channels=4, box_features=8, rpn_post_nms=(30, 20))


def boxes(count: int, seed: int, size: float = 128.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, extent = torch.rand(2, count, 2, generator=generator)
    return torch.cat([corner * size * 0.8, corner * size * 0.8 + 4 + extent * size * 0.4], dim=1)


def max_iou_assigner(iou: Tensor, positive: float, negative: float, least: float) -> list[int]:
    """``MaxIoUAssigner`` one anchor at a time: its box, -1 for background, -2 for neither."""
    assigned = []
    for overlaps in iou.T.tolist():
        best = max(overlaps)
        assigned.append(overlaps.index(best) if best >= positive else -1 if best < negative else -2)
    for box, overlaps in enumerate(iou.tolist()):
        best = max(overlaps)
        if best >= least and best > 0:
            for anchor, overlap in enumerate(overlaps):
                if overlap == best:
                    assigned[anchor] = box
    return assigned


@pytest.mark.parametrize("least", [0.0, 0.3, 0.6])
def test_anchors_are_assigned_as_by_mmdetection(least: float):
    for seed in range(20):
        iou = box_iou(boxes(5, seed), boxes(60, seed + 100))
        assert MaxIoUMatcher(0.7, 0.3, least)(iou.clone()).tolist() == max_iou_assigner(iou, 0.7, 0.3, least)


def test_a_box_that_no_anchor_meets_has_none():
    """torchvision would make every anchor its own."""
    iou = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.5, 0.5]])
    assert MaxIoUMatcher(0.7, 0.3, 0.0)(iou).tolist() == [-1, 1, 1]
    assert MaxIoUMatcher(0.7, 0.3, 0.6)(iou).tolist() == [-1, -2, -2]


def rpn_inputs(size: tuple[int, int]) -> tuple[ImageList, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    maps = {
        str(i): torch.randn(2, 4, -(-128 // s), -(-128 // s), generator=generator)
        for i, s in enumerate((4, 8, 16, 32, 64))
    }
    return ImageList(torch.zeros(2, 128, 128), [size, size]), maps


@pytest.mark.parametrize(
    ("border", "size"), [(0.0, (128, 128)), (0.0, (100, 120)), (8.0, (128, 128)), (None, (128, 128))]
)
def test_anchors_that_leave_the_picture_are_not_trained(border: float | None, size: tuple[int, int]):
    """Before they are assigned: the best anchor of a box is the best one inside."""
    rpn = LesionRPN(HEAD.override({"rpn_border_px": border}))
    images, maps = rpn_inputs(size)
    anchors = rpn.anchor_generator(images, list(maps.values()))
    truth = boxes(3, 1, size=90)
    labels, matched = rpn.assign_targets_to_anchors(
        anchors, [{"boxes": truth, "image_size": size}, {"boxes": truth[:0], "image_size": size}]
    )
    reach = 1e9 if border is None else border
    inside = [
        x1 >= -reach and y1 >= -reach and x2 < size[1] + reach and y2 < size[0] + reach
        for x1, y1, x2, y2 in anchors[0].tolist()
    ]
    kept = torch.tensor(inside)
    assigned = max_iou_assigner(box_iou(truth, anchors[0][kept]), 0.7, 0.3, 0.3)
    expected = torch.full((len(kept),), -1.0)
    expected[kept] = torch.tensor([1.0 if box >= 0 else 0.0 if box == -1 else -1.0 for box in assigned])
    assert torch.equal(labels[0], expected)
    assert any(box >= 0 for box in assigned)
    positive = (expected == 1).nonzero()[:, 0]
    own = torch.tensor([box for box in assigned if box >= 0])
    assert torch.equal(matched[0][positive], truth[own])
    assert torch.equal(labels[1], torch.where(kept, 0.0, -1.0))


def test_a_picture_smaller_than_every_anchor_is_trained():
    rpn = LesionRPN(HEAD.override({"anchor_sizes_px": ((64,), (64,), (64,), (64,), (64,))})).train()
    images, maps = rpn_inputs((16, 16))
    target = {"boxes": torch.tensor([[2.0, 2, 12, 12]])}
    _, losses = rpn(images, maps, [target, target])
    assert all(bool(loss.isfinite()) for loss in losses.values())


@pytest.mark.parametrize("beta", [1 / 9, 1.0])
@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_the_losses_of_the_proposals(beta: float, stds: tuple[float, ...]):
    """Of all trained anchors, so that nothing is drawn."""
    torch.manual_seed(0)
    head = HEAD.override({"rpn_beta": beta, "rpn_stds": stds, "rpn_samples": 100_000, "rpn_positive_fraction": 1.0})
    rpn = LesionRPN(head).train()
    images, maps = rpn_inputs((128, 128))
    targets = [{"boxes": boxes(2, 1, 90)}, {"boxes": boxes(1, 2, 90)}]
    _, losses = rpn(images, maps, targets)
    logits, deltas = rpn.head(list(maps.values()))
    anchors = rpn.anchor_generator(images, list(maps.values()))[0]
    logits = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in logits], dim=1)
    deltas = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 4) for level in deltas], dim=1)
    labels, matched = rpn.assign_targets_to_anchors([anchors] * 2, [t | {"image_size": (128, 128)} for t in targets])
    entropy, smooth, sampled = 0.0, 0.0, 0
    for index in range(2):
        trained, positive = labels[index] >= 0, labels[index] == 1
        sampled += int(trained.sum())
        entropy += F.binary_cross_entropy_with_logits(logits[index][trained], labels[index][trained], reduction="sum")
        a, b = anchors[positive], matched[index][positive]
        size = a[:, 2:] - a[:, :2]
        shift = ((b[:, :2] + b[:, 2:]) - (a[:, :2] + a[:, 2:])) / 2 / size
        wanted = torch.cat([shift, ((b[:, 2:] - b[:, :2]) / size).log()], dim=1) / torch.tensor(stds)
        off = (deltas[index][positive] - wanted).abs()
        smooth += torch.where(off < beta, off**2 / (2 * beta), off - beta / 2).sum()
    torch.testing.assert_close(losses["loss_objectness"], entropy / sampled)
    torch.testing.assert_close(losses["loss_rpn_box_reg"], smooth / sampled)


@pytest.mark.parametrize("beta", [1 / 9, 1.0])
def test_the_losses_of_the_boxes_are_of_their_own_class(beta: float):
    heads = LesionRoIHeads(HEAD.override({"box_beta": beta, "num_classes": 3})).train()
    torch.manual_seed(0)
    logits, wanted = torch.randn(6, 4), torch.randn(6, 4)
    deltas = F.pad(torch.randn(6, 12), (4, 0))
    labels = torch.tensor([0, 1, 3, 2, 0, 3])
    losses = heads._losses(logits, deltas, labels, wanted)
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        if label:
            off = (deltas[row, 4 * label : 4 * label + 4] - wanted[row]).abs()
            total += torch.where(off < beta, off**2 / (2 * beta), off - beta / 2).sum()
    torch.testing.assert_close(losses["loss_box_reg"], total / 6)
    torch.testing.assert_close(losses["loss_classifier"], F.cross_entropy(logits, labels))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wanted", [3, 40, 1000])
def test_proposals_are_torchvisions(seed: int, wanted: int, monkeypatch: pytest.MonkeyPatch):
    """Hundreds of overlapping boxes on three levels, some of them out of the picture, some without an extent; by the
    loop of a CPU and by the large kernels of a GPU, there with pictures on their own.
    """
    rpn = LesionRPN(HEAD.model_copy(update={"rpn_pre_nms": (200, 200), "rpn_post_nms": (wanted, wanted)})).eval()
    per_level = [400, 150, 50]
    given = torch.stack([boxes(600, seed), boxes(600, seed + 100)]) - 10
    given[:, ::50, 2:] = given[:, ::50, :2]
    logits = torch.randn(1200, 1, generator=torch.Generator().manual_seed(seed))
    sizes = [(128, 128), (100, 90)]
    theirs = RegionProposalNetwork.filter_proposals(rpn, given, logits, sizes, per_level)
    monkeypatch.setattr(nms, "LARGEST_OVERLAP_TABLE", 200 * 200)
    candidates = rpn._get_top_n_idx(logits.view(2, -1), per_level)
    at_once = rpn.filtered_at_once(given, logits.view(2, -1).sigmoid(), candidates, sizes, per_level)
    for found in (rpn.filter_proposals(given, logits, sizes, per_level), at_once):
        for ours, wanted_ones in zip(found, theirs, strict=True):
            assert all(map(torch.equal, ours, wanted_ones))
    assert len(theirs[0][0]) <= wanted


def test_a_chain_of_boxes_is_kept_every_other_one():
    """Each overlaps the next: what a box suppresses is suppressed itself, forty times over."""
    chain = torch.arange(40.0)[:, None] * torch.tensor([3.0, 0, 3, 0]) + torch.tensor([0.0, 0, 10, 10])
    usable = torch.ones(2, 40, dtype=torch.bool)
    usable[1, 0] = False
    kept = kept_by_nms(torch.stack([chain, chain]), usable, 0.5)
    assert kept[0].nonzero()[:, 0].tolist() == list(range(0, 40, 2))
    assert kept[1].nonzero()[:, 0].tolist() == list(range(1, 40, 2))


def test_without_a_proposal_nothing_is_found():
    heads = LesionRoIHeads(HEAD.override({"num_classes": 2})).eval()
    for method in (heads.postprocess_detections, heads.postprocess_at_once):
        found = method(torch.zeros(0, 3), torch.zeros(0, 12), [boxes(0, 1)] * 2, [(64, 64)] * 2)
        assert [[len(each) for each in part] for part in found] == [[0, 0]] * 3


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("limit", [5, 1000])
def test_findings_are_torchvisions(num_classes: int, limit: int):
    """A GPU's, of three pictures of their own sizes, one without a proposal."""
    heads = LesionRoIHeads(HEAD.override({"num_classes": num_classes, "max_detections": limit})).eval()
    torch.manual_seed(num_classes)
    proposals = [boxes(300, 1) - 10, boxes(0, 2), boxes(100, 3)]
    logits, deltas = 2 * torch.randn(400, num_classes + 1), F.pad(torch.randn(400, 4 * num_classes), (4, 0))
    sizes = [(128, 128), (64, 64), (100, 90)]
    theirs = RoIHeads.postprocess_detections(heads, logits, deltas, proposals, sizes)
    ours = heads.postprocess_at_once(logits, deltas, proposals, sizes)
    for found, wanted in zip(ours, theirs, strict=True):
        assert len(found) == 3
        assert all(map(torch.equal, found, wanted))
    assert 0 < len(ours[0][0]) <= limit


def test_proposals_and_samples_are_as_many_as_configured():
    torch.manual_seed(0)
    rpn, heads = LesionRPN(HEAD), LesionRoIHeads(HEAD.override({"box_samples": 16, "max_detections": 7}))
    images, maps = rpn_inputs((128, 128))
    truth = [{"boxes": boxes(2, 1, 90), "labels": torch.ones(2, dtype=torch.int64)}] * 2
    proposals, _ = rpn.train()(images, maps, truth)
    assert {len(each) for each in proposals} == {30}
    sampled, _, labels, _ = heads.train().select_training_samples(proposals, truth)
    assert {len(each) for each in sampled} == {16}
    assert all(0 < int((each > 0).sum()) <= 4 for each in labels), "the true boxes are proposals too"
    proposals, losses = rpn.eval()(images, maps)
    assert (losses, {len(each) for each in proposals}) == ({}, {20})
    found, _ = heads.eval()(maps, proposals, images.image_sizes)
    assert all(0 < len(each["boxes"]) <= 7 for each in found)


@pytest.mark.parametrize(("samples", "aligned"), [(0, True), (2, False)])
def test_boxes_are_read_from_the_level_of_their_size(samples: int, aligned: bool):
    """112 pixels is the finest level's limit, as in ``SingleRoIExtractor`` (finest_scale 56)."""
    _, maps = rpn_inputs((128, 128))
    sizes = [8, 50, 111, 113, 223, 225, 447, 449]
    given = torch.tensor([[3.0, 5.0, 3 + size, 5 + size] for size in sizes])
    pooled = PyramidRoIAlign(samples, aligned)(maps, [given[:3], given[3:]])
    for row, (size, level) in enumerate(zip(sizes, [0, 0, 0, 1, 1, 2, 2, 3], strict=True)):
        picture = torch.tensor([[float(row >= 3), *given[row].tolist()]])
        stride = (4, 8, 16, 32)[level]
        expected = roi_align(maps[str(level)], picture, 7, 1 / stride, samples, aligned)
        assert torch.equal(pooled[row], expected[0]), size


def test_no_box_is_read_too():
    _, maps = rpn_inputs((128, 128))
    assert PyramidRoIAlign(0, True)(maps, [torch.zeros(0, 4)] * 2).shape == (0, 4, 7, 7)


def test_the_background_has_no_box():
    predictor = BoxPredictor(8, 3)
    assert predictor.bbox_pred.weight.shape == (12, 8)
    logits, deltas = predictor(torch.randn(2, 8))
    assert (logits.shape, deltas.shape) == ((2, 4), (2, 16))
    assert bool((deltas[:, :4] == 0).all())
