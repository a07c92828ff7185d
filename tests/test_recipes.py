"""Recipes: complete, distinct, plain data, and buildable."""

import json

import pytest
import torch

from mp3d.config import DetectionHead, TrainConfig
from mp3d.models import build_model
from mp3d.recipes import FINETUNE, PRETRAIN, Recipe

RECIPES = PRETRAIN + FINETUNE


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_recipe_is_complete_and_builds_its_model(recipe: Recipe):
    config = recipe()
    assert config.name == recipe.__name__
    assert TrainConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert recipe.__name__ in (recipe.__doc__ or "").split(), "the docstring shows the command"
    with torch.device("meta"):
        model = build_model(config.model, config.clip)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000


def test_names_are_unique():
    assert len({recipe().name for recipe in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("recipe", PRETRAIN, ids=lambda recipe: recipe.__name__)
def test_pretraining_reads_three_planes_in_random_order(recipe: Recipe):
    config = recipe()
    assert config.clip.num_slices == 3
    assert config.clip.slice_spacing_mm is None
    assert config.augment.shuffle_planes
    assert config.model.head.kind == "classification"


@pytest.mark.parametrize("recipe", FINETUNE, ids=lambda recipe: recipe.__name__)
def test_detectors_train_on_slabs_but_the_published_one(recipe: Recipe):
    config = recipe()
    if recipe.__name__.endswith("_paper"):
        assert (config.clip.num_key_slices, config.clip.depth, config.model.norm) == (1, 9, "gn3d")
    else:
        assert (config.clip.num_key_slices, config.clip.depth, config.model.norm) == (9, 17, "slice_gn")


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


@pytest.mark.parametrize("recipe", FINETUNE, ids=lambda recipe: recipe.__name__)
def test_anchors_are_fitted_but_in_the_paper_recipes(recipe: Recipe):
    head = recipe().model.head
    assert isinstance(head, DetectionHead)
    assert (head.anchors == "given") == recipe.__name__.endswith("_paper")
