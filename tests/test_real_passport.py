"""The data passport of real CT: a folder of good, odd and broken series, and the same patients in another format."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from mp3d.data.dicom_folder import read_dicom
from mp3d.data.prepare import prepare
from mp3d.data.synthetic import write_bad_files
from mp3d.data.volumes import read_volumes
from mp3d.report import Passport, write_passport
from tests.test_report import Outline

SHARED = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data in {SHARED}")

KEY, OTHER_KEY = b"a key" * 6, b"another" * 4


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    for name, folder in (("lidc", "lidc"), ("sarcoma", "sts/dicom"), ("odd", "odd"), ("liver", "liver")):
        (root / name).symlink_to(SHARED / folder)
    write_bad_files(root / "broken")
    fractions = (0.5, 0.25, 0.25)
    prepare(read_dicom(root), root / "shards", id_key=KEY, runner="local", split_fractions=fractions)
    return root / "shards"


def test_a_mixed_folder(mixed: Path):
    passport = write_passport(mixed)
    content = json.loads(passport.json.read_text())
    manifest = json.loads((mixed / "manifest.json").read_text())
    assert passport.leaks == ()
    assert sum(split["rows"] for split in content["splits"].values()) == sum(file["rows"] for file in manifest["files"])
    assert content["rejects"]["by_reason"] == Counter(reject["reason"] for reject in manifest["rejects"])
    assert {"NOT_DICOM", "NOT_CT", "TRUNCATED", "MISSING_SLICE", "GANTRY_TILT"} <= set(content["rejects"]["by_reason"])
    for of in content["intensities"].values():
        assert -3100 < of["min"] <= -1000 < of["p50"] < 100 < of["max"] < 32767
    text = Outline(passport.html.read_text(encoding="utf-8")).text
    assert "No leak was found." in text
    everything = passport.json.read_text() + text
    assert all(name not in everything for name in ("STS_", "LIDC-IDRI", "sarcoma", "1.3.6.1.4.1.14519", ".dcm"))


def leaks_with_nifti(mixed: Path, out: Path, key: bytes) -> tuple[Passport, set[tuple[str, int]]]:
    """With the same three sarcoma patients from NIfTI, all in train: kinds and counts, whatever their split here."""
    out.mkdir()
    for patient in ("STS_019", "STS_025", "STS_042"):
        (out / patient).symlink_to(SHARED / "sts" / "nifti" / patient)
    prepare(read_volumes(out), out / "shards", id_key=key, runner="local", split_fractions=(1, 0, 0))
    passport = write_passport(mixed, [out / "shards"])
    (between,) = json.loads(passport.json.read_text())["leaks"]["between"]
    counts = Counter[str]()
    for shared in between["shared"]:
        counts[shared["kind"]] += shared["count"]
    return passport, set(counts.items())


def test_the_same_patients_in_another_format(mixed: Path, tmp_path: Path):
    """Patients by their names; and by their pixels, for the two formats give the same volumes."""
    passport, found = leaks_with_nifti(mixed, tmp_path / "nifti", KEY)
    assert found == {("patients", 3), ("images", 3)}
    assert passport.leaks, "some of them are not in train here"
    passport, found = leaks_with_nifti(mixed, tmp_path / "other", OTHER_KEY)
    assert found == {("images", 3)}
    assert passport.not_compared == ("volumes: prepared with another id key",)
