"""State-dict names and shapes against lists printed from the authors' models."""

import os
from pathlib import Path

import pytest

from mp3d.models.released import authors_name
from tests.test_released import our_shapes

SHARED = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
KEYS = SHARED.parent / "reference" / "keys"

pytestmark = pytest.mark.skipif(not KEYS.is_dir(), reason=f"no key lists in {KEYS}")


@pytest.mark.parametrize(
    ("backbone", "file"),
    [
        ("mp3d63", "mp3d63_groupconv9.txt"),
        ("mp3d18ba", "mp3d18ba_groupconv9.txt"),
        ("resnet3d18", "cspr_cls_r3d18_pretrain.txt"),
        ("resnet3d18_v1c", "cspr_cls_r3d18_deepstem_V1c.txt"),
    ],
)
def test_names_and_shapes_of_the_authors(backbone, file):
    lines = [line.split("\t") for line in (KEYS / file).read_text().splitlines()]
    theirs = {key: tuple(int(size) for size in shape.strip("()").split(",") if size) for key, shape in lines}
    assert {authors_name(backbone, key): shape for key, shape in our_shapes(backbone).items()} == theirs
