"""State-dict names and shapes against lists printed from the authors' models, all six, in both directions."""

import os
import re
from math import prod
from pathlib import Path

import pytest
import torch

from mp3d.checkpoint import open_checkpoint
from mp3d.convert import ConvertConfig, convert
from mp3d.errors import CheckpointError
from mp3d.models.released import from_authors, match_backbone, our_name, to_authors
from mp3d.models.released_file import recognise
from tests.released_files import made_state, save, wrapped
from tests.test_released import our_state

SHARED = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
KEYS = SHARED.parent / "reference" / "keys"

pytestmark = pytest.mark.skipif(not KEYS.is_dir(), reason=f"no key lists in {KEYS}")


FILES = {
    "mp3d63_groupconv9": ("mp3d63", 27_316_288),
    "mp3d18ba_groupconv9": ("mp3d18ba", 15_266_176),
    "p3d63_center": ("p3d63", 27_281_728),
    "cspr_cls_r3d18_pretrain": ("resnet3d18", 33_160_000),
    "cspr_cls_r3d50_pretrain": ("resnet3d50", 46_155_072),
    "cspr_cls_r3d18_deepstem_V1c": ("resnet3d18_v1c", 33_221_984),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

each_file = pytest.mark.parametrize(
    ("file", "backbone", "parameters"), [(file, *facts) for file, facts in FILES.items()]
)


def listed(file: str) -> dict[str, tuple[int, ...]]:
    lines = [line.split("\t") for line in (KEYS / f"{file}.txt").read_text().splitlines()]
    return {key: tuple(int(size) for size in shape.strip("()").split(",") if size) for key, shape in lines}


def test_every_list_is_tested():
    assert {path.stem for path in KEYS.glob("*.txt")} == set(FILES)


@each_file
def test_names_shapes_and_counts_of_the_authors(file, backbone, parameters):
    ours = {key: tuple(value.shape) for key, value in our_state(backbone).items()}
    assert to_authors(backbone, ours) == listed(file)
    assert sum(prod(shape) for key, shape in ours.items() if not key.endswith(BUFFERS)) == parameters


@each_file
def test_ours_and_back_is_identity(file, backbone, parameters):
    ours = our_state(backbone)
    back = from_authors(backbone, to_authors(backbone, ours))
    assert set(back) == set(ours)
    assert all(back[key] is tensor for key, tensor in ours.items())
    assert sorted(match_backbone(backbone, listed(file)).values()) == sorted(listed(file))


@each_file
def test_a_strange_key_is_refused_by_its_name(file, backbone, parameters):
    shapes = listed(file)
    last = next(key for key in reversed(shapes) if key.startswith("layer4"))
    block = last.split(".")[1]
    for key in (f"layer4.{block}.conv9.weight", "layer4.9.conv1.weight", "layer5.0.conv1.weight", "scale"):
        with pytest.raises(
            CheckpointError, match=f"the authors' {backbone} has no tensor '{key}'.* of shape \\(7, 3\\)"
        ):
            match_backbone(backbone, shapes | {key: (7, 3)})


@each_file
def test_a_misshapen_or_missing_key_is_refused_by_its_name(file, backbone, parameters):
    shapes = listed(file)
    key = "layer2.0.conv1.weight"
    wrong = (shapes[key][0] + 1, *shapes[key][1:])
    with pytest.raises(
        CheckpointError, match=re.escape(f"{key} has the shape {wrong}, and in the authors' {backbone}")
    ):
        match_backbone(backbone, shapes | {key: wrong})
    with pytest.raises(CheckpointError, match=f"{key} of shape .* is not there, nor are 0 more"):
        match_backbone(backbone, {name: shape for name, shape in shapes.items() if name != key})


@each_file
def test_the_backbone_is_recognised(file, backbone, parameters):
    assert recognise(listed(file)) == ("mp3d63" if backbone == "p3d63" else backbone)


@each_file
def test_a_file_of_these_names_becomes_a_checkpoint(file, backbone, parameters, tmp_path):
    """The classifiers' bare, as from ImageNet, the others as the backbone of a detector, as from COCO."""
    state = made_state(listed(file))
    prefix = "" if file.startswith("cspr_cls") else "module.backbone."
    path = save(wrapped(state, prefix), tmp_path / f"{file}.pth")
    report = convert(path, ConvertConfig(out=str(tmp_path / "out"), backbone=backbone))
    assert len(report.moved) == len(state)
    assert report.unused == report.inflated == ()
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config.clip.num_slices == (9 if file.startswith(("mp3d", "p3d")) else 3)
    ours = checkpoint.model_state()
    for key, value in state.items():
        name = our_name(backbone, key)
        place = "backbone." if name.startswith("group_transforms.") else "backbone.backbone."
        assert torch.equal(ours[place + name], value)
