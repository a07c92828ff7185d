"""Rotation, magnification, crops: pixels, boxes and masks go the same way; presets are what they say."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mp3d.config import UNKNOWN, AugmentConfig, TrainConfig
from mp3d.data.augment import MIN_VISIBLE, augment, augment_block, other_intensities, random_resized_crop
from mp3d.data.view import View, draw_view, viewed, viewed_boxes
from mp3d.sample import Clip, Target

HEIGHT, WIDTH = 60, 90
STRONG = AugmentConfig(preset="strong", image_sizes=())
NO_FLIPS = STRONG.override({"horizontal_flip": 0.0, "z_flip": 0.0, "contrast": (1.0, 1.0), "brightness": 0.0})
GEOMETRY = NO_FLIPS.override({"noise": 0.0, "rotation_deg": 30.0})


def ellipse(rng: np.random.Generator) -> tuple[Tensor, Target]:
    """A bright ellipse somewhere on a dark picture, its box and its mask."""
    half = rng.uniform(4, 11, 2)
    centre = np.array([rng.uniform(half[0] + 1, WIDTH - half[0] - 1), rng.uniform(half[1] + 1, HEIGHT - half[1] - 1)])
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = ((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2 <= 1
    rows, columns = np.nonzero(inside)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return torch.from_numpy(inside * 900).to(torch.int16), Target(
        boxes=torch.tensor([box], dtype=torch.float32), labels=torch.ones(1, dtype=torch.int64),
        mask=torch.from_numpy(inside.astype(np.uint8)),
    )  # fmt: skip


def extent(marked: Tensor) -> list[int]:
    rows, columns = torch.nonzero(marked, as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("seed", range(40))
def test_boxes_and_masks_go_where_the_pixels_go(seed: int):
    rng = np.random.default_rng(seed)
    (first, target), (second, other) = ellipse(rng), ellipse(rng)
    clip = Clip(torch.stack([first, torch.zeros_like(first), second]), (0, 2))
    seen, targets = augment(clip, [target, other], GEOMETRY, np.random.default_rng(seed))
    assert seen.slices.dtype == torch.int16
    assert seen.slices.shape == clip.slices.shape
    for key, changed in zip(seen.key_slices, targets, strict=True):
        (box,) = changed["boxes"].tolist()
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= WIDTH
        assert box[3] <= HEIGHT
        assert box == pytest.approx(extent(seen.slices[key] > 450), abs=1.6), "the box of the pixels, within about one"
        marked = changed["mask"] == 1
        bright = seen.slices[key] > 450
        assert (marked & bright).sum() / (marked | bright).sum() >= 0.85


def test_without_a_rotation_boxes_are_exact():
    """Magnified twice about the middle (45, 30) and moved by (3, -2)."""
    boxes = torch.tensor([[40.0, 25.0, 50.0, 45.0]])
    assert viewed_boxes(boxes, View(0, 2.0, (3, -2)), (HEIGHT, WIDTH)).tolist() == [[38, 18, 58, 58]]


def test_a_quarter_turn_is_numpys():
    square = torch.randint(-1000, 1000, (2, 31, 31), dtype=torch.int16)
    turned, _ = viewed(square, [], View(angle_deg=90))
    assert torch.equal(turned, torch.rot90(square, -1, (1, 2)))


def test_nothing_changes_without_a_change():
    slices, target = ellipse(np.random.default_rng(0))
    same, targets = viewed(slices[None], [target], View())
    assert torch.equal(same[0], slices)
    assert targets == [target]


def test_beyond_the_picture_is_air_and_unknown():
    slices, target = ellipse(np.random.default_rng(1))
    small, (changed,) = viewed(slices[None], [target], View(zoom=0.5))
    assert (small[0, :14] == -1024).all()
    assert (changed["mask"][:14] == UNKNOWN).all()
    black, _ = viewed(torch.full((3, HEIGHT, WIDTH), 200, dtype=torch.uint8), [], View(zoom=0.5))
    assert (black[:, :14] == 0).all()


def test_boxes_too_far_apart_for_the_magnification_stay_whole():
    boxes = torch.tensor([[1.0, 1, 9, 9], [80, 50, 89, 59]])
    for seed in range(20):
        view = draw_view(
            AugmentConfig(zoom=(3, 4), image_sizes=()), np.random.default_rng(seed), (HEIGHT, WIDTH), boxes
        )
        placed = viewed_boxes(boxes, view, (HEIGHT, WIDTH))
        assert placed.min() >= -1e-3
        assert placed[:, 2].max() <= WIDTH + 1e-3
        assert placed[:, 3].max() <= HEIGHT + 1e-3
        assert view.zoom >= 1


def test_without_boxes_the_view_stays_on_the_picture():
    for seed in range(20):
        view = draw_view(
            AugmentConfig(zoom=(1, 2), image_sizes=()), np.random.default_rng(seed), (60, 60), torch.zeros(0, 4)
        )
        bright, _ = viewed(torch.full((1, 60, 60), 500, dtype=torch.int16), [], view)
        assert (bright[:, 1:-1, 1:-1] == 500).all()


@pytest.mark.parametrize("seed", range(20))
def test_boxes_follow_a_crop_and_those_hardly_left_are_dropped(seed: int):
    planes = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 10, 30, 40], [60, 5, 85, 25], [50, 40, 56, 58]])
    for value, (x1, y1, x2, y2) in zip((80, 160, 240), boxes.int().tolist(), strict=True):
        planes[:, y1:y2, x1:x2] = value
    labels = torch.tensor([1, 2, 3])
    target = Target(boxes=boxes, labels=labels, mask=planes[0] // 80)
    cropped, (changed,) = random_resized_crop(planes, [target], (0.2, 0.8), np.random.default_rng(seed))
    shown = {label: int((changed["mask"] == label).sum()) for label in (1, 2, 3)}
    for box, label in zip(changed["boxes"].tolist(), changed["labels"].tolist(), strict=True):
        assert box == pytest.approx(extent(changed["mask"] == label), abs=3)
        assert abs(cropped[0][changed["mask"] == label].float().median() - 80 * label) < 15
    for label in {1, 2, 3} - set(changed["labels"].tolist()):
        area = (boxes[label - 1, 2:] - boxes[label - 1, :2]).prod().item()
        assert shown[label] <= MIN_VISIBLE * area / 0.2 * 1.1, (
            "a fifth of the picture, at least, was brought to its size"
        )
    assert len(target["boxes"]) == 3, "the given target is left alone"


def test_intensities_change_by_as_much_as_was_asked():
    slices = torch.full((2, 40, 40), 13, dtype=torch.int16)
    assert other_intensities(slices, AugmentConfig(), np.random.default_rng(0), (-1024, 1050)) is slices
    moved = AugmentConfig(brightness=0.1)
    shifts = [
        other_intensities(slices, moved, np.random.default_rng(s), (-1000, 1026))[0, 0, 0].item() - 13
        for s in range(60)
    ]
    assert 150 < max(shifts) <= 203
    assert -203 <= min(shifts) < -150
    stretched = other_intensities(slices + 100, AugmentConfig(contrast=(2, 2)), np.random.default_rng(0), (-1000, 1026))
    assert (stretched == 213).all()
    noisy = other_intensities(slices, AugmentConfig(noise=0.01), np.random.default_rng(0), (-1000, 1000)).float()
    assert noisy.std().item() == pytest.approx(20, rel=0.1)
    white = other_intensities(
        torch.full((3, 4, 4), 250, dtype=torch.uint8),
        moved.override({"brightness": 1.0}),
        np.random.default_rng(3),
        (0, 1),
    )
    assert white.dtype == torch.uint8


def test_the_mask_of_a_block_follows_its_rotation():
    rng = np.random.default_rng(5)
    marked = np.zeros((4, 40, 40), np.uint8)
    marked[:, 10:25, 12:30] = 1
    hu = marked.astype(np.int16) * 900
    turned, masks = augment_block(hu, marked, GEOMETRY, rng, (-1024, 1050))
    bright = turned > 450
    known = masks != UNKNOWN
    assert known.float().mean() > 0.7
    assert ((masks == 1) == bright)[known].float().mean() > 0.97
    assert not torch.equal(turned, torch.from_numpy(hu))


def test_a_preset_is_what_it_sets_and_given_values_win():
    assert STRONG.preset is None
    assert (STRONG.rotation_deg, STRONG.zoom, STRONG.noise) == (15, (0.75, 1.33), 0.01)
    mine = AugmentConfig(preset="strong", rotation_deg=3.0, z_flip=0.0)
    assert (mine.rotation_deg, mine.z_flip, mine.brightness) == (3, 0, 0.05)
    assert AugmentConfig(preset="flips") == AugmentConfig()
    assert AugmentConfig(preset="none").horizontal_flip == 0
    assert AugmentConfig().override({"preset": "light"}).zoom == (0.9, 1.1)
    assert AugmentConfig(preset="none", horizontal_flip=0.5).horizontal_flip == 0.5


def test_a_preset_sets_all_its_fields_whatever_stood_there():
    run = TrainConfig(name="a", shards="s", augment=STRONG).override({"augment.brightness": 0.2})
    changed = run.override({"augment.z_flip": 0.25, "augment.preset": "none", "augment.noise": 0.02})
    assert changed.augment == AugmentConfig(preset="none", z_flip=0.25, noise=0.02, image_sizes=())
    assert run.override({"augment.preset": "flips"}).augment == AugmentConfig(image_sizes=())
    assert run.override({"augment.preset": None}) == run
