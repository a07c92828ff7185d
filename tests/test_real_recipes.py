"""Every recipe on a piece of its own data set as it was published; LiTS is in test_recipe_runs.py, on made files."""

import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mp3d.data.coco import read_coco
from mp3d.data.deeplesion import read_deeplesion
from mp3d.data.lidc import read_lidc
from mp3d.data.pictures import read_picture_folders
from mp3d.data.series import CTSeries
from mp3d.data.source import Item, Source
from mp3d.recipes import Recipe
from tests.recipe_runs import LARGE, check_first_batch, check_two_steps_and_two_more, split_shards

ROOT = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"no folder {ROOT}")
WITH_DATA = [recipe for recipe in LARGE if not recipe.__name__.startswith("lits")]
IN_EVERY_RUN = {"deeplesion_mp3d18ba", "lidc_segmentation_paper"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the folder's name that recipes have."""
    unpacked, made = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("shards")
    with tarfile.open(ROOT / "natural" / "tiny_imagenet20.tar.gz") as archive:
        archive.extractall(unpacked, filter="data")
    lesions = read_deeplesion(ROOT / "deeplesion")
    sources = {
        "imagenet": first_of_each_split(read_picture_folders(unpacked / "tiny-imagenet-20")),
        "coco": first_of_each_split(read_coco(ROOT / "natural" / "coco", masks=True)),
        # two studies of one patient: of two, for the sake of this test
        "deeplesion": replace(lesions, items=tuple(of_another_patient(item) for item in lesions.items)),
        "classes": read_lidc(ROOT / "lidc", task="classification", min_readers=1, indeterminate="malignant"),
        "nodules": read_lidc(ROOT / "lidc", task="segmentation", min_readers=1),
    }
    for name, source in sources.items():
        split = (lambda number: ("train", "val")[number % 2]) if source.items[0].members == () else None
        if name in ("classes", "nodules"):
            patients = sorted({item.patient for item in source.items})
            numbered = [patients.index(item.patient) for item in source.items]
            split = lambda number, of=numbered: ("train", "val")[of[number] % 2]  # noqa: E731
        split_shards(source, made / name, split or (lambda number, of=source: of.items[number].split or "train"))
    return {name: made / name for name in sources} | {"coco_masks": made / "coco"}


def of_another_patient(item: Item) -> Item:
    return replace(item, patient=item.key, load=partial(renamed, item.load, item.key))


def renamed(load: Callable[[], CTSeries], patient: str) -> CTSeries:
    return replace(load(), patient=patient)


def first_of_each_split(source: Source) -> Source:
    """One batch of pictures of each: published sets are too large for a test."""
    chosen = {item.split: item for item in reversed(source.items)}
    return replace(source, items=tuple(chosen.values()))


@pytest.mark.parametrize("recipe", WITH_DATA, ids=lambda recipe: recipe.__name__)
def test_the_first_batch_at_full_size(recipe: Recipe, shards: dict[str, Path]):
    check_first_batch(recipe, shards[Path(recipe().shards).name])


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=() if recipe.__name__ in IN_EVERY_RUN else pytest.mark.acceptance)
        for recipe in WITH_DATA
        if not recipe.__name__.startswith("lidc_classification")  # two patients have no two classes to validate on
    ],
    ids=lambda recipe: recipe.__name__,
)
def test_two_steps_and_two_more(recipe: Recipe, shards: dict[str, Path], tmp_path: Path):
    check_two_steps_and_two_more(recipe, shards[Path(recipe().shards).name], tmp_path)
