"""Nothing of a patient leaves the reader: strings planted wherever DICOM holds any are in nothing that is written.

Let through by design: ``OUT-private/sources.json`` (names of refused files, for the owner only) and, in an answer of
the endpoint to the sender of the images, the UIDs of series and images.
"""

import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from pydicom import Dataset, config, dcmread
from pydicom.datadict import DicomDictionary, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag, Tag

from jobs import evaluate
from jobs import prepare as prepare_job
from mp3d import cli
from mp3d.checkpoint import open_checkpoint
from mp3d.config import ServeConfig
from mp3d.data import dicom_folder
from mp3d.data.dicom import group_series, load_volume
from mp3d.data.synthetic import write_bad_files, write_ct_world
from mp3d.launch import run_training
from mp3d.predict import Predictor
from mp3d.serving.api import create_api
from mp3d.serving.engine import Engine, answer_or_error, model_out
from mp3d.serving.schema import Answer, ErrorOut, Rejected
from tests.dicom_files import segmentation, to_bytes
from tests.tiny import detector_config

CANARY, UID_CANARY = "QZCNRY", "1.2.826.0.1.77707770777"
"""Every planted string begins with one of them; each is another one."""
STRING_VRS = ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")


class Planter:
    """Counts the strings it plants, by VR."""

    def __init__(self) -> None:
        self.planted: dict[str, int] = {}

    def text(self, vr: str) -> str:
        self.planted[vr] = self.planted.get(vr, 0) + 1
        number = sum(self.planted.values())
        return f"{UID_CANARY}.{number}" if vr == "UI" else f"{CANARY}{number}"

    def raw(self, tag: BaseTag, vr: str) -> RawDataElement:
        """Past pydicom's checks, for no number or date is a unique string."""
        value = self.text(vr).encode()
        value += b" " * (len(value) % 2)
        return RawDataElement(tag, vr, len(value), value, 0, False, True)

    def everywhere(self, ds: Dataset) -> None:
        """Into every element of DICOM that holds a string, a nested and a private one."""
        for number in DicomDictionary:
            tag = Tag(number)
            vr = dictionary_VR(tag)
            if vr in STRING_VRS and tag.group >= 8 and tag not in ds:
                ds[tag] = self.raw(tag, vr)
        self.nested_and_private(ds)

    def nested_and_private(self, ds: Dataset) -> None:
        item = Dataset()
        for keyword in ("PatientName", "InstitutionName", "TextValue", "PatientBirthDate"):
            item[Tag(keyword)] = self.raw(Tag(keyword), dictionary_VR(keyword))
        item.OtherPatientIDsSequence = [Dataset()]
        item.OtherPatientIDsSequence[0].PatientID = self.text("LO")
        ds.OtherPatientIDsSequence = [item]
        block = ds.private_block(0x0009, self.text("LO"), create=True)
        for number, vr in enumerate(STRING_VRS, 1):
            tag = block.get_tag(number)
            ds[tag] = self.raw(tag, vr)
        block.add_new(0x40, "UN", self.text("UN").encode())
        block.add_new(0x41, "OB", self.text("OB").encode() + b"\0")

    def plain(self, ds: Dataset) -> None:
        for keyword in ("PatientName", "PatientBirthDate", "InstitutionName", "StudyDescription", "SeriesDescription"):
            ds[Tag(keyword)] = self.raw(Tag(keyword), dictionary_VR(keyword))
        ds.ImageType = [*ds.ImageType, f"{CANARY}IMAGETYPE"]
        ds.ConvolutionKernel = f"{CANARY}KERNEL"
        ds[Tag("AcquisitionNumber")] = self.raw(Tag("AcquisitionNumber"), "IS")


def planted_world(root: Path) -> Planter:
    """A made world with strings in its files, and with their names for files, folders and patients."""
    made = root.parent / "made"
    write_ct_world(made, num_patients=6, seed=3, size_px=64, num_slices=12)
    planter = Planter()
    uids: dict[str, str] = {}
    for path in sorted(made.rglob("*")):
        if path.is_dir():
            continue
        ds = dcmread(path)
        for element in ds.iterall():
            if element.VR == "UI" and "SOPClass" not in element.keyword:
                element.value = uids.setdefault(str(element.value), planter.text("UI"))
        for keyword in ("StructureSetLabel", "StructureSetName"):
            if keyword in ds:
                setattr(ds, keyword, planter.text("SH"))
        for roi in ds.get("StructureSetROISequence") or []:
            roi.ROIName = f"{roi.ROIName} {planter.text('LO')}"
        patient = path.relative_to(made).parts[0]
        ds.PatientID = f"{CANARY}-{patient}"
        first = not (root / f"{CANARY}-{patient}").exists()
        planter.plain(ds) if ds.Modality == "CT" else None
        planter.everywhere(ds) if first else planter.nested_and_private(ds)
        target = root / f"{CANARY}-{patient}" / f"{CANARY}-{path.parent.name}" / f"{CANARY}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(target, enforce_file_format=True)
    return planter


def plant_segmentation(root: Path, planter: Planter) -> Dataset:
    """A SEG of the first patient's series, with strings in its names."""
    patient = sorted(root.iterdir())[0]
    (series,) = group_series(patient).series
    volume, _, _ = load_volume(series)
    inside = np.zeros(volume.hu.shape)
    inside[4:7, 20:30, 20:34] = 1
    ds = segmentation(volume, {f"tumour {planter.text('LO')}": inside})
    ds.PatientID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series.patient, series.study, planter.text("UI")
    ds.SeriesInstanceUID, ds.SOPInstanceUID = planter.text("UI"), planter.text("UI")
    ds.ReferencedSeriesSequence[0].SeriesInstanceUID = series.series_instance_uid
    ds.ContentLabel, ds.ContentCreatorName = planter.text("CS"), planter.text("PN")
    segment = ds.SegmentSequence[0]
    segment.SegmentDescription, segment.TrackingID = planter.text("ST"), planter.text("UT")
    segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning = planter.text("LO")
    planter.nested_and_private(ds)
    (patient / f"{CANARY}-seg").write_bytes(to_bytes(ds))
    return ds


def plant_bad_files(root: Path, seg: Dataset) -> None:
    """What is refused: no DICOM, cut, other modality, no rescale, a gap, broken annotations, a defect."""
    bad = root / f"{CANARY}-bad"
    write_bad_files(bad)
    for path in list(bad.iterdir()):
        path.rename(bad / f"{CANARY}-{path.name}")
    (bad / f"{CANARY}.txt.dcm").write_text(CANARY)
    patients = sorted(root.iterdir())[:3]

    def copied(name: str, number: int, change: Callable[[Dataset, int], object]) -> None:
        source = next(folder for folder in sorted(patients[number].iterdir()) if folder.name.endswith("CT"))
        for z, path in enumerate(sorted(source.iterdir())):
            ds = dcmread(path)
            ds.SeriesInstanceUID = f"{UID_CANARY}.9.{name.encode().hex()[:6]}".replace("a", "1").replace("b", "2")
            ds.SeriesInstanceUID = "".join(c if c in "0123456789." else "7" for c in ds.SeriesInstanceUID)
            if change(ds, z) is not False:
                (bad / f"{CANARY}-{name}").mkdir(exist_ok=True)
                ds.save_as(bad / f"{CANARY}-{name}" / path.name)

    copied("gap", 0, lambda _, z: z != 4)
    copied("rescale", 1, lambda ds, _: delattr(ds, "RescaleSlope"))
    copied("defect", 2, lambda ds, _: setattr(ds, "PatientID", f"{CANARY}-DEFECT"))
    structure_set = next(path for path in root.rglob("*") if path.is_file() and dcmread(path).Modality == "RTSTRUCT")
    (bad / f"{CANARY}-rs").write_bytes(structure_set.read_bytes()[:-60])
    (bad / f"{CANARY}-seg").write_bytes(to_bytes(seg)[:-60])


def hits(content: bytes) -> list[str]:
    """The places of canaries, with what is around them."""
    found = []
    for canary in (CANARY, UID_CANARY):
        for encoded in (canary.encode(), canary.lower().encode(), canary.encode("utf-16-le"), canary.encode().hex()):
            needle = encoded if isinstance(encoded, bytes) else encoded.encode()
            at = content.find(needle)
            if at >= 0:
                found.append(repr(content[max(at - 60, 0) : at + 40]))
    return found


def hits_below(folder: Path) -> dict[str, list[str]]:
    """Of every file: its name, its bytes, and the values of Parquet, which are compressed on the disk."""
    found = {}
    for path in folder.rglob("*"):
        content = str(path.relative_to(folder)).encode()
        if path.is_symlink():
            content += os.readlink(path).encode()
        elif path.is_file():
            content += path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                content += json.dumps(
                    table.drop_columns([n for n in ("image", "mask") if n in table.column_names]).to_pylist(),
                    default=str,
                ).encode()
                content += str(table.schema.metadata).encode()
        if spots := hits(content):
            found[str(path)] = spots
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("canary") / f"{CANARY}-root"
    mode = config.settings.writing_validation_mode
    config.settings.writing_validation_mode = config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no number or date is a string of ours
            planter = planted_world(root)
            plant_bad_files(root, plant_segmentation(root, planter))
    finally:
        config.settings.writing_validation_mode = mode
    assert set(planter.planted) >= set(STRING_VRS)
    assert sum(planter.planted.values()) > 2000
    return root


def test_the_search_finds_what_is_planted(planted: Path) -> None:
    found = hits_below(planted)
    assert len(found) > 70


def test_nothing_of_a_patient_is_written(
    planted: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    warnings.simplefilter("always")
    read = dicom_folder.load_volume

    def defective(series, policy):
        if series.patient.endswith("DEFECT"):
            raise ValueError(f"{series.patient} {series.key}")  # as any library might say
        return read(series, policy)

    monkeypatch.setattr(dicom_folder, "load_volume", defective)
    monkeypatch.setenv("MP3D_ID_KEY_FILE", str(tmp_path / "id_key"))
    shards, out = tmp_path / "shards", tmp_path / "report"
    arguments = ["--out", str(shards), "--runner", "local", "--report", "dicom", "--root", str(planted)]
    assert cli.run(lambda: prepare_job.main(arguments)) == 5
    assert (shards / "passport.html").exists()
    manifest = json.loads((shards / "manifest.json").read_text())
    assert {reject["reason"] for reject in manifest["rejects"]} >= {
        *("NOT_DICOM", "TRUNCATED", "NOT_CT", "MISSING_SLICE", "MISSING_RESCALE", "READER_FAILED", "BAD_STRUCTURE_SET"),
        "BAD_SEGMENTATION",
    }
    tables = [pq.read_table(path, columns=["boxes"]) for path in sorted(shards.rglob("*.parquet"))]
    boxes = np.concatenate([row for table in tables for row in table["boxes"].to_pylist() if row]).reshape(-1, 4)
    assert [20, 20, 34, 30] in boxes.tolist()  # the segmentation was read
    assert len(manifest["series"]) == 6
    private = tmp_path / "shards-private" / "sources.json"
    assert CANARY in private.read_text()
    assert private.stat().st_mode & 0o077 == 0
    only_bad = ["--out", str(tmp_path / "none"), "--runner", "local", "dicom", "--root", str(planted / f"{CANARY}-bad")]
    assert cli.run(lambda: prepare_job.main(only_bad)) == 3
    (tmp_path / "none-private" / "sources.json").unlink()
    private.unlink()

    run_training(
        detector_config(shards, tmp_path / "runs", loop__epochs=1, loop__steps_per_epoch=1, tracking__mode="offline")
    )
    checkpoint = tmp_path / "runs" / "detector"
    arguments = ["--checkpoint", str(checkpoint), "--shards", str(shards), "--out", str(out), "--runner", "local"]
    assert cli.run(lambda: evaluate.main([*arguments, "--split", "val"])) == 0
    assert list(tmp_path.rglob("*.wandb"))

    texts = served(planted, checkpoint)
    said = capfd.readouterr()
    assert "prepared:" in said.out
    texts += [said.out, said.err, caplog.text, *(str(warning.message) for warning in recwarn)]
    assert hits("".join(texts).encode()) == []
    assert hits_below(tmp_path) == {}


def served(planted: Path, checkpoint: Path) -> list[str]:
    """What the endpoint says to each folder, in a zip with canaries in its names; UIDs of good answers left out."""
    opened = open_checkpoint(checkpoint)
    settings = ServeConfig(checkpoint="none", score_threshold=0.0, max_upload_mb=200, max_slices=100)
    engine = Engine(Predictor.open(opened, "cpu"), model_out(opened), settings)

    async def detect(body: bytes, threshold: float | None) -> Answer:
        answer = answer_or_error(engine, body, threshold)
        if isinstance(answer, ErrorOut):
            raise Rejected(answer.reason, answer.detail)
        return answer

    client = TestClient(create_api(detect, engine.model, settings, ready=lambda: True), raise_server_exceptions=False)
    texts = []
    codes = set()
    folders = [sorted(planted.iterdir())[0], *(planted / f"{CANARY}-bad").iterdir(), planted]
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else [folder]
        body = io.BytesIO()
        with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, path in enumerate(files[:90]):
                archive.write(path, f"{CANARY}/{number}/{path.name}")
            archive.comment = CANARY.encode()
        response = client.post("/findings", content=body.getvalue())
        codes.add(response.status_code)
        answer = response.json()
        if response.status_code == 200:
            assert answer["series_instance_uid"].startswith(UID_CANARY)
            del answer["series_instance_uid"]
            for finding in answer["findings"]:
                del finding["sop_instance_uid"]
        texts.append(f"{answer} {dict(response.headers)}")
    texts.append(client.get("/openapi.json").text)
    assert codes == {200, 422}
    return texts
