"""What a run reads, by the index of the shards."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mp3d.config import ClipConfig
from mp3d.data.blocks import read_block
from mp3d.data.prepare import prepare
from mp3d.data.samples import (
    Sample,
    annotated_samples,
    classified_samples,
    masked_samples,
    spread,
    tile_samples,
)
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.shard import SeriesEntry, ShardSet, open_shards
from mp3d.data.source import Item, Source
from mp3d.errors import DataError
from tests.tiny import ID_KEY, ball_shards, ct_shards, masked_picture_shards, picture_shards

ANYWHERE = ClipConfig(num_slices=4, image_size=8, slice_spacing_mm=None, block="anywhere")
CENTRE = ANYWHERE.override({"block": "centre"})


def numbered_series() -> CTSeries:
    """Each voxel has a value of its own; slice 2 marks something, slice 5 is unknown, the others mark nothing."""
    hu = np.arange(9 * 10 * 20, dtype=np.int16).reshape(9, 10, 20)
    masks = np.zeros(hu.shape, np.uint8)
    masks[2, 4, 4] = 1
    truths = [Truth(mask=mask) for mask in masks]
    truths[5] = Truth()
    return CTSeries("p", "p", "p", Volume(hu, np.diag([1.0, 1.0, 3.0, 1.0])), tuple(truths))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("numbered") / "shards"
    item = Item("p", "p", "train", partial(numbered_series))
    prepare(Source("numbered", "tiny/1", ("speck",), (item,)), out, id_key=ID_KEY, runner="local")
    return open_shards(out)


def test_the_index_says_which_masks_mark_something(numbered: ShardSet):
    assert numbered.entries[0].marked_per_row == (False, False, True, False, False, None, False, False, False)
    positives, spare = masked_samples(numbered, "train", ANYWHERE, negatives=1.0)
    assert [sample.row for sample in positives] == [2]
    assert [sample.row for sample in spare] == [0, 1, 3, 4, 6, 7, 8]
    assert masked_samples(numbered, "train", ANYWHERE)[1] == []


def test_one_block_in_the_middle_of_each_series(numbered: ShardSet):
    positives, spare = masked_samples(numbered, "train", CENTRE, negatives=1.0)
    assert [sample.row for sample in positives] == [4]
    assert spare == []


def test_negatives_that_nobody_looked_for_are_refused(tmp_path: Path):
    """As on DeepLesion, where nothing is known of the slices between the key slices."""
    shards = open_shards(ct_shards(tmp_path / "ct", patients=4))
    assert annotated_samples(shards, "train", negatives=1.0)[1]
    keys_alone = tuple(
        replace(entry, boxes_per_row=tuple(count or None for count in entry.boxes_per_row or ()))
        for entry in shards.entries
    )
    unsearched = replace(shards, entries=keys_alone)
    assert annotated_samples(unsearched, "train")[1] == []
    with pytest.raises(DataError, match=r"loop\.negatives is 0\.5, and split 'train' .* set loop\.negatives to 0"):
        annotated_samples(unsearched, "train", negatives=0.5)


def test_tiles_show_every_voxel(numbered: ShardSet):
    tiles = tile_samples(numbered, "train", ANYWHERE)
    assert len(tiles) == 3 * 2 * 3
    shown = {
        value
        for sample in tiles
        if sample.centre
        for value in read_block(numbered, sample.entry, sample.centre, ANYWHERE).hu.ravel().tolist()
    }
    assert shown == set(range(9 * 10 * 20))


def test_pictures_with_masks_and_without(tmp_path: Path):
    masked, plain = masked_picture_shards(tmp_path / "masked"), picture_shards(tmp_path / "plain")
    positives, spare = masked_samples(open_shards(masked), "train")
    assert len(positives) == 24
    assert spare == []
    with pytest.raises(DataError, match="no mask that marks anything"):
        masked_samples(open_shards(plain), "train")


def test_series_are_classified_once_and_pictures_one_by_one(tmp_path: Path):
    series = classified_samples(open_shards(ball_shards(tmp_path / "balls", classified=True)), "train")
    assert [sample.row for sample in series] == [7] * 4
    assert len(classified_samples(open_shards(picture_shards(tmp_path / "pictures")), "train")) == 24


def test_series_without_masks_have_no_tiles(tmp_path: Path):
    shards = open_shards(ct_shards(tmp_path / "ct", patients=4))
    with pytest.raises(DataError, match="has no mask"):
        tile_samples(shards, "train", ANYWHERE)


@given(st.integers(1, 300), st.integers(1, 300))
def test_so_many_samples_as_asked_for_are_spread_evenly(there: int, most: int):
    entry = SeriesEntry("s", "p", "test", "f", 0, 8, there, (1.0, 1.0, 1.0), None)
    samples = [Sample(entry, row) for row in range(there)]
    rows = [sample.row for sample in spread(samples, most)]
    assert len(rows) == min(there, most)
    steps = np.diff(rows)
    assert (steps >= 1).all()
    assert np.ptp(steps) <= 1 if len(steps) else True
    assert abs(rows[0] - (there - 1 - rows[-1])) <= 1  # as much is left out before the first as behind the last
    assert spread(samples, None) == samples
