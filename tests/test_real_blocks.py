"""The nodule recipes on cubes of published CTs of LIDC-IDRI: the grid of the recipe, and two steps of training."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mp3d.config import UNKNOWN
from mp3d.data.batches import ClipDataset
from mp3d.data.blocks import read_block
from mp3d.data.lidc import read_lidc
from mp3d.data.prepare import prepare
from mp3d.data.samples import Sample
from mp3d.data.shard import ShardSet, decode_image, decode_truth, open_shards
from mp3d.data.stream import Place
from mp3d.models import build_model
from mp3d.recipes import Recipe
from mp3d.recipes.volumes import lidc_classification, lidc_segmentation
from tests.tiny import ID_KEY

ROOT = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data") / "lidc"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"no folder {ROOT}")


def cubes(task: str, out: Path) -> ShardSet:
    source = read_lidc(ROOT, task=task, min_readers=1, indeterminate="malignant")  # pyright: ignore[reportArgumentType]
    prepare(source, out, id_key=ID_KEY, runner="local")
    return open_shards(out)


@pytest.fixture(scope="module")
def nodules(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return cubes("segmentation", tmp_path_factory.mktemp("nodules") / "shards")


def test_a_nodule_keeps_volume_and_density_on_the_grid_of_the_recipe(nodules: ShardSet):
    """Of the stored cube and of 64 mm at 1 mm: cubic millimetres and mean HU, of nodules of at least 100 mm³."""
    clip = lidc_segmentation().clip.override({"num_slices": 64, "image_size": 64})
    compared = 0
    for entry in nodules.entries:
        rows = list(nodules.iter_rows(entry))
        hu = np.stack([decode_image(row) for row in rows])
        mask = np.stack([decode_truth(row).mask for row in rows]) == 1
        stored = mask.sum() * np.prod(entry.spacing_mm)
        block = read_block(nodules, entry, ((entry.num_rows - 1) / 2, None, None), clip)
        assert block.hu.shape == (64, 64, 64)
        if stored >= 100:
            assert (block.masks == 1).sum() == pytest.approx(stored, rel=0.15)
            assert block.hu[block.masks == 1].mean() == pytest.approx(hu[mask].mean(), abs=40)
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("recipe", [lidc_classification, lidc_segmentation], ids=lambda recipe: recipe.__name__)
def test_two_steps_on_real_cubes(tmp_path: Path, nodules: ShardSet, recipe: Recipe):
    config = recipe().override({"model.width": 0.05, "clip.num_slices": 24, "clip.image_size": 24})
    is_mask = config.model.head.kind == "segmentation"
    shards = nodules if is_mask else cubes("classification", tmp_path / "shards")
    samples = [Sample(entry, entry.num_rows // 2) for entry in shards.entries]
    dataset = ClipDataset(shards, samples, config.clip, config.augment, every_slice=is_mask)
    torch.manual_seed(0)
    model = build_model(config.model, config.clip)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(2):
        clip, targets, infos = dataset[Place(0, step)]
        assert clip.slices.shape == (24, 24, 24)
        assert len(targets) == len(infos) == len(clip.key_slices) == (24 if is_mask else 1)
        if is_mask:
            assert {int(value) for target in targets for value in target["mask"].unique()} <= {0, 1, UNKNOWN}
        loss = torch.stack(list(model([clip], targets).values())).sum()
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
