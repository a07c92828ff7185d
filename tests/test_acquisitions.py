"""One Series Instance UID over several acquisitions: what shares a range is split, what follows on stays one."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset

from mp3d.data.dicom import group_series, load_volume
from mp3d.errors import Refusal
from tests.dicom_files import ct_slices, made_volume, to_files

STEP_MM = 2.5


def stack(
    seed: int, shift_mm: float = 0.0, count: int = 12, step_mm: float = STEP_MM, **elements: Any
) -> list[Dataset]:
    """A stack of its own pixels, ascending, moved along z."""
    volume = made_volume((count, 5, 7), (step_mm, 0.8, 0.6), origin=(-31.25, 17.5, -204.5 + shift_mm), seed=seed)
    slices = ct_slices(volume)
    for ds in slices:
        ds.SOPInstanceUID += f".{seed + 1}"
        for keyword, value in elements.items():
            setattr(ds, keyword, value)
    return slices


def numbered(slices: list[Dataset], numbers: Iterable[int]) -> list[Dataset]:
    for ds, number in zip(slices, numbers, strict=True):
        ds.AcquisitionNumber = number
    return slices


def volumes(slices: list[Dataset]) -> list[tuple[bytes, tuple[str, ...]]]:
    loaded = [load_volume(series) for series in group_series(to_files(slices)).series]
    return sorted((volume.hu.tobytes(), warnings) for volume, _, warnings in loaded)


def alone(*stacks: list[Dataset]) -> list[bytes]:
    """The pixels of each stack where it is the only one in its series."""
    return sorted(pixels for slices in stacks for pixels, _ in volumes(slices))


def check_split(*stacks: list[Dataset]) -> None:
    loaded = volumes([ds for slices in stacks for ds in slices])
    assert [pixels for pixels, _ in loaded] == alone(*stacks)
    assert all("SPLIT_BY_ACQUISITION" in warnings for _, warnings in loaded)


def check_one(slices: list[Dataset], count: int) -> None:
    ((pixels, warnings),) = volumes(slices)
    assert len(pixels) == count * 5 * 7 * 2
    assert "SPLIT_BY_ACQUISITION" not in warnings


@pytest.mark.parametrize("shift_mm", [0.0, 0.004, 0.02, 0.3, 1.25, 2.5, 7.51])
@pytest.mark.parametrize(
    ("keyword", "first", "second"),
    [
        ("AcquisitionNumber", 1, 2),
        ("ConvolutionKernel", "B30f", "B70f"),
        ("TemporalPositionIdentifier", 1, 2),
        ("AcquisitionTime", "100000", "100100.5"),
        ("SliceThickness", "5", "1.25"),
    ],
)
def test_one_range_twice_is_two_volumes(keyword: str, first: Any, second: Any, shift_mm: float) -> None:
    check_split(stack(0, **{keyword: first}), stack(1, shift_mm, **{keyword: second}))


def test_thick_and_thin_reconstructions() -> None:
    thick, thin = stack(0, step_mm=5.0, SliceThickness="5"), stack(1, count=45, step_mm=1.25, SliceThickness="1.25")
    check_split(thick, thin)


@pytest.mark.parametrize("rotation", [1, 2, 4, 12])
@pytest.mark.parametrize("shift_mm", [0.0, 0.02])
def test_phases_with_a_number_for_each_rotation(rotation: int, shift_mm: float) -> None:
    place = np.arange(12) // rotation
    phase_by_phase = stack(0), numbered(stack(1, shift_mm), place + 1 + 12)
    numbered(phase_by_phase[0], place + 1)
    check_split(*phase_by_phase)
    place_by_place = numbered(stack(0), 2 * place + 1), numbered(stack(1, shift_mm), 2 * place + 2)
    check_split(*place_by_place)


def test_rotations_of_phases_of_other_ranges_are_never_mixed() -> None:
    """The second phase is longer: that its last rotation is none of the first one's cannot be told."""
    short, long = stack(0), stack(1, count=16)
    numbered(short, np.arange(12) // 4 + 1)
    numbered(long, np.arange(16) // 4 + 11)
    pieces = [slices[start : start + 4] for slices in (short, long) for start in range(0, len(slices), 4)]
    check_split(*pieces)


def test_single_rotations_of_other_ranges_are_one_refusal() -> None:
    slices = [*numbered(stack(0), range(1, 13)), *numbered(stack(1, count=13), range(13, 26))]
    (series,) = group_series(to_files(slices)).series
    with pytest.raises(Refusal, match="DUPLICATE_SLICE"):
        load_volume(series)


@pytest.mark.parametrize(
    "changed",
    [
        lambda slices: numbered(slices, range(1, 13)),
        lambda slices: numbered(slices, np.arange(12) // 4 + 1),
        lambda slices: numbered(slices, np.arange(12) // 6 + 1),
        lambda slices: numbered(slices, [1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1]),
        lambda slices: numbered(slices, [1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1]),
    ],
    ids=["rotation of one", "rotations of four", "two ranges", "one retaken", "three retaken"],
)
def test_what_follows_on_stays_one(changed: Callable[[list[Dataset]], list[Dataset]]) -> None:
    check_one(changed(stack(0)), 12)


def test_a_time_for_each_slice_says_nothing() -> None:
    slices = stack(0)
    for number, ds in enumerate(slices):
        ds.AcquisitionTime = f"1000{number:02}"
    check_one(slices, 12)
