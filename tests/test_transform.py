import pytest
import torch
import torch.nn.functional as F

from mp3d.config import ClipConfig
from mp3d.models.transform import ClipTransform
from mp3d.sample import Clip

AIR = -123.675 / 58.395


def hu_clip(height: int, width: int, depth: int = 3, keys: tuple[int, ...] = (1,), seed: int = 0) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    slices = torch.randint(-2000, 3000, (depth, height, width), generator=generator, dtype=torch.int16)
    return Clip(slices, keys)


def transform(image_size: int = 64, **changes) -> ClipTransform:
    return ClipTransform(ClipConfig(num_slices=3, image_size=image_size, **changes))


def test_hounsfield_units_are_windowed_and_normalised_as_published():
    hu = [-2000, -1024, -500, 0, 13, 40, 400, 1050, 3000]
    expected = [-2.1179, -2.1179, -1.0146, 0.0381, 0.0655, 0.1224, 0.8803, 2.2489, 2.2489]
    slices = torch.tensor(hu, dtype=torch.int16).view(1, 1, 9)
    batch, _ = transform(9)([Clip(slices, (0,))])
    torch.testing.assert_close(batch.tensors[0, 0, 0, 0, :9], torch.tensor(expected), rtol=0, atol=5e-5)


def test_planes_of_a_picture_are_only_normalised():
    slices = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    batch, _ = transform(16, mean=114.495, std=57.63)([Clip(slices, (1,))])
    torch.testing.assert_close(batch.tensors[0, 0, :, :16, :16], (slices.float() - 114.495) / 57.63)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_other_types_are_refused(dtype):
    with pytest.raises(TypeError, match="give int16 Hounsfield units or uint8 colour planes"):
        transform()([Clip(torch.zeros(3, 8, 8, dtype=dtype), (1,))])


def test_the_right_size_is_not_interpolated():
    clip = hu_clip(64, 40)
    batch, _ = transform(64)([clip])
    expected = ((clip.slices.float() + 1024) / 2074 * 255).clamp(0, 255).sub(123.675).div(58.395)
    assert batch.tensors.shape == (1, 1, 3, 64, 64)
    torch.testing.assert_close(batch.tensors[0, 0, :, :, :40], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "size", "padded"),
    [(50, 100, (32, 64), (32, 64)), (100, 50, (64, 32), (64, 32)), (31, 20, (64, 41), (64, 64))],
)
def test_the_longer_side_is_resized_and_air_is_padded(height, width, size, padded):
    clip = hu_clip(height, width)
    batch, _ = transform(64)([clip])
    assert batch.image_sizes == [size]
    assert batch.given_sizes == [(height, width)]
    assert batch.tensors.shape == (1, 1, 3, *padded)
    inside = batch.tensors[0, 0, :, : size[0], : size[1]]
    whole, _ = transform(max(height, width))([clip])
    source = whole.tensors[0, 0, :, :height, :width]
    expected = F.interpolate(source[None], size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(inside, expected)
    outside = batch.tensors.clone()
    outside[0, 0, :, : size[0], : size[1]] = AIR
    torch.testing.assert_close(outside, torch.full_like(outside, AIR))


def test_clips_of_different_size_share_a_batch():
    batch, _ = transform(64)([hu_clip(64, 30), hu_clip(90, 128, keys=(0, 2))])
    assert batch.image_sizes == [(64, 30), (45, 64)]
    assert batch.tensors.shape == (2, 1, 3, 64, 64)
    assert batch.tensors.dtype == torch.float32
    assert batch.per_key_slice(batch.image_sizes) == [(64, 30), (45, 64), (45, 64)]


def test_image_size_can_be_overridden():
    batch, _ = transform(64)([hu_clip(50, 100)], image_size=96)
    assert batch.image_sizes == [(48, 96)]


def test_clips_of_different_depth_are_refused():
    with pytest.raises(ValueError, match=r"have \[3, 5\] slices; they must all have the same number"):
        transform()([hu_clip(8, 8), hu_clip(8, 8, depth=5)])


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="the batch has no clip"):
        transform()([])


def test_boxes_follow_the_picture():
    clips = [hu_clip(50, 100), hu_clip(64, 64, keys=(0, 2))]
    boxes = torch.tensor([[10.0, 5.0, 100.0, 50.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in range(3)]
    batch, scaled = transform(64)(clips, targets)
    expected = torch.tensor([[10 * 64 / 100, 5 * 32 / 50, 64, 32]])
    torch.testing.assert_close(scaled[0]["boxes"], expected)
    assert torch.equal(scaled[1]["boxes"], boxes)
    assert torch.equal(scaled[2]["labels"], torch.tensor([1]))
    assert torch.equal(targets[0]["boxes"], torch.tensor([[10.0, 5.0, 100.0, 50.0]]))


@pytest.mark.parametrize(("height", "width"), [(50, 100), (100, 50), (31, 20), (333, 257), (64, 64)])
def test_boxes_come_back_as_they_were(height, width):
    x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values * width
    y = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)).sort(dim=1).values * height
    boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
    both = transform(64)
    batch, scaled = both([hu_clip(height, width)], [{"boxes": boxes, "labels": torch.ones(200, dtype=torch.int64)}])
    (back,) = both.postprocess([{"boxes": scaled[0]["boxes"], "scores": torch.ones(200)}], batch)
    torch.testing.assert_close(back["boxes"], boxes, rtol=3e-7, atol=0)


def test_a_bright_spot_stays_inside_its_box():
    slices = torch.full((3, 120, 80), -1000, dtype=torch.int16)
    slices[1, 90:110, 8:20] = 1000
    target = {"boxes": torch.tensor([[8.0, 90.0, 20.0, 110.0]]), "labels": torch.tensor([1])}
    batch, scaled = transform(64)([Clip(slices, (1,))], [target])
    x1, y1, x2, y2 = scaled[0]["boxes"][0].tolist()
    rows, columns = torch.nonzero(batch.tensors[0, 0, 1] > 0, as_tuple=True)  # more than half bright
    assert rows.min() + 0.5 >= y1
    assert rows.max() + 0.5 <= y2
    assert columns.min() + 0.5 >= x1
    assert columns.max() + 0.5 <= x2
    assert (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) >= 0.7 * (x2 - x1) * (y2 - y1)


def test_predictions_are_clipped_to_the_given_clip():
    both = transform(64)
    batch, _ = both([hu_clip(50, 100)])
    (back,) = both.postprocess([{"boxes": torch.tensor([[-3.0, -2.0, 80.0, 40.0]]), "scores": torch.ones(1)}], batch)
    assert back["boxes"].tolist() == [[0, 0, 100, 50]]


def test_one_target_per_key_slice():
    with pytest.raises(ValueError, match="1 targets for 2 key slices; give one for each"):
        transform()([hu_clip(8, 8, keys=(0, 2))], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}])
