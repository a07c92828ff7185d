"""Augmentation: boxes follow the pixels, and everything is a function of the generator."""

import numpy as np
import torch

from mp3d.config import AugmentConfig
from mp3d.data.augment import augment, middle_square, mirrored, random_resized_crop
from mp3d.sample import Clip, Target


def boxed_clip() -> tuple[Clip, list[Target]]:
    """Five slices of 20 x 30; a bright box on slices 1 and 3, elsewhere on each."""
    slices = torch.zeros(5, 20, 30, dtype=torch.int16)
    targets: list[Target] = []
    for key, (x1, y1, x2, y2) in {1: (3, 4, 9, 12), 3: (20, 2, 30, 7)}.items():
        slices[key, y1:y2, x1:x2] = 100 + key
        targets.append({"boxes": torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32), "labels": torch.tensor([1])})
    return Clip(slices, (1, 3)), targets


def assert_boxes_hold_the_bright_pixels(clip: Clip, targets: list[Target]) -> None:
    for key, target in zip(clip.key_slices, targets, strict=True):
        rows, columns = torch.nonzero(clip.slices[key] > 0, as_tuple=True)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["boxes"].tolist() == [[float(edge) for edge in box]]


def test_flips_carry_boxes_and_key_slices_along():
    for seed in range(8):
        clip, targets = boxed_clip()
        rng = np.random.default_rng(seed)
        assert_boxes_hold_the_bright_pixels(*augment(clip, targets, AugmentConfig(image_sizes=()), rng))


def test_both_flips_happen_about_half_the_time():
    first = [augment(*boxed_clip(), AugmentConfig(), np.random.default_rng(seed))[0] for seed in range(60)]
    z_flips = sum(bool((clip.slices[1] == 103).any()) for clip in first)
    x_flips = sum(bool((clip.slices == 101)[..., 15:].any()) for clip in first)
    assert 15 < z_flips < 45
    assert 15 < x_flips < 45


def test_mirroring_twice_is_nothing():
    _, (target, _) = boxed_clip()
    assert torch.equal(mirrored(mirrored(target, 30), 30)["boxes"], target["boxes"])


def test_the_given_target_is_left_alone():
    clip, targets = boxed_clip()
    before = targets[0]["boxes"].clone()
    augment(clip, targets, AugmentConfig(horizontal_flip=1, z_flip=1), np.random.default_rng(0))
    assert torch.equal(targets[0]["boxes"], before)


def test_planes_are_shuffled_in_all_orders():
    planes = torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    config = AugmentConfig(horizontal_flip=0, z_flip=0, shuffle_planes=True)
    orders = {
        tuple(augment(Clip(planes, (1,)), [{}], config, np.random.default_rng(seed))[0].slices[:, 0, 0].tolist())
        for seed in range(60)
    }
    assert len(orders) == 6


def test_random_crop_keeps_size_and_type_and_stays_inside():
    planes = torch.full((3, 40, 60), 200, dtype=torch.uint8)
    for seed in range(20):
        cropped, _ = random_resized_crop(planes, [], (0.08, 1.0), np.random.default_rng(seed))
        assert cropped.shape == planes.shape
        assert cropped.dtype == torch.uint8
        assert (cropped == 200).all()


def test_masks_follow_a_random_crop():
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[5:22, 30:51] = 3
    planes = (mask * 80).expand(3, 40, 60)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cropped, (target,) = random_resized_crop(planes, [Target(mask=mask)], (0.2, 1.0), rng)
        assert set(target["mask"].unique().tolist()) <= {0, 3}
        assert ((cropped[0] > 120) == (target["mask"] == 3)).float().mean() > 0.97
    assert mask.sum() == 3 * 17 * 21


def test_the_middle_of_a_picture_is_cut_square():
    """224 of a picture whose shorter side is 256, here an eighth of both."""
    planes = torch.zeros(3, 32, 64, dtype=torch.uint8)
    planes[:, 2:30, 18:46] = 9
    cut, (target,) = middle_square(planes, [Target(mask=planes[0].clone())], 28)
    assert cut.shape == (3, 28, 28)
    assert (cut == 9).all()
    assert (target["mask"] == 9).all()


def test_square_crops_have_one_size():
    planes = torch.full((3, 40, 80), 7, dtype=torch.uint8)
    for seed in range(10):
        cropped, _ = random_resized_crop(planes, [], (0.08, 1.0), np.random.default_rng(seed), square=24)
        assert cropped.shape == (3, 24, 24)
        assert (cropped == 7).all()
