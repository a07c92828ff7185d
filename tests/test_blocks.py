"""Blocks of stored series: where their voxels lie, and that image and mask stay together."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mp3d.config import UNKNOWN, AugmentConfig, ClipConfig
from mp3d.data.blocks import Placement, axis_positions, draw_placement, read_block, resample_plane, turned
from mp3d.data.prepare import prepare
from mp3d.data.series import AIR_HU, CTSeries, Truth, Volume
from mp3d.data.shard import ShardSet, open_shards
from mp3d.data.source import Item, Source
from mp3d.errors import DataError
from tests.tiny import ID_KEY, masked_picture_shards

SHAPE = (10, 30, 40)
SPACING_MM = (2.0, 0.5, 0.8)


def ramp_series() -> CTSeries:
    """HU rise by 2, 8 and 4 a mm along z, y and x; class 1 where they are above 300; of slice 7 nobody knows."""
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    hu = np.rint(2 * SPACING_MM[0] * z + 8 * SPACING_MM[1] * y + 4 * SPACING_MM[2] * x).astype(np.int16)
    truths = [Truth(mask=(plane > 150).astype(np.uint8)) for plane in hu]
    truths[7] = Truth()
    return CTSeries("p", "p", "p", Volume(hu, np.diag([*SPACING_MM[::-1], 1.0])), tuple(truths))


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("ramp") / "shards"
    item = Item("p", "p", "train", partial(ramp_series))
    prepare(Source("ramp", "tiny/1", ("high",), (item,)), out, id_key=ID_KEY, runner="local")
    return open_shards(out)


def clip(depth: int, size: int, z_mm: float | None, pixel_mm: float | None) -> ClipConfig:
    return ClipConfig(
        num_slices=depth, image_size=size, slice_spacing_mm=z_mm, pixel_spacing_mm=pixel_mm, block="anywhere"
    )


def test_voxels_as_they_are_stored_are_copied(ramp: ShardSet):
    block = read_block(ramp, ramp.entries[0], (5, 12, 20), clip(4, 8, None, None))
    whole = ramp_series()
    part = (slice(4, 8), slice(9, 17), slice(17, 25))
    assert np.array_equal(block.hu, whole.volume.hu[part])
    assert np.array_equal(block.masks[:3], (whole.volume.hu[part] > 150)[:3])
    assert (block.masks[3] == UNKNOWN).all()
    assert block.middle["z_index"] == 6


@pytest.mark.parametrize(("z_mm", "pixel_mm", "zoom"), [(1.0, 1.0, 1.0), (1.3, 0.7, 1.0), (3.0, 0.6, 0.8)])
def test_a_ramp_is_met_anywhere(ramp: ShardSet, z_mm: float, pixel_mm: float, zoom: float):
    block = read_block(ramp, ramp.entries[0], (4, 15, 18), clip(5, 12, z_mm, pixel_mm), Placement(zoom=zoom))
    middle = block.hu[2, 6, 6]
    steps = np.array([2 * z_mm, 8 * pixel_mm / zoom, 4 * pixel_mm / zoom])
    offsets = np.stack(np.meshgrid(np.arange(5) - 2, np.arange(12) - 6, np.arange(12) - 6, indexing="ij"), axis=-1)
    assert np.abs(block.hu - (middle + offsets @ steps)).max() <= 3


def test_a_block_is_moved_into_the_series(ramp: ShardSet):
    block = read_block(ramp, ramp.entries[0], (0, 0, 39), clip(4, 8, None, None))
    assert np.array_equal(block.hu, ramp_series().volume.hu[:4, :8, -8:])


def test_a_shift_is_in_voxels_of_the_block(ramp: ShardSet):
    asked = clip(3, 8, 4.0, None)
    block = read_block(ramp, ramp.entries[0], (4, 10, 10), asked, Placement(shift=(1, 2, -3)))
    assert np.array_equal(block.hu, ramp_series().volume.hu[4:10:2, 9:17, 4:12])


def test_beyond_the_series_is_air_that_nobody_knows(ramp: ShardSet):
    block = read_block(ramp, ramp.entries[0], (4.5, None, None), clip(12, 34, None, None))
    whole = ramp_series()
    assert np.array_equal(block.hu[1:11, 2:32], whole.volume.hu[:, :, 3:37])
    frame = np.ones(block.hu.shape, bool)
    frame[1:11, 2:32] = False
    assert (block.hu[frame] == AIR_HU).all()
    assert (block.masks[frame] == UNKNOWN).all()
    assert set(np.unique(block.masks[1:11, 2:32])) == {0, 1, UNKNOWN}


def test_pictures_have_no_blocks(tmp_path: Path):
    shards = open_shards(masked_picture_shards(tmp_path / "pictures"))
    with pytest.raises(DataError, match="leave clip.block unset"):
        read_block(shards, shards.entries[0], (0, None, None), clip(3, 8, None, None))


@given(
    st.floats(-5, 60), st.integers(1, 40), st.floats(0.3, 3).filter(lambda step: abs(step - 1) > 1e-3),
    st.integers(1, 50),
)  # fmt: skip
def test_no_more_lies_beyond_than_must(centre: float, count: int, step: float, available: int):
    positions = axis_positions(centre, count, step, available)
    assert np.allclose(np.diff(positions), step)
    extent = (count - 1) * step
    if extent <= available - 1:
        assert positions[0] >= -1e-9
        assert positions[-1] <= available - 1 + 1e-9
        if extent / 2 <= centre <= available - 1 - extent / 2:
            assert np.isclose(positions.mean(), centre)
    else:
        assert np.isclose(positions.mean(), (available - 1) / 2)


def test_bilinear_by_hand():
    plane = np.array([[[0, 100], [200, 400]]], np.int16)
    got = resample_plane(plane, np.array([0.0, 0.25, 5.0]), np.array([-3.0, 0.5]))
    assert got.tolist() == [[[0, 50], [50, 112], [200, 300]]]  # 0.75 * 50 + 0.25 * 300 = 112.5, to even


def test_image_and_mask_take_each_of_the_48_orientations_together():
    hu = np.arange(27, dtype=np.int16).reshape(3, 3, 3)
    config = AugmentConfig(horizontal_flip=0.5, z_flip=0.5, quarter_turns=True)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(1200):
        image, mask = turned(hu, hu.astype(np.uint8), config, rng)
        assert np.array_equal(image, mask)
        seen.add(image.tobytes())
    assert len(seen) == 48


def test_turning_can_be_switched_off():
    hu = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    config = AugmentConfig(horizontal_flip=0, z_flip=0)
    image, _ = turned(hu, hu.astype(np.uint8), config, np.random.default_rng(0))
    assert np.array_equal(image, hu)


def test_placements_stay_in_their_bounds():
    config = AugmentConfig(shift_px=(1, 5), zoom=(0.8, 1.2))
    rng = np.random.default_rng(0)
    drawn = [draw_placement(config, rng) for _ in range(300)]
    assert {placement.shift[0] for placement in drawn} == {-1, 0, 1}
    assert {placement.shift[2] for placement in drawn} == set(range(-5, 6))
    assert 0.8 <= min(placement.zoom for placement in drawn) < 0.83
    assert 1.17 < max(placement.zoom for placement in drawn) <= 1.2
