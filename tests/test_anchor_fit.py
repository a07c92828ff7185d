"""Anchors and boxes: overlaps by hand and against the network's own anchors, the published table, the fit."""

import csv
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from mp3d.checkpoint import open_checkpoint
from mp3d.config import DetectionHead, SweepConfig
from mp3d.data.prepare import prepare
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.shard import open_shards
from mp3d.data.source import Item, Source
from mp3d.data.survey import read_boxes
from mp3d.errors import ConfigError, DataError
from mp3d.fitting import fit_to_data
from mp3d.launch import run_training
from mp3d.models.anchor_fit import (
    NUM_PLACES,
    PLACES,
    PUBLISHED,
    AnchorSet,
    Coverage,
    anchors_of,
    centred_iou,
    coverage,
    evenly_spread,
    fit_anchors,
    placed_iou,
)
from mp3d.models.anchors import STRIDES, build_anchor_generator
from mp3d.session import PlainSession
from mp3d.sweep import search_space, trial_config
from mp3d.train import train
from tests.tiny import ID_KEY, ct_shards, detector_config

DATA = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
TABLE = DATA / "deeplesion" / "DL_info_subset.csv"
MP3D, HALF_OCTAVE = PUBLISHED["MP3D"], PUBLISHED["two sizes an octave"]


def lognormal_boxes(count: int, seed: int = 0, size: float = 30.0, spread: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    roots, ratios = size * np.exp(rng.normal(0, spread, count)), np.exp(rng.normal(0, 0.2, count))
    return np.stack([roots / np.sqrt(ratios), roots * np.sqrt(ratios)], axis=1)


def test_centred_overlaps_by_hand():
    wide = np.array([[20.0, 10.0]])
    assert centred_iou(wide, AnchorSet(((16,),), (1.0,), (4,))) == pytest.approx(160 / (200 + 256 - 160))
    assert centred_iou(wide, AnchorSet(((16,),), (0.5, 1.0), (4,))) == pytest.approx(200 / 256), "inside 22.6 x 11.3"
    assert centred_iou(wide, AnchorSet(((16,),), (2.0,), (4,))) == pytest.approx(
        (10 * 16 / 2**0.5) / (200 + 256 - 10 * 16 / 2**0.5)
    )
    assert centred_iou(wide[:, ::-1], AnchorSet(((16,),), (2.0,), (4,))) == pytest.approx(200 / 256), "height / width"


def test_placed_overlaps_are_those_with_the_anchors_of_the_network():
    """With sizes whose corners torchvision need not round."""
    sizes = ((8, 12), (24, 32), (44, 60), (92, 120), (180, 252))
    head = DetectionHead(anchor_sizes_px=sizes, anchor_ratios=(0.25, 1.0, 4.0))
    size = 512
    maps = [torch.zeros(1, 1, size // stride, size // stride) for stride in STRIDES]
    anchors = build_anchor_generator(head)(ImageList(torch.zeros(1, 1, size, size), [(size, size)]), maps)[0]
    boxes = np.array([[12.0, 19.0], [10.0, 37.0], [33.0, 40.0], [150.0, 60.0]])
    centres, half = 256 + PLACES, boxes[:, None] / 2
    placed = np.concatenate([centres - half, centres + half], axis=-1).reshape(-1, 4)
    best = box_iou(torch.from_numpy(placed), anchors.double()).max(dim=1).values
    np.testing.assert_allclose(placed_iou(boxes, anchors_of(head)), best.reshape(len(boxes), NUM_PLACES), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(2, 400), st.floats(2, 400)), min_size=1, max_size=6))
def test_no_place_is_better_than_the_centre(sizes: list[tuple[float, float]]):
    boxes = np.array(sizes)
    for anchors in PUBLISHED.values():
        centred, placed = centred_iou(boxes, anchors), placed_iou(boxes, anchors)
        assert ((placed > 0) & (placed <= centred[:, None] + 1e-12)).all()
        assert (centred <= 1).all()


def test_coverage_counts_the_thresholds_in():
    assert coverage(np.array([0.4, 0.5, 0.6, 0.7])) == Coverage(pytest.approx(0.55), 0.75, 0.25)


def test_a_fit_helps_keeps_the_levels_and_depends_on_nothing_else():
    boxes = lognormal_boxes(400)
    fitted = fit_anchors(boxes, HALF_OCTAVE)
    assert [len(level) for level in fitted.sizes_px] == [2] * 5
    assert all(level == tuple(sorted(level)) for level in (*fitted.sizes_px, fitted.ratios))
    build_anchor_generator(DetectionHead(anchor_sizes_px=fitted.sizes_px, anchor_ratios=fitted.ratios))
    assert fitted == fit_anchors(np.random.default_rng(1).permutation(boxes), HALF_OCTAVE)
    others = lognormal_boxes(400, seed=2)
    for sample, least in ((boxes, 0.02), (others, 0.015)):
        gain = coverage(placed_iou(sample, fitted)).mean_iou - coverage(placed_iou(sample, HALF_OCTAVE)).mean_iou
        assert gain > least


def test_a_fit_finds_sizes_and_ratios_far_from_where_it_starts():
    tall = np.tile([[40.0, 90.0]], (300, 1)) * np.exp(np.random.default_rng(0).normal(0, 0.05, (300, 2)))
    fitted = fit_anchors(tall, AnchorSet(((5,), (10,), (20,), (40,), (300,)), (1.0,)))
    assert fitted.ratios == (pytest.approx(2.25, rel=0.1),)
    assert any(size == pytest.approx(60, rel=0.1) for level in fitted.sizes_px for size in level)
    assert coverage(placed_iou(tall, fitted)).mean_iou > 0.75


def test_a_fit_does_not_put_small_sizes_on_coarse_levels():
    """The centred overlap would be best with all sizes about that of the boxes, whatever the stride."""
    fitted = fit_anchors(lognormal_boxes(300, size=20, spread=0.15), MP3D)
    sizes = [level[0] for level in fitted.sizes_px]
    assert sizes[0] == pytest.approx(20, rel=0.15)
    assert all(size >= 2 * stride for size, stride in zip(sizes, STRIDES, strict=True))
    assert all(1.2 < larger / smaller < 4 for smaller, larger in zip(sizes, sizes[1:], strict=False))


def test_a_fit_needs_boxes():
    with pytest.raises(ValueError, match="0 boxes"):
        fit_anchors(np.zeros((0, 2)), MP3D)
    with pytest.raises(ValueError, match="extent"):
        fit_anchors(np.array([[3.0, 0.0]]), MP3D)


def test_of_many_boxes_small_and_large_ones_take_part():
    boxes = lognormal_boxes(1000)
    some = evenly_spread(boxes, 50)
    areas = np.sort(boxes.prod(axis=1))
    assert len(some) == 50
    assert (some.prod(axis=1)[[0, -1]] == areas[[0, -1]]).all()
    assert len(evenly_spread(boxes[:7], 50)) == 7


def published_boxes(split: str, scaled: tuple[int, ...]) -> np.ndarray:
    """Widths and heights of the table; pictures of these sizes are brought to 512 pixels."""
    found = []
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["Train_Val_Test"].strip() == split:
                x1, y1, x2, y2 = (float(value) for value in row["Bounding_boxes"].split(","))
                size = max(int(float(value)) for value in row["Image_size"].split(","))
                found.append(np.array([x2 - x1, y2 - y1]) * (512 / size if size in scaled else 1))
    return np.array(found)


def octaves(first: float, ratios: tuple[float, ...]) -> AnchorSet:
    return AnchorSet(tuple((first * 2**level,) for level in range(5)), ratios)


@pytest.mark.skipif(not TABLE.is_file(), reason=f"no table {TABLE}")
class TestDeepLesion:
    """The table of ``../shared/reference/method.md`` 6.6.

    It was computed with two pictures of 1024 pixels left as they are, and with ratios of width over height, which tells
    only where a set is not its own inverse.
    """

    PRINTED = (
        (MP3D, "0.702", "0.9996", "0.509"),
        (octaves(16, (1 / 0.7, 1.0, 1 / 1.4)), "0.711", "0.999", "0.506"),
        (octaves(16, (1 / 0.9, 1.0, 1 / 1.1)), "0.704", "0.998", "0.482"),
        (PUBLISHED["MMDetection default"], "0.593", "0.698", "0.364"),
        (PUBLISHED["MULAN"], "0.785", "0.995", "0.848"),
        (PUBLISHED["A3D"], "0.786", "0.999", "0.850"),
        (AnchorSet((tuple(16 * 2 ** (half / 2) for half in range(9)),), (0.5, 1.0, 2.0)), "0.807", "0.9996", "0.987"),
    )

    @pytest.mark.parametrize(("anchors", "mean", "at_50", "at_70"), PRINTED)
    def test_printed_digits(self, anchors: AnchorSet, mean: str, at_50: str, at_70: str):
        boxes = published_boxes("2", scaled=(768,))
        assert len(boxes) == 4889
        found = coverage(centred_iou(boxes, anchors))
        assert (f"{found.mean_iou:.3f}", f"{found.at_70:.3f}") == (mean, at_70)
        assert f"{found.at_50:.{len(at_50) - 2}f}" == at_50

    def test_fitted_to_train_and_judged_on_val(self):
        train, val = (published_boxes(split, scaled=(768, 1024)) for split in ("1", "2"))
        assert (len(train), len(val)) == (936, 4889)
        fitted = fit_anchors(train, HALF_OCTAVE)
        centred, placed = coverage(centred_iou(val, fitted)), coverage(placed_iou(val, fitted))
        assert (centred.mean_iou, centred.at_50, centred.at_70) == pytest.approx((0.822, 0.997, 0.954), abs=0.002)
        assert (placed.mean_iou, placed.at_50, placed.at_70) == pytest.approx((0.770, 0.997, 0.891), abs=0.002)
        best = max(coverage(placed_iou(val, anchors)).mean_iou for anchors in PUBLISHED.values())
        assert placed.mean_iou > best + 0.015


def sized_series(name: str, size: int) -> CTSeries:
    hu = np.zeros((5, 64, 48), np.int16)
    box = np.array([[8, 6, 8 + size, 6 + size]], np.float32)
    hu[2, 6 : 6 + size, 8 : 8 + size] = 500
    truths = tuple(Truth(box, np.ones(1, np.int64)) if z == 2 else Truth() for z in range(5))
    return CTSeries(name, name, name, Volume(hu, np.diag([1, 1, 2.5, 1.0])), truths)


def sized_shards(out: Path, train: int, val: int) -> Path:
    """One box a series, of one size in train and of another in val."""
    sizes = {"train": train, "val": val}
    items = [Item(split, split, split, partial(sized_series, split, size)) for split, size in sizes.items()]
    prepare(Source("sized", "tiny/1", ("lesion",), tuple(items)), out, id_key=ID_KEY, runner="local")
    return out


def test_boxes_are_read_and_scaled_as_the_network_sees_them(tmp_path: Path):
    boxes = read_boxes(open_shards(sized_shards(tmp_path / "s", 20, 30)), "val")
    assert boxes.boxes.tolist() == [[8, 6, 38, 36]]
    assert boxes.image_sizes.tolist() == [[64, 48]]
    assert boxes.widths_heights_mm.tolist() == [[30, 30]]
    assert boxes.widths_heights_at(128).tolist() == [[60, 60]]
    assert boxes.widths_heights_at(100) == pytest.approx(np.array([[30 * 75 / 48, 30 * 100 / 64]]))


def test_a_run_holds_the_fitted_numbers_and_goes_on_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = detector_config(
        ct_shards(tmp_path / "ct"), tmp_path / "runs", loop__epochs=1, loop__steps_per_epoch=1,
        model__head__anchors="fit", model__head__anchor_sizes_px=((4,), (24,), (40,), (80,), (160,)),
    )  # fmt: skip
    run = run_training(config)
    said = capsys.readouterr().out
    assert f"anchors fitted to {tmp_path / 'ct'}: " in said
    assert "val: mean best IoU" in said
    head = open_checkpoint(run).config.model.head
    assert isinstance(head, DetectionHead)
    assert head.anchors == "given"
    assert any(size == pytest.approx(8.5, rel=0.2) for level in head.anchor_sizes_px for size in level), "8 x 9 pixels"
    assert run_training(config) == run, "the same command finds the same numbers, and goes on"
    changed = config.override({"model.head.anchors": "given"})
    with pytest.raises(ConfigError, match=r"anchor_sizes_px was .* is \[\[4\.0\]"):
        run_training(changed)


def test_fitted_anchors_that_val_likes_less_are_not_taken(tmp_path: Path):
    config = detector_config(sized_shards(tmp_path / "s", train=20, val=9), tmp_path, model__head__anchors="fit")
    config = config.override(
        {"model.head.anchor_sizes_px": ((4.5,), (24,), (40,), (80,), (160,)), "clip.image_size": 64}
    )
    said: list[str] = []
    resolved = fit_to_data(config, said.append)
    assert resolved == config.override({"model.head.anchors": "given"})
    assert "the given anchors are kept: on val the fitted ones gain -0." in said[-1]
    other = config.override({"shards": str(sized_shards(tmp_path / "t", train=9, val=9))})
    assert fit_to_data(other, said.append).model.head != resolved.model.head
    assert "kept" not in said[-1]


def test_given_anchors_and_other_heads_are_left_alone(tmp_path: Path):
    config = detector_config(tmp_path / "no shards are read", tmp_path)
    assert fit_to_data(config) is config


def test_anchors_still_to_be_fitted_are_not_trained(tmp_path: Path):
    config = detector_config(tmp_path, tmp_path, model__head__anchors="fit")
    with pytest.raises(ConfigError, match="fit_to_data"):
        train(config, PlainSession(tmp_path / "run", keep=1, device=torch.device("cpu")))


def test_a_fit_says_which_split_has_no_box(tmp_path: Path):
    items = [Item("a", "a", "train", partial(sized_series, "a", 9))]
    prepare(Source("one", "tiny/1", ("lesion",), tuple(items)), tmp_path / "s", id_key=ID_KEY, runner="local")
    config = detector_config(tmp_path / "s", tmp_path, model__head__anchors="fit")
    with pytest.raises(DataError, match="no series in split 'val'"):
        fit_to_data(config)


def test_a_sweep_draws_given_and_fitted_anchors(tmp_path: Path):
    sweep = SweepConfig(name="s", base=detector_config(tmp_path, tmp_path))
    choice = search_space(sweep)["model.head.anchors"]
    assert choice.categories == ["given", "fit"]
    head = trial_config(sweep.base, {"model.head.anchors": "fit"}, tmp_path, "t").model.head
    assert isinstance(head, DetectionHead)
    assert head.anchors == "fit"
