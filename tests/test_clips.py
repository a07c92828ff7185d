"""The z grid: exact offsets at every spacing, clamped ends, and the way back to the source slices."""

from typing import Literal

import numpy as np
import pytest
import scipy.ndimage

from mp3d.config import ClipConfig
from mp3d.data.clips import BLOCK_ROWS, resample_z, series_grid, stored_slices, window_positions

NINE = ClipConfig()


@pytest.mark.parametrize(
    ("spacing_mm", "offsets"),
    [
        (0.5, [5, 10, 15, 20]),
        (1.0, [2.5, 5, 7.5, 10]),
        (1.25, [2, 4, 6, 8]),
        (2.0, [1.25, 2.5, 3.75, 5]),
        (2.5, [1, 2, 3, 4]),
        (3.0, [2.5 / 3, 5 / 3, 2.5, 10 / 3]),
        (4.0, [0.625, 1.25, 1.875, 2.5]),
        (5.0, [0.5, 1, 1.5, 2]),
    ],
)
def test_neighbours_lie_at_multiples_of_the_clip_spacing(spacing_mm: float, offsets: list[float]):
    positions = window_positions(50, 101, spacing_mm, NINE)
    np.testing.assert_allclose(positions - 50, [-o for o in offsets[::-1]] + [0, *offsets], rtol=0, atol=1e-12)


@pytest.mark.parametrize("spacing_mm", [2.0, 3.0, 4.0])
def test_interpolation_is_exact_on_a_ramp(spacing_mm: float):
    """Each slice holds its own place in tenths of a millimetre, so a clip must hold multiples of 25."""
    ramp = np.rint(np.arange(61) * spacing_mm * 10).astype(np.int16).reshape(-1, 1, 1)
    clip = resample_z(ramp, window_positions(30, 61, spacing_mm, NINE)).ravel()
    assert (clip - ramp[30].item()).tolist() == [-100, -75, -50, -25, 0, 25, 50, 75, 100]


@pytest.mark.parametrize(
    ("spacing_mm", "offsets"),
    [  # measured with the authors' loader (image_io_3DCE.py) on made slices, 2.5 mm asked
        (0.5, [5, 10, 15, 20]),
        (0.6, [4.1667, 8.1667, 12.1667, 16.1667]),
        (0.75, [3.3333, 6.3333, 10, 13.3333]),
        (0.8, [3.125, 6.125, 9.125, 12.125]),
        (1.0, [2.5, 5, 7.5, 10]),
        (1.25, [2, 4, 6, 8]),
        (1.5, [1.6667, 3.6667, 5, 6.6667]),
        (2.0, [1.25, 2.25, 3.25, 5]),
        (2.5, [1, 2, 3, 4]),
        (3.0, [0.8333, 1.8333, 2.8333, 3.8333]),
        (3.75, [0.6667, 1.6667, 2, 2.6667]),
        (4.0, [0.625, 1.625, 1.625, 2.625]),
        (5.0, [0.5, 1, 1.5, 2]),
    ],
)
def test_the_authors_offsets(spacing_mm: float, offsets: list[float]):
    positions = window_positions(50, 101, spacing_mm, ClipConfig(interpolation="authors"))
    np.testing.assert_allclose(positions - 50, [-o for o in offsets[::-1]] + [0, *offsets], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("spacing_mm", "errors_mm"),
    [(5.0, [2.0, 1.0, 1.0]), (2.5, [0.5, 1.0, 1.5]), (1.25, [0.5, 0.25, 0.25])],
)
def test_the_authors_error_at_two_millimetres(spacing_mm: float, errors_mm: list[float]):
    """MULAN's loader has the same rule at 2 mm; the errors are those of its 2nd, 3rd and 4th neighbour."""
    clip = ClipConfig(slice_spacing_mm=2.0)
    exact = window_positions(50, 101, spacing_mm, clip)
    theirs = window_positions(50, 101, spacing_mm, clip.override({"interpolation": "authors"}))
    np.testing.assert_allclose((np.abs(theirs - exact) * spacing_mm)[6:], errors_mm, rtol=0, atol=1e-9)


@pytest.mark.parametrize("interpolation", ["exact", "authors"])
@pytest.mark.parametrize(
    ("spacing_mm", "expected"),
    [(1.25, [-2, -2, -2, -2, 0, 2, 2, 2, 2]), (5.0, [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2])],
)
def test_missing_neighbours_step_back_to_the_outermost_slice(
    spacing_mm: float, expected: list[float], interpolation: Literal["exact", "authors"]
):
    clip = ClipConfig(interpolation=interpolation)
    assert (window_positions(2, 5, spacing_mm, clip) - 2).tolist() == expected


def test_planes_of_a_picture_keep_their_places():
    assert window_positions(1, 3, None, ClipConfig(num_slices=3, slice_spacing_mm=None)).tolist() == [0, 1, 2]


def test_unknown_spacing_cannot_be_put_on_a_grid_of_millimetres():
    with pytest.raises(ValueError, match="unknown spacing"):
        window_positions(1, 3, None, NINE)


def test_resample_is_linear_and_copies_whole_positions():
    rng = np.random.default_rng(0)
    slices = rng.integers(-1024, 3072, (7, 5, 4)).astype(np.int16)
    positions = np.array([0, 0.25, 2.5, 5.999, 6])
    resampled = resample_z(slices, positions)
    for got, position in zip(resampled, positions, strict=True):
        low = min(int(position), 5)
        exact = slices[low] + (position - low) * (slices[low + 1].astype(float) - slices[low])
        assert np.abs(got - exact).max() <= 0.501
    assert (resampled[0] == slices[0]).all()
    assert (resampled[-1] == slices[-1]).all()


@pytest.mark.parametrize("rows", [1, BLOCK_ROWS, 2 * BLOCK_ROWS + 3])
def test_resample_agrees_with_scipy(rows: int):
    slices = np.random.default_rng(rows).integers(-1024, 3072, (8, rows, 6)).astype(np.int16)
    zoomed = scipy.ndimage.zoom(slices.astype(float), (20 / 8, 1, 1), order=1)
    positions = np.linspace(0, 7, 20)
    assert np.abs(resample_z(slices, positions) - zoomed).max() <= 0.501
    shuffled = np.random.default_rng(0).permutation(20)
    assert (resample_z(slices, positions[shuffled]) == resample_z(slices, positions)[shuffled]).all()


def test_resample_does_not_overflow_between_the_extremes():
    slices = np.array([-32768, 32767], np.int16).reshape(2, 1, 1)
    assert resample_z(slices, np.array([0.5])).item() in (0, -1)


@pytest.mark.parametrize(
    ("num_source", "spacing_mm", "grid_slices"), [(21, 1.0, 9), (21, 2.5, 21), (21, 5.0, 41), (1, 5.0, 1), (9, 2.0, 7)]
)
def test_series_grid_covers_the_series(num_source: int, spacing_mm: float, grid_slices: int):
    grid = series_grid(num_source, spacing_mm, NINE)
    assert len(grid.positions) == grid_slices
    assert grid.positions[0] == 0
    assert grid.positions[-1] <= num_source - 1
    assert (num_source - 1 - grid.positions[-1]) * spacing_mm < 2.5
    assert np.abs(grid.nearest_source - grid.positions).max() <= 0.5
    assert set(grid.nearest_source) <= set(range(num_source))


def test_a_window_of_the_grid_equals_the_window_of_a_key_slice_where_both_exist():
    grid = series_grid(40, 2.5, NINE)
    for key in (0, 3, 20, 39):
        np.testing.assert_allclose(grid.stretch(key - 4, key + 5), window_positions(key, 40, 2.5, NINE))


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0, 2.5, 3.0, 5.0])
def test_a_grid_can_be_laid_through_any_slice(spacing_mm: float):
    for slice_number in (0, 1, 7, 19):
        grid = series_grid(20, spacing_mm, NINE, through=slice_number)
        assert grid.positions[grid.index_of(slice_number)] == slice_number
        np.testing.assert_allclose(np.diff(grid.positions), 2.5 / spacing_mm)
        assert 0 <= grid.positions[0] * spacing_mm < 2.5
        assert 0 <= (19 - grid.positions[-1]) * spacing_mm < 2.5
        np.testing.assert_allclose(grid.stretch(0, len(grid.positions)), grid.positions, rtol=0, atol=1e-9)
        beyond = grid.positions[0] + grid.step * np.array([-2, -1])
        np.testing.assert_allclose(grid.stretch(-2, 0), np.maximum(beyond, 0), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("place", "offsets"), [(None, range(-8, 9)), (4, range(-4, 13)), (12, range(-12, 5))])
def test_a_slab_has_its_key_slice_where_it_is_put(place: int | None, offsets: range):
    slab = ClipConfig(num_key_slices=9)
    assert slab.depth == 17
    assert (window_positions(50, 100, 2.5, slab, place) - 50).tolist() == list(offsets)


def test_stored_slices_of_a_clip():
    """At 2 mm every fifth grid slice is a stored one; of copies beyond an end the nearest counts."""
    positions = window_positions(5, 11, 2.0, ClipConfig(num_key_slices=9), place=8)
    assert stored_slices(positions, near=8) == {4: 0, 8: 5, 12: 10}
    assert stored_slices(np.array([0.0, 0, 0, 1, 2, 2])) == {0: 0, 3: 1, 4: 2}
    assert stored_slices(np.array([0.0, 0, 0, 1, 2, 2]), near=3) == {2: 0, 3: 1, 4: 2}
    assert stored_slices(np.array([3.004, 4.02])) == {0: 3}


def test_of_clip_slices_near_a_stored_one_the_nearest_stands_for_it():
    positions = np.array([2.8, 3.1, 4.24, 5.26, 7.0])
    assert stored_slices(positions, tolerance=0.25) == {1: 3, 2: 4, 4: 7}
