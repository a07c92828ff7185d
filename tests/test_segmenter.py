"""The segmenter: whose slices it answers for, what it is trained on, the authors' networks and their losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mp3d.config import UNKNOWN, ClipConfig, DetectionHead, ModelConfig, SegmentationHead, StrideConfig
from mp3d.models import ClipSegmenter, build_model
from mp3d.models.segmentation_losses import mask_losses
from mp3d.sample import Clip, Target

LITS = StrideConfig(stem=1, isotropic=True)
LIDC = StrideConfig(stem=1, pool="none", stages=(1, 2, 1, 2), isotropic=True)


def segmenter(
    backbone: str = "resnet3d18", strides: StrideConfig = LITS, width: float = 0.125, norm: str = "slice_gn", **head
) -> ClipSegmenter:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone, strides=strides, width=width, norm=norm, head=SegmentationHead(**{"dropout": 0, **head})
    )
    built = build_model(config, ClipConfig(num_slices=8, image_size=16, block="centre"))
    assert isinstance(built, ClipSegmenter)
    return built


def ball_clips(count: int = 2) -> tuple[list[Clip], list[Target]]:
    clips, targets = [], []
    z, y, x = torch.meshgrid(torch.arange(8), torch.arange(16), torch.arange(16), indexing="ij")
    for index in range(count):
        ball = (z - 4) ** 2 + (y - 7 - index) ** 2 + (x - 8 + index) ** 2 <= 10
        hu = torch.where(ball, 800, 0) + torch.randint(-20, 20, ball.shape)
        clips.append(Clip(hu.to(torch.int16), tuple(range(8))))
        targets += [Target(mask=plane.to(torch.uint8)) for plane in ball]
    return clips, targets


@pytest.mark.parametrize(
    ("backbone", "strides", "decoder"),
    [
        ("resnet3d18", LITS, "unet"),
        ("resnet3d18", LIDC, "fcn"),
        ("resnet3d18_v1c", StrideConfig(), "unet"),
        ("mp3d18ba", StrideConfig(), "fcn"),
    ],
)
def test_learns_where_the_balls_are(backbone: str, strides: StrideConfig, decoder: str):
    model = segmenter(backbone, strides, decoder=decoder)
    clips, targets = ball_clips()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = torch.stack(list(model(clips, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = torch.stack([prediction["mask_logits"].argmax(0) for prediction in model.eval()(clips)])
    true = torch.stack([target["mask"] for target in targets])
    both = ((predicted == 1) & (true == 1)).sum()
    assert 2 * both / ((predicted == 1).sum() + true.sum()) > 0.6


def test_one_map_for_every_key_slice_in_clip_order():
    model = segmenter(num_classes=3).eval()
    clips, _ = ball_clips()
    whole = model(clips)
    some = model([Clip(clips[0].slices, (5,)), Clip(clips[1].slices, (0, 7))])
    assert whole[0]["mask_logits"].shape == (4, 16, 16)
    for got, index in zip(some, (5, 8, 15), strict=True):
        torch.testing.assert_close(got["mask_logits"], whole[index]["mask_logits"])


def test_answers_in_pixels_of_the_picture_as_it_was_given():
    """Pictures of two sizes are resized and padded into one batch; each alone gives the same, but for the padding."""
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(backbone="resnet3d18", width=0.125, head=SegmentationHead()),
        ClipConfig(num_slices=3, slice_spacing_mm=None, image_size=64),
    ).eval()
    wide, square = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((30, 50), (80, 80)))
    together = model([Clip(wide, (1,)), Clip(square, (1,))])
    assert [prediction["mask_logits"].shape for prediction in together] == [(2, 30, 50), (2, 80, 80)]
    (alone,) = model([Clip(square, (1,))])
    torch.testing.assert_close(together[1]["mask_logits"], alone["mask_logits"], atol=1e-4, rtol=1e-3)


def test_masks_are_scaled_with_the_picture_and_the_padding_is_unknown():
    model = build_model(
        ModelConfig(backbone="resnet3d18", width=0.125, head=SegmentationHead()),
        ClipConfig(num_slices=3, slice_spacing_mm=None, image_size=64),
    )
    assert isinstance(model, ClipSegmenter)
    mask = torch.zeros(16, 32, dtype=torch.uint8)
    mask[4:8, 8:24] = 1
    batch, _ = model.transform([Clip(torch.zeros(3, 16, 32, dtype=torch.uint8), (1,))])
    (scaled,) = model._masks([Target(mask=mask)], batch)
    expected = torch.full((32, 64), 0)
    expected[8:16, 16:48] = 1
    assert torch.equal(scaled, expected)
    batch, _ = model.transform(
        [Clip(torch.zeros(3, 16, 32, dtype=torch.uint8), (1,)), Clip(torch.zeros(3, 64, 64, dtype=torch.uint8), (1,))]
    )
    first, second = model._masks([Target(mask=mask), Target()], batch)
    assert torch.equal(first[:32], expected)
    assert (first[32:] == UNKNOWN).all()
    assert (second == UNKNOWN).all()


def unet_parameters() -> int:
    """UNetNeck (64, 64, 128, 256, 512) and FCNHead(64, 16), counted layer by layer as ``medseg`` lists them."""
    total = 0
    for deep, skip in ((512, 256), (256, 128), (128, 64), (64, 64)):
        total += deep * skip + 2 * skip  # InterpConv3D: 1 x 1 x 1 and its norm
        total += 2 * skip * skip * 27 + 2 * skip + skip * skip * 27 + 2 * skip
    return total + 64 * 16 * 27 + 2 * 16 + 16 * 16 * 27 + 2 * 16 + 16 * 2 + 2


def fcn_parameters() -> int:
    """LIDCFCNHead without its third convolution, which is never called."""
    return (128 + 512) * 512 + 2 * 512 + (64 + 512) * 512 + 2 * 512 + 512 * 128 * 27 + 2 * 128 + 128 * 2 + 2


@pytest.mark.parametrize(
    ("strides", "head", "expected"),
    [(LITS, {}, unet_parameters()), (LIDC, {"decoder": "fcn", "channels": 128}, fcn_parameters())],
)
def test_the_authors_decoders_have_as_many_parameters(strides: StrideConfig, head: dict, expected: int):
    with torch.device("meta"):
        model = segmenter(strides=strides, width=1, norm="bn", **head)
    backbone = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) - backbone == expected


@pytest.mark.parametrize(
    ("strides", "shapes"),
    [
        (LITS, [(64, 32, 64), (64, 16, 32), (128, 8, 16), (256, 4, 8), (512, 2, 4)]),
        (LIDC, [(64, 32, 64), (64, 32, 64), (128, 16, 32), (256, 16, 32), (512, 8, 16)]),
    ],
)
def test_the_authors_encoders_have_these_features(strides: StrideConfig, shapes: list[tuple[int, int, int]]):
    with torch.device("meta"):
        features = segmenter(strides=strides, width=1).backbone.with_stem(torch.zeros(1, 1, 32, 64, 64))
    assert [(each.shape[1], each.shape[2], each.shape[3]) for each in features] == shapes


def example() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    logits = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    return logits, torch.randint(0, 3, (4, 5, 6))


def losses(head: SegmentationHead, masks: Tensor | None = None) -> dict[str, float]:
    logits, drawn = example()
    found = mask_losses(logits, drawn if masks is None else masks, head, [1, 3])
    return {name: value.item() for name, value in found.items()}


def test_mended_losses_are_the_formulas():
    logits, masks = example()
    head = SegmentationHead(num_classes=2, cross_entropy_weight=0.7, dice_weight=0.4, dice_smooth=0.5)
    got = losses(head)
    assert got["loss_cross_entropy"] == pytest.approx(0.7 * F.cross_entropy(logits, masks).item())
    dices = []
    for part in (slice(0, 1), slice(1, 4)):
        for number in (1, 2):
            p, g = logits[part].softmax(1)[:, number], (masks[part] == number).double()
            dices.append((2 * (p * g).sum() + 0.5) / (p.sum() + g.sum() + 0.5))
    assert got["loss_dice"] == pytest.approx(0.4 * (1 - torch.stack(dices).mean()).item())


def test_dice_over_the_batch_with_the_background():
    logits, masks = example()
    got = losses(SegmentationHead(num_classes=2, dice_over="batch", dice_background=True, dice_weight=1, dice_smooth=1))
    dices = []
    for number in range(3):
        p, g = logits.softmax(1)[:, number], (masks == number).double()
        dices.append((2 * (p * g).sum() + 1) / (p.sum() + g.sum() + 1))
    assert got["loss_dice"] == pytest.approx((1 - torch.stack(dices).mean()).item())


def test_unknown_pixels_count_for_nothing():
    logits, masks = example()
    masks[:, 2:] = UNKNOWN
    head = SegmentationHead(num_classes=2)
    got = losses(head, masks)
    seen = mask_losses(logits[:, :, :2], masks[:, :2], head, [1, 3])
    assert got == {name: pytest.approx(value.item()) for name, value in seen.items()}
    nothing = losses(head, torch.full_like(masks, UNKNOWN))
    assert nothing == {"loss_cross_entropy": 0, "loss_dice": 0}


def test_the_lidc_authors_softmax_runs_over_columns_and_their_weights_are_fixed():
    logits, masks = example()
    head = SegmentationHead(
        num_classes=2, loss="lidc_authors", cross_entropy_weight=9, dice_weight=9, dice_smooth=1,
        dice_over="batch", dice_background=True,
    )  # fmt: skip
    got = losses(head)
    truth = F.one_hot(masks, 3).movedim(-1, 1)
    assert got["loss_cross_entropy"] == pytest.approx(-(logits.log_softmax(-1) * truth).mean().item())
    mended = losses(head.override({"loss": "mended", "dice_weight": 0.5}))
    assert got["loss_dice"] == pytest.approx(mended["loss_dice"])
    assert got["loss_cross_entropy"] != pytest.approx(mended["loss_cross_entropy"] / 9, rel=0.1)


def test_the_lits_authors_dice_of_a_perfect_answer_is_two_thirds():
    _, masks = example()
    perfect = 200 * F.one_hot(masks, 3).movedim(-1, 1).double()
    head = SegmentationHead(num_classes=2, dice_weight=1)
    assert mask_losses(perfect, masks, head, [1, 3])["loss_dice"].item() == pytest.approx(0, abs=1e-9)
    authors = mask_losses(perfect, masks, head.override({"loss": "lits_authors"}), [1, 3])["loss_dice"].item()
    assert authors == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "targets is None"),
        (Target(mask=torch.zeros(16, 15, dtype=torch.uint8)), r"mask of \(16, 15\), its slice is \(16, 16\)"),
        (Target(mask=torch.full((16, 16), 2, dtype=torch.uint8)), r"classes \[2\]; they are 0..1, and 255"),
    ],
)
def test_impossible_targets_are_refused(target: Target | None, message: str):
    clips, targets = ball_clips(1)
    with pytest.raises(ValueError, match=message):
        segmenter()(clips, None if target is None else [*targets[:-1], target])


def test_as_many_targets_as_key_slices():
    clips, targets = ball_clips(1)
    with pytest.raises(ValueError, match="7 targets for 8 key slices"):
        segmenter()(clips, targets[:-1])


def test_needs_a_segmentation_head_and_features_along_z():
    with pytest.raises(TypeError, match="a segmenter needs a SegmentationHead"):
        ClipSegmenter(ModelConfig(head=DetectionHead()), ClipConfig())
    with pytest.raises(ValueError, match="p3d18 has no features along z"):
        ModelConfig(backbone="p3d18", head=SegmentationHead())


def test_half_precision_gives_float32_logits():
    model = segmenter().eval()
    clips, _ = ball_clips(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = model(clips)
    assert predictions[0]["mask_logits"].dtype == torch.float32
