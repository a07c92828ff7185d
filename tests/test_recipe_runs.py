"""Every recipe on made data in the true format of its data set; test_real_recipes.py has the published ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mp3d.data.coco import read_coco
from mp3d.data.deeplesion import read_deeplesion
from mp3d.data.lits import read_lits
from mp3d.data.pictures import read_picture_folders
from mp3d.data.prepare import prepare
from mp3d.data.smoke_world import smoke_source
from mp3d.data.synthetic import write_picture_world
from mp3d.recipes import Recipe
from tests.recipe_runs import LARGE, check_first_batch, check_two_steps_and_two_more
from tests.test_deeplesion import lesion, write_slices, write_table
from tests.test_lits import write as write_lits_case
from tests.tiny import ID_KEY

IN_EVERY_RUN = {"vdt_imagenet_v1c_paper", "vdt_coco_mp3d18ba", "deeplesion_p3d18ba_paper", "lits_liver_paper"}
"""The others train in `make acceptance`."""


def write_coco(root: Path) -> None:
    """Bright rectangles, with boxes and outlines."""
    for name, count in (("train2017", 6), ("val2017", 3)):
        images, annotations = [], []
        (root / name).mkdir(parents=True)
        for number in range(1, count + 1):
            pixels = np.full((60, 80, 3), 40, np.uint8)
            x, y, w, h = 5 + 4 * number, 6, 30, 22
            pixels[y : y + h, x : x + w] = 220
            Image.fromarray(pixels).save(root / name / f"{number:012}.jpg")
            images.append({"id": number, "file_name": f"{number:012}.jpg", "height": 60, "width": 80})
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, w, h], "iscrowd": 0}
                | {"segmentation": [outline]}
            )
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the folder's name that recipes have."""
    raw, made = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("shards")
    write_picture_world(raw / "imagenet", num_per_class=4, seed=1)
    write_coco(raw / "coco")
    (raw / "deeplesion").mkdir()
    table = []
    for number, split in enumerate(("1", "1", "2")):
        folder = f"00001{number}_01_01"
        write_slices(raw / "deeplesion", folder, range(1, 6), size=64)
        table.append(lesion(folder, 3, Train_Val_Test=split, Image_size="64, 64", Bounding_boxes="8, 10, 30, 28"))
    write_table(raw / "deeplesion", table)
    for case in (0, 1, 3):  # 0 is of the authors' validation split
        write_lits_case(raw / "lits", case)
    sources = {
        "imagenet": read_picture_folders(raw / "imagenet"),
        "coco": read_coco(raw / "coco"),
        "coco_masks": read_coco(raw / "coco", masks=True),
        "deeplesion": read_deeplesion(raw / "deeplesion"),
        "liver": read_lits(raw / "lits", classes="liver"),
        "classes": smoke_source("nodules"),
        "nodules": smoke_source("organs"),
    }
    for name, source in sources.items():
        prepare(source, made / name, id_key=ID_KEY, runner="local")
    return {name: made / name for name in sources}


@pytest.mark.parametrize("recipe", LARGE, ids=lambda recipe: recipe.__name__)
def test_the_first_batch_at_full_size(recipe: Recipe, shards: dict[str, Path]):
    check_first_batch(recipe, shards[Path(recipe().shards).name])


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(recipe, marks=() if recipe.__name__ in IN_EVERY_RUN else pytest.mark.acceptance) for recipe in LARGE],
    ids=lambda recipe: recipe.__name__,
)
def test_two_steps_and_two_more(recipe: Recipe, shards: dict[str, Path], tmp_path: Path):
    check_two_steps_and_two_more(recipe, shards[Path(recipe().shards).name], tmp_path)
