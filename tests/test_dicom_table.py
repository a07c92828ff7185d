"""The cases in which common series readers go wrong, one by one: ours reads them right, or refuses them by name.

What SimpleITK makes of each stands beside it, as a reason for the gate: where it is silently wrong, the test shows it.
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import Dataset

from mp3d.data.dicom import group_series, load_volume
from mp3d.data.series import Volume
from mp3d.errors import Refusal
from tests.dicom_files import ct_slices, made_volume, set_stored, to_bytes, to_files

TRUTH = made_volume(shape=(10, 12, 9), spacing_mm=(2.5, 0.8, 0.6))


def reversed_numbers(slices: list[Dataset]) -> None:
    for z, ds in enumerate(slices):
        ds.InstanceNumber = z + 1


def slope_changes(slices: list[Dataset], first: str, rest: str) -> None:
    for z, ds in enumerate(slices):
        ds.RescaleSlope = rest if z else first
        set_stored(ds, np.rint((TRUTH.hu[z] + 1024) / float(ds.RescaleSlope)))


def missing(slices: list[Dataset]) -> None:
    del slices[4]


def copied(slices: list[Dataset]) -> None:
    slices.append(deepcopy(slices[4]))
    slices[-1].SOPInstanceUID += ".9"


def another_image(slices: list[Dataset]) -> None:
    copied(slices)
    set_stored(slices[-1], np.zeros(TRUTH.hu.shape[1:]))


def tilted(slices: list[Dataset]) -> None:
    for z, ds in enumerate(slices):
        ds.ImagePositionPatient[1] += z * 2.5 * np.tan(np.radians(15))


def localizer(slices: list[Dataset]) -> None:
    scout = ct_slices(made_volume(shape=(1, 12, 9), orientation=(0, 1, 0, 0, 0, -1), seed=5))[0]
    scout.SOPInstanceUID += ".9"
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    slices.append(scout)


def jitter(slices: list[Dataset]) -> None:
    for ds, off in zip(slices, np.random.default_rng(0).uniform(-0.02, 0.02, 10), strict=True):
        ds.ImagePositionPatient[2] += off


def one_moved(slices: list[Dataset]) -> None:
    slices[4].ImagePositionPatient[2] += 0.7


def monochrome1(slices: list[Dataset]) -> None:
    for ds in slices:
        ds.PhotometricInterpretation = "MONOCHROME1"


def no_rescale(slices: list[Dataset]) -> None:
    for ds in slices:
        del ds.RescaleSlope
        del ds.RescaleIntercept


def unchanged(_: list[Dataset]) -> None:
    """PixelSpacing is (row, column); the truth is not square."""


@dataclass(frozen=True)
class Case:
    change: object
    answer: str | None
    """Reason code; None: it is read right."""
    simpleitk_is_right: bool
    position_mm: float = 1e-4


CASES = {
    "instance numbers reversed": Case(reversed_numbers, None, True),
    "slope 1 first": Case(lambda slices: slope_changes(slices, "1", "0.377"), None, False),
    "slope 0.377 first": Case(lambda slices: slope_changes(slices, "0.377", "1"), None, True),
    "slice missing": Case(missing, "MISSING_SLICE", False),
    "slice twice": Case(copied, None, False),
    "another image at one place": Case(another_image, "DUPLICATE_SLICE", False),
    "gantry tilt": Case(tilted, "GANTRY_TILT", False),
    "localizer inside": Case(localizer, None, False),
    "jitter": Case(jitter, None, True, position_mm=0.02),
    "one slice moved": Case(one_moved, "UNEVEN_SPACING", False),
    "MONOCHROME1": Case(monochrome1, None, False),
    "no rescale tags": Case(no_rescale, "MISSING_RESCALE", False),
    "pixels that are not square": Case(unchanged, None, True),
}


@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name: str) -> None:
    case = CASES[name]
    slices = ct_slices(TRUTH)
    exact = TRUTH.hu.astype(float)
    case.change(slices)  # type: ignore[operator]
    if name.startswith("slope"):
        exact = np.stack([stored_hu(ds) for ds in slices])
    (series,) = group_series(to_files(slices)).series
    if case.answer:
        with pytest.raises(Refusal, match=case.answer):
            load_volume(series)
        return
    volume, _, _ = load_volume(series)
    assert np.abs(volume.hu - exact).max() <= 0.5 + 1e-3
    first, last = ((volume.affine @ [0, 0, z, 1])[:3] for z in (0, 9))
    np.testing.assert_allclose(first, (TRUTH.affine @ [0, 0, 0, 1])[:3], atol=case.position_mm)
    np.testing.assert_allclose(last, (TRUTH.affine @ [0, 0, 9, 1])[:3], atol=case.position_mm)
    np.testing.assert_allclose(volume.affine[:3, :2], TRUTH.affine[:3, :2], atol=1e-4)


def stored_hu(ds: Dataset) -> np.ndarray:
    stored = np.frombuffer(ds.PixelData, "<i2").reshape(ds.Rows, ds.Columns)
    return stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)


@pytest.mark.parametrize("name", CASES)
def test_what_simpleitk_makes_of_it(name: str, tmp_path) -> None:
    slices = ct_slices(TRUTH)
    CASES[name].change(slices)  # type: ignore[operator]
    for number, ds in enumerate(slices):
        (tmp_path / f"{number}.dcm").write_bytes(to_bytes(ds))
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    hu = sitk.GetArrayFromImage(image)
    right = hu.shape == TRUTH.hu.shape and np.abs(hu - TRUTH.hu).max() <= 0.5
    if right:
        places = sorted((list(map(float, ds.ImagePositionPatient)) for ds in slices), key=lambda place: place[2])
        read = [image.TransformIndexToPhysicalPoint([0, 0, z]) for z in range(10)]
        right = np.abs(np.subtract(read, places)).max() < 0.05
    assert right == CASES[name].simpleitk_is_right


def test_the_truth_is_asymmetric() -> None:
    assert isinstance(TRUTH, Volume)
    for flipped in (TRUTH.hu[::-1], TRUTH.hu[:, ::-1], TRUTH.hu[:, :, ::-1]):
        assert not np.array_equal(flipped, TRUTH.hu)
