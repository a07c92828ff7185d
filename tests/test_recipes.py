"""Recipes: complete, distinct, plain data, and buildable."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mp3d.config import ClassificationHead, DetectionHead, SegmentationHead, TrainConfig
from mp3d.models import ClipSegmenter, LesionDetector, build_model
from mp3d.models.faster_rcnn import ROI_SIZE
from mp3d.recipes import FINETUNE, PRETRAIN, Recipe
from mp3d.schedule import scaled_to_batch

RECIPES = PRETRAIN + FINETUNE
LARGE = [recipe for recipe in RECIPES if not recipe.__name__.startswith(("synthetic_", "small_"))]
DETECTORS = [recipe for recipe in FINETUNE if recipe().model.head.kind == "detection"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_recipe_is_complete_and_builds_its_model(recipe: Recipe):
    config = recipe()
    assert config.name == recipe.__name__
    assert TrainConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert recipe.__name__ in (recipe.__doc__ or "").split(), "the docstring shows the command"
    with torch.device("meta"):
        model = build_model(config.model, config.clip)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000


CLIPS_PER_EPOCH = {
    "imagenet": 1_281_167, "coco": 118_287, "coco_masks": 118_287, "deeplesion": 22_496, "classes": 1_323,
    "nodules": 2_142,
}  # fmt: skip
"""Training pictures, key slices and nodules of the published data sets; the liver recipes count their steps."""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_docstring_says_what_it_needs_costs_and_scores(recipe: Recipe):
    lines = [line.strip() for line in (recipe.__doc__ or "").splitlines()]
    named = {
        line.split(":")[0]: line for line in lines if line.split(":")[0] in ("Data", "Cost", "Expected", "Measured")
    }
    assert set(named) == {"Data", "Cost", "Expected", "Measured"}
    expected = " ".join(lines).partition("Expected:")[2].partition("Measured:")[0]
    if re.search(r"\d\d\.\d", expected):
        assert re.search(r"published|authors' log|unverified", expected), "a score comes with where it is from"
    assert any(line.startswith("python jobs/") for line in lines)
    if recipe not in LARGE:
        assert named["Cost"].endswith(" on two CPU cores.")
        return
    said = re.search(r"Cost: ([\d.,]+) PFLOP", named["Cost"])
    assert said is not None
    assert float(said[1].replace(",", "")) == pytest.approx(petaflops(recipe()), rel=0.05)


def petaflops(config: TrainConfig) -> float:
    """Of all layers with weights in the whole run, backward as twice forward; counted by torch on the meta device."""
    with torch.device("meta"):
        model = build_model(config.model, config.clip)
        sizes = config.augment.image_sizes or (config.clip.image_size,)
        size = round(sum(sizes) / len(sizes) / 32) * 32 if config.augment.image_sizes else sizes[0]
        clip = torch.zeros(1, 1, config.clip.depth, size, size)
        with FlopCounterMode(display=False) as counter:
            if isinstance(model, ClipSegmenter):
                model.classify(model.decoder(model.backbone.with_stem(clip)))
            elif isinstance(model, LesionDetector):
                maps = model.backbone(clip, [(config.clip.depth // 2,)])
                model.rpn.head(list(maps.values()))
                samples = model.roi_heads.fg_bg_sampler.batch_size_per_image
                model.roi_heads.box_head(torch.zeros(samples, model.backbone.out_channels, ROI_SIZE, ROI_SIZE))
            else:
                model.backbone(clip)
    loop = config.loop
    counted = CLIPS_PER_EPOCH.get(Path(config.shards).name) or (loop.steps_per_epoch or 0) * 16
    return 3 * counter.get_total_flops() * loop.epochs * counted / 1e15


def test_names_are_unique():
    assert len({recipe().name for recipe in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_recipe_trains_at_the_rate_that_it_states(recipe: Recipe):
    config = recipe()
    assert scaled_to_batch(config.optim, config.loop.step_clips * config.loop.num_workers) == config.optim


@pytest.mark.parametrize("recipe", PRETRAIN, ids=lambda recipe: recipe.__name__)
def test_pretraining_reads_three_planes_in_random_order(recipe: Recipe):
    config = recipe()
    assert config.clip.num_slices == 3
    assert config.clip.slice_spacing_mm is None
    assert config.augment.shuffle_planes


@pytest.mark.parametrize("recipe", DETECTORS, ids=lambda recipe: recipe.__name__)
def test_detectors_train_on_slabs_with_replicated_ends_but_the_published_ones(recipe: Recipe):
    config = recipe()
    if recipe.__name__.endswith("_paper"):
        assert config.optim.lr_batch == config.loop.batch_size * config.loop.num_workers == 16
        assert (config.clip.num_key_slices, config.clip.depth, config.model.norm) == (1, 9, "gn3d")
        assert config.model.z_padding == "zeros"
    elif not config.model.keeps_z:
        assert config.clip.num_key_slices == 1
    else:
        assert (config.clip.num_key_slices, config.clip.depth) == (9, 17)
        assert config.model.z_padding == "replicate"
        assert config.model.norm == ("frozen_bn" if recipe.__name__.endswith(("i3d18", "acs18")) else "slice_gn")


def test_the_paper_recipe_is_the_published_one():
    config = next(recipe for recipe in FINETUNE if recipe.__name__ == "deeplesion_mp3d63_paper")()
    assert (config.clip.num_slices, config.clip.slice_spacing_mm, config.clip.window_hu) == (9, 2.5, (-1024, 1050))
    assert (config.model.backbone, config.model.norm, config.model.width) == ("mp3d63", "gn3d", 1)
    assert (config.optim.algorithm, config.optim.lr, config.optim.milestones) == ("sgd", 0.02, (16, 22))
    assert config.loop.batch_size * config.loop.num_workers == 16
    assert config.loop.epochs == 24
    head = config.model.head
    assert isinstance(head, DetectionHead)
    assert (head.anchors, head.anchor_sizes_px) == ("given", ((16,), (32,), (64,), (128,), (256,)))
    assert head.anchor_ratios == (0.5, 1, 2)


def test_the_paper_recipes_have_the_authors_detector():
    """``mp3d_groupconv.py``, and what CSPR's config of MMDetection 1 has otherwise."""
    mp3d, p3d = recipe_named("deeplesion_mp3d63_paper").model.head, recipe_named("deeplesion_p3d18ba_paper").model.head
    assert isinstance(mp3d, DetectionHead)
    assert isinstance(p3d, DetectionHead)
    authors = {
        "num_classes": 1, "fpn_channels": 256, "anchor_sizes_px": ((16,), (32,), (64,), (128,), (256,)),
        "anchor_ratios": (0.5, 1, 2), "rpn_positive_iou": 0.7, "rpn_negative_iou": 0.3, "rpn_min_positive_iou": 0.3,
        "rpn_border_px": 0, "rpn_samples": 256, "rpn_positive_fraction": 0.5, "rpn_stds": (1, 1, 1, 1),
        "rpn_beta": 1 / 9, "rpn_nms_iou": 0.7, "rpn_pre_nms": (2000, 2000), "rpn_post_nms": (1000, 1000),
        "box_iou": 0.5, "box_samples": 512, "box_positive_fraction": 0.25, "box_stds": (0.1, 0.1, 0.2, 0.2),
        "box_beta": 1, "box_features": 1024, "roi_samples": 0, "roi_aligned": True, "score_threshold": 0,
        "box_nms_iou": 0.5, "max_detections": 100,
    }  # fmt: skip
    assert mp3d.model_dump() == authors | {"kind": "detection", "anchors": "given"}
    version_1 = {"rpn_post_nms": (2000, 1000), "roi_samples": 2, "roi_aligned": False}
    assert p3d.model_dump() == mp3d.model_dump() | version_1


@pytest.mark.parametrize("recipe", DETECTORS, ids=lambda recipe: recipe.__name__)
def test_anchors_are_fitted_but_in_the_paper_recipes(recipe: Recipe):
    head = recipe().model.head
    assert isinstance(head, DetectionHead)
    assert (head.anchors == "given") == recipe.__name__.endswith("_paper")


def recipe_named(name: str) -> TrainConfig:
    return next(recipe for recipe in RECIPES if recipe.__name__ == name)()


def test_the_z_pooling_recipe_is_the_published_one():
    config = recipe_named("deeplesion_p3d63_paper")
    assert (config.model.backbone, config.model.keeps_z, config.clip.num_slices) == ("p3d63", False, 9)
    assert config.augment.image_sizes == (384, 448, 512, 576, 640)
    version_1 = {"rpn_post_nms": (2000, 1000), "roi_samples": 2, "roi_aligned": False}
    other = {"name": "deeplesion_p3d18ba_paper", "model.backbone": "p3d18ba"}
    other |= {f"model.head.{name}": value for name, value in version_1.items()}
    assert config.override(other) == recipe_named("deeplesion_p3d18ba_paper")


def test_the_imagenet_recipe_is_the_published_one():
    config = recipe_named("vdt_imagenet_r3d18_paper")
    assert (config.optim.algorithm, config.optim.lr, config.optim.schedule) == ("sgd", 0.1, "cosine")
    assert (config.optim.momentum, config.optim.weight_decay, config.optim.warmup_steps) == (0.9, 1e-4, 0)
    assert (config.loop.epochs, config.loop.batch_size * config.loop.num_workers) == (100, 256)
    assert (config.clip.mean, config.clip.std, config.clip.image_size) == (114.495, 57.63, 224)
    assert (config.augment.horizontal_flip, config.augment.crop_scale) == (0.5, (0.08, 1))
    head = config.model.head
    assert isinstance(head, ClassificationHead)
    assert (head.label_smoothing, head.loss_over_batch, head.num_classes) == (0.1, "mean", 1000)


def test_the_nodule_recipes_are_the_published_ones():
    classify, segment = recipe_named("lidc_classification_paper"), recipe_named("lidc_segmentation_paper")
    for config in (classify, segment):
        clip = config.clip
        assert (clip.num_slices, clip.image_size, clip.slice_spacing_mm, clip.pixel_spacing_mm) == (48, 48, 1, 1)
        assert (config.augment.shift_px, config.augment.quarter_turns) == ((5, 5), True)
        assert (config.model.norm, config.optim.algorithm, config.optim.weight_decay) == ("bn", "adam", 1e-4)
    assert (classify.optim.lr, classify.optim.milestones, classify.optim.gamma) == (5e-4, (30, 60, 90), 0.1)
    assert (classify.loop.epochs, classify.loop.batch_size, classify.loop.num_workers) == (100, 32, 4)
    assert (classify.clip.mean, classify.clip.std) == (99, 77)
    assert (segment.optim.lr, segment.optim.schedule, segment.optim.min_lr) == (1e-3, "poly", 1e-6)
    assert segment.loop.sync_batch_norm
    assert not classify.loop.sync_batch_norm
    assert (segment.loop.epochs, segment.loop.batch_size, segment.loop.num_workers) == (200, 4, 8)
    assert (segment.clip.mean, segment.clip.std) == (123.675, 58.395)
    with torch.device("meta"):
        model = build_model(classify.model, classify.clip)
        assert model.backbone(torch.zeros(1, 1, 48, 48, 48))[-1].shape == (1, 512, 2, 2, 2)


def test_the_liver_recipe_is_the_published_one():
    config = recipe_named("lits_liver_paper")
    assert (config.clip.num_slices, config.clip.image_size, config.clip.slice_spacing_mm) == (32, 256, 1)
    assert (config.clip.window_hu, config.augment.zoom) == ((-200, 250), (0.8, 1.2))
    assert (config.optim.algorithm, config.optim.lr, config.optim.schedule) == ("adam", 1e-4, "poly")
    steps = config.loop.epochs * (config.loop.steps_per_epoch or 0)
    assert steps == pytest.approx(3281, rel=0.01)
    assert config.loop.batch_size * config.loop.num_workers == 16
    head = config.model.head
    assert isinstance(head, SegmentationHead)
    assert (head.decoder, head.channels, head.dropout) == ("unet", 16, 0.1)
    assert (head.cross_entropy_weight, head.dice_weight, head.dice_smooth) == (1, 0.5, 1e-3)
