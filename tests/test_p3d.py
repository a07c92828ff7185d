"""The authors' P3D: MP3D's blocks with z pooled away."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from mp3d.config import ClassificationHead, ClipConfig, ModelConfig
from mp3d.errors import ConfigError
from mp3d.models import LesionDetector, build_model
from mp3d.models.backbone import WindowFPN, build_backbone
from mp3d.models.folded import WholeClips, fold, unfold
from mp3d.models.mp3d import build_mp3d
from mp3d.models.p3d import build_p3d
from mp3d.models.released import authors_name
from mp3d.models.stream import check_streamable, stream_predictions
from tests import formula
from tests.test_mp3d import clip, num_parameters, reference


@pytest.mark.parametrize(
    ("depth", "expected"), [("63", 27_281_728), ("18ba", 15_257_536), ("34ba", 28_346_816), ("131", 49_624_896)]
)
def test_it_has_the_weights_of_mp3d(depth, expected):
    with torch.device("meta"):
        ours, theirs = build_p3d(depth), build_mp3d(depth)
    assert num_parameters(ours) == expected
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", ["p3d63", "p3d18ba"])
def test_it_equals_the_stages_with_plain_pools_between_them(name):
    """Stem pool 1 x 3 x 3; after stages 1 and 2 a z pool of stride 2, after stage 3 one without padding."""
    backbone = build_backbone(ModelConfig(backbone=name, width=0.125, norm="gn3d")).double().eval()
    formula.fill(backbone, partial(authors_name, name))
    x = clip(2, 1, 9, 32, 48)
    with torch.no_grad():
        y = F.relu(reference(backbone.stem.layers[0], x))
        y = F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        expected = []
        for blocks, pool in zip(backbone.stages, [((2, 1, 1), 1), ((2, 1, 1), 1), ((1, 1, 1), 0), None], strict=True):
            folded = fold(y)
            for block in blocks:
                folded = block(folded, WholeClips(2))
            y = unfold(folded, y.shape[2])
            if pool:
                y = F.max_pool3d(y, (3, 1, 1), pool[0], (pool[1], 0, 0))
            expected.append(y)
        for a, b in zip(backbone(x), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert [output.shape[2] for output in expected] == [5, 3, 1, 1]


def test_every_key_slice_of_a_slab_has_a_window_of_its_own():
    model = ModelConfig(backbone="p3d18ba", width=0.125)
    neck = build_model(model, ClipConfig()).backbone.double().eval()
    assert isinstance(neck, WindowFPN)
    slab = clip(2, 1, 12, 32, 32)
    with torch.no_grad():
        maps = neck(slab, [(4, 7), (5,)])
        for index, (number, key) in enumerate([(0, 4), (0, 7), (1, 5)]):
            window = neck(slab[number : number + 1, :, key - 4 : key + 5], [(4,)])
            for level in maps:
                torch.testing.assert_close(maps[level][index], window[level][0])
    with pytest.raises(ValueError, match="key slice 3 of clip 1 needs 4 slices on each side"):
        neck(slab, [(4,), (3,)])


def test_gradients_reach_the_stem_through_a_detector():
    detector = build_model(ModelConfig(backbone="p3d18ba", width=0.125), ClipConfig()).backbone
    sum(level.square().mean() for level in detector(torch.randn(1, 1, 9, 64, 64), [(4,)]).values()).backward()
    assert bool(detector.backbone.stem.layers[0].conv.weight.grad.any())


@pytest.mark.parametrize("backbone", ["p3d63", "p3d18ba"])
@pytest.mark.parametrize("num_slices", [3, 5, 7])
def test_fewer_than_nine_slices_are_refused(backbone, num_slices):
    model = ModelConfig(backbone=backbone, head=ClassificationHead(num_classes=2))
    with pytest.raises(
        ConfigError, match=f"clip.num_slices is {num_slices}: {backbone} pools z away and needs at least"
    ):
        build_model(model, ClipConfig(num_slices=num_slices))


@pytest.mark.parametrize("changes", [{"to_2d": "group"}, {"to_2d": "dense"}, {"strides": {"isotropic": True}}])
def test_what_it_has_not_is_refused(changes):
    with pytest.raises(ValidationError, match="leaves no slices to weight|has the strides of its paper"):
        ModelConfig(backbone="p3d63", **changes)


@pytest.mark.parametrize("backbone", ["p3d18ba", "resnet2d18"])
def test_it_cannot_be_streamed(backbone):
    model = ModelConfig(backbone=backbone, width=0.125)
    with pytest.raises(ConfigError, match="answers for the middle slice of a window"):
        check_streamable(model)
    detector = build_model(model, ClipConfig(num_slices=9 if backbone == "p3d18ba" else 3))
    assert isinstance(detector, LesionDetector)
    with pytest.raises(ConfigError, match="answers for the middle slice of a window"):
        next(stream_predictions(detector, [torch.zeros(12, 32, 32, dtype=torch.int16)], at_once=2))
