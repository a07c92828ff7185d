"""jobs/predict.py on real CT: lesions planted into the files at known places come back there."""

import os
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest

from tests.test_job_predict import PLANTED_HU, checkpoint, run  # noqa: F401  (a fixture)

SHARED = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data in {SHARED}")
LIDC = SHARED / "lidc" / "LIDC-IDRI-0002"
GE = SHARED / "odd" / "gantry_tilt_variable_spacing_GE"


def planted_copy(source: Path, folder: Path, centre_mm: np.ndarray, radius_mm: float) -> None:
    """A copy of a series with a bright ball, drawn slice by slice from each header's own position and directions."""
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.suffix == ".dcm")):
        ds = pydicom.dcmread(path)
        row, column = np.reshape([float(value) for value in ds.ImageOrientationPatient], (2, 3))
        y_mm, x_mm = (float(value) for value in ds.PixelSpacing)
        y, x = np.mgrid[: ds.Rows, : ds.Columns]
        places = np.array(ds.ImagePositionPatient, float) + (x * x_mm)[..., None] * row + (y * y_mm)[..., None] * column
        stored = ds.pixel_array.copy()
        inside = np.linalg.norm(places - centre_mm, axis=-1) <= radius_mm
        stored[inside] = (PLANTED_HU - float(ds.RescaleIntercept)) / float(ds.RescaleSlope)
        ds.PixelData = stored.tobytes()
        folder.mkdir(parents=True, exist_ok=True)
        ds.save_as(folder / f"{number:03d}.dcm")


@pytest.mark.usefixtures("checkpoint")
def test_a_lesion_planted_into_lidc_is_found_in_its_millimetres(checkpoint: Path, tmp_path: Path):  # noqa: F811
    centre = np.array([38.0, -52.0, -88.0])
    planted_copy(LIDC, tmp_path / "lidc", centre, 4.5)
    code, found = run(checkpoint, tmp_path / "lidc")
    assert (code, found["refused"]) == (0, [])
    (lesion,) = found["series"][0]["lesions"]
    assert lesion["centre_lps_mm"] == pytest.approx(centre, abs=1.3)
    assert lesion["diameter_mm"] == pytest.approx(9, abs=1.4)


def test_lidc_as_it_is_holds_nothing_planted(checkpoint: Path):  # noqa: F811
    code, found = run(checkpoint, LIDC)
    assert (code, found["series"][0]["lesions"], found["refused"]) == (0, [], [])


@pytest.mark.parametrize("in_slice", [6, 20], ids=["slices of 4 mm", "slices of 7 mm"])
def test_the_odd_ge_series_is_refused_by_name_or_corrected_to_the_right_millimetres(
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    in_slice: int,
):
    """Two sheared stacks; the ball lies wholly in one of them, or its centre would be that of the part in the stack."""
    from mp3d.errors import DataError

    header = pydicom.dcmread(sorted(GE.rglob("*.dcm"))[in_slice], stop_before_pixels=True)
    row, column = np.reshape([float(value) for value in header.ImageOrientationPatient], (2, 3))
    centre = np.array(header.ImagePositionPatient, float) + 130 * row + 100 * column
    planted_copy(GE, tmp_path / "ge", centre, 13)
    with pytest.raises(DataError, match="could be read"):
        run(checkpoint, tmp_path / "ge")
    code, found = run(checkpoint, tmp_path / "ge", tilt="shear", allowed_rejects=9)
    assert code == 0
    for each in found["refused"]:
        assert each["reason"].isupper()
    (lesion,) = [lesion for series in found["series"] for lesion in series["lesions"]]
    offset = np.array(lesion["centre_lps_mm"]) - centre
    along_normal = float(offset @ np.cross(row, column))
    # a pixel in the plane, where a shear that is not undone would show: measured 0.21 mm
    assert np.linalg.norm(offset - along_normal * np.cross(row, column)) < 0.5
    # the stub may see the ball's last slice on one side only
    assert abs(along_normal) < 0.5 * float(header.SliceThickness) + 0.1
    shutil.rmtree(tmp_path / "ge")
