"""Recipes at smoke size: each learns its own task, on data that the job makes itself."""

from pathlib import Path

import pytest
import torch

from jobs import finetune
from mp3d import cli
from mp3d.checkpoint import open_checkpoint
from mp3d.config import TrainConfig
from mp3d.data.batches import ClipDataset
from mp3d.data.prepare import prepare
from mp3d.data.shard import MANIFEST, open_shards
from mp3d.data.smoke_world import ensure_smoke_shards, smoke_source
from mp3d.errors import ConfigError
from mp3d.launch import run_training
from mp3d.recipes import FINETUNE, Recipe
from mp3d.recipes.smoke import smoke
from mp3d.session import PlainSession
from mp3d.train import start, validate, validation_samples
from tests.recipe_runs import LARGE
from tests.tiny import ID_KEY

IN_EVERY_RUN = {"vdt_imagenet_r3d18_paper", "vdt_coco_masks_r3d18", "deeplesion_mp3d18ba", "lidc_classification"}
"""One of each kind; the others train in `make acceptance`."""
GAIN = 0.3
"""Share of the way from the untrained network's score to a perfect one: some tell dark from bright by chance."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoke")


def untrained_score(config: TrainConfig) -> float:
    shards = open_shards(config.shards)
    every_slice = config.model.head.kind == "segmentation"
    dataset = ClipDataset(shards, validation_samples(config, shards), config.clip, every_slice=every_slice)
    session = PlainSession(Path("unused"), keep=1, device=torch.device("cpu"))
    metrics, name = validate(start(config, session, 1), dataset)
    return metrics[name]


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(recipe, marks=() if recipe.__name__ in IN_EVERY_RUN else pytest.mark.acceptance) for recipe in LARGE],
    ids=lambda recipe: recipe.__name__,
)
def test_a_smoke_recipe_improves_its_own_metric(recipe: Recipe, world: Path, tmp_path: Path):
    config = smoke(recipe())
    folder = world / Path(config.shards).name
    if not (folder / MANIFEST).exists():
        prepare(smoke_source(folder.name), folder, id_key=ID_KEY, runner="local")
    config = config.override({"shards": str(folder), "launch.storage_path": str(tmp_path)})
    before = untrained_score(config)
    after = open_checkpoint(run_training(config)).score
    assert after - before >= GAIN * (1 - before)
    assert after > before


@pytest.mark.parametrize("recipe", LARGE, ids=lambda recipe: recipe.__name__)
def test_what_a_smoke_size_keeps(recipe: Recipe):
    full, small = recipe(), smoke(recipe())
    assert small.name == f"{full.name}_smoke"
    for field in ("backbone", "norm", "strides", "to_2d", "frozen_stages"):
        assert getattr(small.model, field) == getattr(full.model, field)
    assert type(small.model.head) is type(full.model.head)
    assert small.clip.depth == full.clip.depth or small.clip.block == full.clip.block is not None
    assert small.augment.override({"image_sizes": (), "shift_px": (0, 0)}) == full.augment.override(
        {"image_sizes": (), "shift_px": (0, 0)}
    )
    assert small.optim.schedule == full.optim.schedule


def test_a_smoke_size_is_a_name_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("MP3D_ROOT", str(tmp_path))
    args = ["lidc_segmentation_smoke", "--loop.epochs", "1", "--loop.steps-per-epoch", "1"]
    assert finetune.main([*args, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert finetune.main(args) == 0
    assert open_checkpoint(tmp_path / "runs" / "lidc_segmentation_smoke").config.shards == str(
        tmp_path / "data" / "smoke" / "organs"
    )
    capsys.readouterr()
    with pytest.raises(ConfigError, match="did you mean"):
        cli.find_recipe(FINETUNE, "lidc_segmentatoin_smoke")


def test_no_other_data_than_it_knows(tmp_path: Path):
    with pytest.raises(ValueError, match="'birds'"):
        ensure_smoke_shards(tmp_path / "birds")
