"""jobs/predict.py: folders in, findings in the right millimetres out; what cannot be read is refused by name."""

import csv
import importlib.metadata
import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from jobs import predict as job
from mp3d.config import ClipConfig, PredictConfig
from mp3d.data.series import Volume
from mp3d.data.synthetic.dicom_files import write_ct_series
from mp3d.errors import CheckpointError, ConfigError, DataError
from mp3d.operating_points import FALLBACK_THRESHOLD, OperatingPoints, keep_operating_points
from mp3d.predict import Predictor
from mp3d.sample import Clip, Prediction
from tests.dicom_files import ct_slices, made_volume, random_orientation, to_bytes
from tests.serving_world import save_tiny, tiny_config, write_series

PLANTED_HU = 2900


class Planted:
    """ "Detects" what is brighter than anything in a body, as one box with score 0.9."""

    def __call__(self, clips: list[Clip]) -> list[Prediction]:
        return [self.on_slice(clip.slices[key]) for clip in clips for key in clip.key_slices]

    def on_slice(self, hu: torch.Tensor) -> Prediction:
        bright = (hu > PLANTED_HU - 400).nonzero()
        boxes = torch.zeros(0, 4)
        if len(bright):
            (top, left), (bottom, right) = bright.amin(0), bright.amax(0) + 1
            boxes = torch.stack([left, top, right, bottom]).float()[None]
        return {"boxes": boxes, "scores": torch.full((len(boxes),), 0.9), "labels": torch.ones(len(boxes), dtype=int)}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose detector is replaced by one that finds what was planted."""
    save_tiny(tmp_path / "run", tiny_config())
    stub = Predictor(Planted(), ClipConfig(num_slices=9), 0.5, torch.device("cpu"))
    monkeypatch.setattr(job.Predictor, "open", lambda *_: stub)
    return tmp_path / "run"


def run(checkpoint: Path, folder: Path, **changes) -> tuple[int, dict]:
    out = checkpoint.parent / "out"
    config = PredictConfig(checkpoint=str(checkpoint), input=str(folder), out=str(out), runner="local")
    code = job.predict(config.override(changes), dry_run=False)
    return code, json.loads((out / "findings.json").read_text())


def plant(volume: Volume, centre_mm: np.ndarray, radius_mm: float) -> None:
    """A bright ball at a place in the patient."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.hu.shape), indexing="ij"), -1)[..., ::-1]
    places = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    volume.hu[np.linalg.norm(places - centre_mm, axis=-1) <= radius_mm] = PLANTED_HU


def flat_volume(orientation, spacing_mm=(2.5, 0.7, 1.1), shape=(20, 60, 44)) -> Volume:
    volume = made_volume(shape, spacing_mm, orientation)
    volume.hu[...] = 30
    return volume


ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "upside down": (-1, 0, 0, 0, -1, 0),
    "feet first": (1, 0, 0, 0, -1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": tuple(random_orientation(np.random.default_rng(5))),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS.keys())
def test_a_planted_ball_is_found_where_it_was_planted(checkpoint: Path, tmp_path: Path, orientation):
    """DICOM with oblong pixels, Instance Numbers that fall, in every orientation; off centre on all axes."""
    volume = flat_volume(orientation)
    centre = (volume.affine @ [27.3, 18.6, 11.2, 1])[:3]
    plant(volume, centre, 7.0)
    folder = tmp_path / "dicom"
    folder.mkdir()
    for number, ds in enumerate(ct_slices(volume)):
        (folder / f"{number}.dcm").write_bytes(to_bytes(ds))
    code, found = run(checkpoint, folder)
    assert (code, found["refused"]) == (0, [])
    (series,) = found["series"]
    (lesion,) = series["lesions"]
    assert series["series_instance_uid"] == ct_slices(volume)[0].SeriesInstanceUID
    # half a voxel on each side of the ball's edge, and one slice of the grid
    assert lesion["centre_lps_mm"] == pytest.approx(centre, abs=1.3)
    assert lesion["size_mm"]["x"] == pytest.approx(14, abs=1.2)
    assert lesion["size_mm"]["y"] == pytest.approx(14, abs=0.8)
    assert lesion["size_mm"]["z"] == pytest.approx(14, abs=2.6)
    assert lesion["diameter_mm"] == pytest.approx(14, abs=1.2)
    for finding in lesion["findings"]:
        distance = np.linalg.norm(np.array(finding["centre_lps_mm"]) - centre)
        assert distance <= 7.5
        assert finding["sop_instance_uid"].endswith(f".{finding['slice_index'] + 1}")
    with Image.open(checkpoint.parent / "out" / lesion["picture"]) as picture:
        assert picture.size == (800, 430)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_volume_files_too(checkpoint: Path, tmp_path: Path, ending: str):
    volume = flat_volume(ORIENTATIONS["feet first"])
    centre = (volume.affine @ [27.3, 18.6, 11.2, 1])[:3]
    plant(volume, centre, 7.0)
    folder = tmp_path / "volumes"
    folder.mkdir()
    if ending == ".nii.gz":
        to_ras = np.diag([-1, -1, 1, 1.0])
        nibabel.save(nibabel.Nifti1Image(volume.hu.T, to_ras @ volume.affine), folder / f"ct{ending}")
    else:
        image = sitk.GetImageFromArray(volume.hu)
        spacing = volume.spacing_mm[::-1]
        image.SetSpacing(spacing)
        image.SetDirection((volume.affine[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(volume.affine[:3, 3].tolist())
        sitk.WriteImage(image, folder / f"ct{ending}")
    (folder / "ct_mask.nii.gz").write_bytes(b"no volume")
    code, found = run(checkpoint, folder, volumes="ct.*")
    assert (code, found["refused"]) == (0, [])
    (lesion,) = found["series"][0]["lesions"]
    assert lesion["centre_lps_mm"] == pytest.approx(centre, abs=1.3)
    code, found = run(checkpoint, folder)
    assert code == 5
    assert [(each["name"], each["reason"]) for each in found["refused"]] == [("ct_mask.nii.gz", "BAD_IMAGE")]
    assert run(checkpoint, folder, allowed_rejects=1)[0] == 0


def test_the_table_has_a_row_a_lesion(checkpoint: Path, tmp_path: Path):
    volume = flat_volume(ORIENTATIONS["axial"])
    for place, radius in (([10, 10, 5, 1], 4), ([32, 45, 14, 1], 6)):
        plant(volume, (volume.affine @ place)[:3], radius)
    volume.hu[:8, 30:] = 30
    write_ct_series(tmp_path / "series", volume, "DOE", uid_seed="two")
    code, found = run(checkpoint, tmp_path / "series")
    rows = list(csv.DictReader((tmp_path / "out" / "findings.csv").read_text().splitlines()))
    lesions = found["series"][0]["lesions"]
    assert code == 0
    assert len(rows) == len(lesions) == 2
    for row, lesion in zip(rows, lesions, strict=True):
        assert float(row["centre_x_lps_mm"]) == pytest.approx(lesion["centre_lps_mm"][0], abs=0.006)
        assert float(row["size_z_mm"]) == pytest.approx(lesion["size_mm"]["z"], abs=0.006)
        assert int(row["first_slice"]) <= int(row["key_slice"]) <= int(row["last_slice"])
        assert row["picture"] == lesion["picture"]
    assert found["research_use_only"].startswith("Research use only")
    assert (tmp_path / "out" / "findings.json").stat().st_mode & 0o077 == 0


def test_a_series_is_named_by_its_uid_and_says_where_it_lies(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """DICOM in two folders, a volume beside them; what is printed goes into a log here, and names nobody."""
    volume = flat_volume(ORIENTATIONS["axial"])
    plant(volume, (volume.affine @ [20, 20, 10, 1])[:3], 6)
    write_ct_series(tmp_path / "in" / "DOE" / "ct", volume, "DOE", uid_seed="one")
    half = sorted((tmp_path / "in" / "DOE" / "ct").iterdir())[::2]
    (tmp_path / "in" / "DOE" / "more").mkdir()
    for file in half:
        file.rename(tmp_path / "in" / "DOE" / "more" / file.name)
    nibabel.save(nibabel.Nifti1Image(volume.hu.T, np.diag([-1, -1, 1, 1]) @ volume.affine), tmp_path / "in" / "v.nii")
    (tmp_path / "in" / "ROE.dcm").write_bytes(b"DICM, but no more")
    code, found = run(checkpoint, tmp_path / "in", allowed_rejects=1)
    dicom, file = found["series"]
    uid = pydicom.dcmread(tmp_path / "in" / "DOE" / "more" / half[0].name).SeriesInstanceUID
    assert (dicom["name"], dicom["series_instance_uid"], dicom["folder"]) == (uid, uid, "DOE")
    assert dicom["first_file"].startswith("DOE/ct/")
    assert (file["name"], file["series_instance_uid"]) == (file["first_file"], None) == ("v.nii", None)
    assert file["folder"] == "."
    rows = list(csv.DictReader((tmp_path / "out" / "findings.csv").read_text().splitlines()))
    assert [(row["series"], row["folder"], row["first_file"]) for row in rows] == [
        (each["name"], each["folder"], each["first_file"]) for each in found["series"]
    ]
    printed = "".join(capsys.readouterr())
    assert code == 0
    assert "series 1: 1 lesions\nseries 2: 1 lesions" in printed
    assert "refused a file: NOT_DICOM" in printed
    for name in ("DOE", "ROE", uid):
        assert name not in printed


def test_a_series_without_lesions_has_none(checkpoint: Path, tmp_path: Path):
    write_series(tmp_path / "series")
    code, found = run(checkpoint, tmp_path / "series")
    assert (code, found["series"][0]["lesions"]) == (0, [])
    assert not (tmp_path / "out" / "pictures").exists()
    assert len((tmp_path / "out" / "findings.csv").read_text().splitlines()) == 1


def test_findings_say_with_what_they_were_made(checkpoint: Path, tmp_path: Path):
    """Versions by the names that metrics.json has for them, and what was done with odd geometry."""
    write_series(tmp_path / "series")
    _, found = run(checkpoint, tmp_path / "series", tilt="shear")
    assert found["software"]["mp3d"] == importlib.metadata.version("mp3d")
    assert set(found["software"]) == {"mp3d", "torch", "torchvision", "numpy"}
    assert found["geometry"] == {"tilt": "shear", "uneven": "refuse"}


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(checkpoint: Path, tmp_path: Path):
    write_series(tmp_path / "in" / "good")
    write_series(tmp_path / "in" / "gap", name="GAP")
    sorted((tmp_path / "in" / "gap").iterdir())[2].unlink()
    (tmp_path / "in" / "broken.dcm").write_bytes(b"DICM, but no more")
    code, found = run(checkpoint, tmp_path / "in")
    assert code == 5
    assert [series["folder"] for series in found["series"]] == ["good"]
    assert {each.get("folder", each["name"]): each["reason"] for each in found["refused"]} == {
        "broken.dcm": "NOT_DICOM", "gap": "MISSING_SLICE",
    }  # fmt: skip
    with pytest.raises(DataError, match="could be read"):
        run(checkpoint, tmp_path / "in" / "gap")
    with pytest.raises(DataError, match="is not there"):
        run(checkpoint, tmp_path / "nowhere")


def test_the_operating_point_of_the_checkpoint_decides(checkpoint: Path, tmp_path: Path):
    from mp3d.checkpoint import open_checkpoint

    volume = flat_volume(ORIENTATIONS["axial"])
    plant(volume, (volume.affine @ [20, 20, 10, 1])[:3], 6)
    write_ct_series(tmp_path / "series", volume, "DOE", uid_seed="one")
    _, found = run(checkpoint, tmp_path / "series")
    assert found["threshold"] == FALLBACK_THRESHOLD
    assert "no operating points" in found["threshold_from"]
    opened = open_checkpoint(checkpoint)
    points = OperatingPoints(opened.digest, {1.0: 0.95, 4.0: 0.5}, {1.0: 0.2, 4.0: 0.6}, "MP3D port", "val", "d", 9, 9)
    keep_operating_points(opened, points)
    _, found = run(checkpoint, tmp_path / "series")
    assert (found["threshold"], found["series"][0]["lesions"]) == (0.95, [])
    _, found = run(checkpoint, tmp_path / "series", fps_per_image=4.0)
    assert (found["threshold"], len(found["series"][0]["lesions"])) == (0.5, 1)
    assert found["threshold_from"] == "4 false positives per annotated key slice (val, 9 key slices)"
    with pytest.raises(ConfigError, match="no operating point for 3"):
        run(checkpoint, tmp_path / "series", fps_per_image=3.0)
    assert open_checkpoint(checkpoint).digest == opened.digest


def test_the_plan_and_a_checkpoint_that_is_none(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_series(tmp_path / "series")
    config = PredictConfig(checkpoint=str(checkpoint), input=str(tmp_path / "series"), out=str(tmp_path / "out"))
    assert job.predict(config, dry_run=True) == 0
    assert "1 in" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        job.predict(config.override({"checkpoint": str(tmp_path / "series")}), dry_run=True)
