"""The endpoint from the first byte to the answer, without Ray."""

import asyncio
import logging
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect, Request

from mp3d.checkpoint import open_checkpoint
from mp3d.config import ServeConfig
from mp3d.data.synthetic.dicom_files import write_ct_series
from mp3d.operating_points import FALLBACK_THRESHOLD
from mp3d.predict import Predictor
from mp3d.serving.api import BODIES_IN_MEMORY, RETRY_AFTER_S, Uploads, create_api
from mp3d.serving.engine import Engine, answer_or_error, model_out
from mp3d.serving.schema import Answer, ErrorOut, ModelOut, Rejected
from tests.serving_world import BrightBoxes, save_tiny, tiny_config, write_series, zip_of

MODEL = ModelOut(name="bright", digest="d" * 64, config_hash="c" * 64, epoch=3, score=0.5, num_classes=1)
CONFIG = ServeConfig(checkpoint="none", max_upload_mb=1, max_unpacked_mb=2, max_slices=50, max_findings=3)


@pytest.fixture
def engine() -> Engine:
    predictor = Predictor(BrightBoxes(), tiny_config().clip, 0.5, torch.device("cpu"))
    return Engine(predictor, MODEL, CONFIG)


def client_of(engine: Engine, ready: bool = True) -> TestClient:
    async def detect(body: bytes, threshold: float | None) -> Answer:
        answer = answer_or_error(engine, body, threshold)
        if isinstance(answer, ErrorOut):
            raise Rejected(answer.reason, answer.detail)
        return answer

    return TestClient(create_api(detect, MODEL, CONFIG, ready=lambda: ready), raise_server_exceptions=False)


@pytest.fixture
def client(engine: Engine) -> TestClient:
    return client_of(engine)


def test_good_series(client: TestClient, tmp_path: Path):
    volume = write_series(tmp_path / "CT")
    response = client.post("/findings", content=zip_of(tmp_path / "CT"))
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    answer = Answer.model_validate(response.json())
    (found,) = answer.findings
    assert found.box_px == (9, 5, 10, 6)
    assert found.slice_index == 3
    assert found.centre_lps_mm == pytest.approx((volume.affine @ [9, 5, 3, 1])[:3], abs=1e-3)
    assert found.diameter_mm == pytest.approx(0.9)
    assert (answer.num_slices, answer.spacing_mm) == (6, pytest.approx((2.5, 0.9, 0.8)))
    assert (answer.model, answer.threshold, answer.warnings) == (MODEL, FALLBACK_THRESHOLD, ())
    assert (answer.protocol.mode, answer.protocol.num_slices, answer.protocol.slice_spacing_mm) == ("window", 9, 2.5)
    assert "Research use only" in answer.research_use_only


def test_finding_names_the_file_it_lies_in(client: TestClient, tmp_path: Path):
    write_series(tmp_path / "CT")
    answer = client.post("/findings", content=zip_of(tmp_path / "CT")).json()
    datasets = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, (tmp_path / "CT").iterdir())}
    found = answer["findings"][0]
    hit = datasets[found["sop_instance_uid"]]
    assert hit.pixel_array[5, 9] * hit.RescaleSlope + hit.RescaleIntercept == 800
    assert hit.ImagePositionPatient[2] == pytest.approx(found["centre_lps_mm"][2])
    assert answer["series_instance_uid"] == hit.SeriesInstanceUID


def test_same_request_same_answer(client: TestClient, tmp_path: Path):
    write_series(tmp_path / "CT")
    body = zip_of(tmp_path / "CT")
    first, second = (client.post("/findings", content=body).json() for _ in range(2))
    for answer in (first, second):
        del answer["read_s"], answer["detect_s"]
    assert first == second


def test_threshold(client: TestClient, tmp_path: Path):
    write_series(tmp_path / "CT")
    body = zip_of(tmp_path / "CT")
    low, high = (client.post("/findings", params={"threshold": value}, content=body).json() for value in (0.8, 0.9))
    assert (len(low["findings"]), len(high["findings"])) == (1, 0)
    assert high["threshold"] == 0.9


@pytest.mark.parametrize("threshold", ["-0.1", "1.1", "nan", "inf", "high", ""])
def test_threshold_out_of_range(client: TestClient, threshold: str):
    response = client.post("/findings", params={"threshold": threshold}, content=b"x")
    assert (response.status_code, response.json()["reason"]) == (422, "BAD_PARAMETER")
    assert "threshold" in response.json()["detail"]


def test_more_findings_than_are_sent(client: TestClient, tmp_path: Path):
    volume = write_series(tmp_path / "CT")
    volume.hu[:, 20, 20] = 600
    write_ct_series(tmp_path / "many", volume, "DOE-JANE", uid_seed="many")
    answer = client.post("/findings", content=zip_of(tmp_path / "many")).json()
    assert len(answer["findings"]) == CONFIG.max_findings
    assert answer["findings"][0]["score"] == pytest.approx(0.8)
    assert answer["warnings"] == ["FINDINGS_CUT"]


def text_zip(folder: Path) -> bytes:
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("no image " * 100)
    return zip_of(folder)


def two_series(folder: Path) -> bytes:
    write_series(folder / "a", name="DOE-JANE")
    write_series(folder / "b", name="ROE-JOHN")
    return zip_of(folder / "a", folder / "b")


def mr_series(folder: Path) -> bytes:
    write_series(folder, modality="MR")
    return zip_of(folder)


def missing_slice(folder: Path) -> bytes:
    write_series(folder)
    sorted(folder.iterdir())[2].unlink()
    return zip_of(folder)


def truncated_slices(folder: Path) -> bytes:
    write_series(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    return zip_of(folder)


def many_files(folder: Path) -> bytes:
    folder.mkdir()
    for number in range(51):
        (folder / str(number)).write_bytes(b"x")
    return zip_of(folder)


BAD = {
    "nothing": (lambda _: b"", 400, "EMPTY_BODY"),
    "no zip": (lambda _: b"hello", 400, "NOT_A_ZIP"),
    "empty zip": (lambda _: zip_of(), 422, "ZIP_EMPTY"),
    "texts": (text_zip, 422, "NO_CT_SERIES"),
    "MR": (mr_series, 422, "NO_CT_SERIES"),
    "two series": (two_series, 422, "SEVERAL_SERIES"),
    "missing slice": (missing_slice, 422, "MISSING_SLICE"),
    "truncated": (truncated_slices, 422, "NO_CT_SERIES"),
    "many files": (many_files, 413, "TOO_MANY_FILES"),
    "large body": (lambda _: bytes(2**20 + 1), 413, "BODY_TOO_LARGE"),
}


@pytest.mark.parametrize(("make", "status", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_request_gets_a_reason(client: TestClient, tmp_path: Path, make, status: int, reason: str):
    response = client.post("/findings", content=make(tmp_path / "upload"))
    assert (response.status_code, response.json()["reason"]) == (status, reason)
    assert len(response.json()["detail"]) > 10
    assert set(response.json()) == {"reason", "detail"}


def test_refusals_say_nothing_of_the_patient(client: TestClient, tmp_path: Path):
    for make in (two_series, mr_series, missing_slice, truncated_slices):
        body = make(tmp_path / f"DOE-{make.__name__}")
        detail = client.post("/findings", content=body).json()["detail"]
        assert "DOE" not in detail
        assert "2.25." not in detail


def test_mutated_series_is_answered_or_refused(
    client: TestClient, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
):
    """Bytes changed in the files, not in the zip: whatever the reader runs into, it is no defect of the endpoint, and
    no word of the header reaches a log."""
    write_series(tmp_path / "CT")
    paths = sorted((tmp_path / "CT").iterdir())
    originals = [path.read_bytes() for path in paths]
    rng = np.random.default_rng(11)
    statuses = set()
    for _ in range(120):
        chosen = int(rng.integers(len(paths)))
        broken = bytearray(originals[chosen])
        for at in rng.integers(1400, size=rng.integers(1, 5)):  # the header: preamble and elements
            broken[at] = rng.integers(256)
        paths[chosen].write_bytes(broken)
        response = client.post("/findings", content=zip_of(tmp_path / "CT"))
        paths[chosen].write_bytes(originals[chosen])
        statuses.add(response.status_code)
        assert response.status_code in (200, 422), response.text
        assert "DOE" not in response.text
    assert statuses == {200, 422}
    assert not [warning for warning in recwarn if "pydicom" in warning.filename]
    assert not [record for record in caplog.records if record.name == "pydicom"]


def test_why_there_is_no_series(client: TestClient, tmp_path: Path):
    detail = client.post("/findings", content=text_zip(tmp_path / "texts")).json()["detail"]
    assert "3 files" in detail
    assert "NOT_DICOM" in detail


def test_other_files_beside_the_series_are_told(client: TestClient, tmp_path: Path):
    write_series(tmp_path / "CT")
    (tmp_path / "CT" / "notes.txt").write_text("hello")
    answer = client.post("/findings", content=zip_of(tmp_path / "CT")).json()
    assert answer["warnings"] == ["FILES_IGNORED"]
    assert len(answer["findings"]) == 1


def test_body_without_length_is_counted(client: TestClient):
    response = client.post("/findings", content=(bytes(2**16) for _ in range(20)))
    assert (response.status_code, response.json()["reason"]) == (413, "BODY_TOO_LARGE")


def test_form_is_told_how_to_send(client: TestClient):
    response = client.post("/findings", files={"file": b"zip"})
    assert (response.status_code, response.json()["reason"]) == (415, "MULTIPART")
    assert "--data-binary" in response.json()["detail"]


@pytest.mark.parametrize("content_type", ["application/zip", "application/x-www-form-urlencoded", "text/plain"])
def test_any_other_content_type_is_taken_for_what_it_is(client: TestClient, content_type: str):
    response = client.post("/findings", content=b"hello", headers={"Content-Type": content_type})
    assert response.json()["reason"] == "NOT_A_ZIP"


def test_defect_is_told_and_logged_without_its_message(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def broken(*_, **__):
        raise RuntimeError("DOE^JANE")

    write_series(tmp_path / "CT")
    monkeypatch.setattr("mp3d.serving.engine.group_series", broken)
    with caplog.at_level(logging.DEBUG):
        response = client_of(engine).post("/findings", content=zip_of(tmp_path / "CT"))
    assert (response.status_code, response.json()["reason"]) == (500, "INTERNAL")
    assert "RuntimeError" in caplog.text
    assert "DOE" not in caplog.text + response.text


def test_other_routes(client: TestClient, engine: Engine):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/model").json() == MODEL.model_dump()
    assert client.get("/nowhere").json()["reason"] == "NOT_FOUND"
    assert (client.get("/findings").status_code, client.get("/findings").json()["reason"]) == (
        405,
        "METHOD_NOT_ALLOWED",
    )
    assert client.get("/docs").status_code == 404  # the page would load scripts from another host
    assert "/findings" in client.get("/openapi.json").json()["paths"]
    waiting = client_of(engine, ready=False).get("/readyz")
    assert (waiting.status_code, waiting.headers["retry-after"]) == (503, str(RETRY_AFTER_S))


def request_of(*chunks: bytes | Exception | float) -> Request:
    """A request whose body comes in chunks, with pauses (seconds) or an error between them."""
    script = list(chunks)

    async def receive():
        while script:
            match script.pop(0):
                case bytes() as chunk:
                    return {"type": "http.request", "body": chunk, "more_body": bool(script)}
                case Exception():
                    return {"type": "http.disconnect"}
                case pause:
                    await asyncio.sleep(pause)
        return {"type": "http.request", "body": b"", "more_body": False}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def body_of(uploads: Uploads, request: Request) -> bytes:
    async def run() -> bytes:
        async with uploads.body(request) as body:
            assert uploads.bytes_held == len(body)
            return body

    return asyncio.run(run())


def test_upload_is_counted_and_given_back():
    uploads = Uploads(100)
    assert body_of(uploads, request_of(b"ab", b"cd")) == b"abcd"
    assert uploads.bytes_held == 0


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_of(b"a", 5.0), "UPLOAD_TIMEOUT"),
        (request_of(b"a", ClientDisconnect()), "INCOMPLETE_BODY"),
        (request_of(bytes(60), bytes(60)), "BODY_TOO_LARGE"),
    ],
    ids=["slow", "cut off", "too large"],
)
def test_failed_upload_holds_nothing(request_: Request, reason: str):
    uploads = Uploads(100, timeout_s=0.05)
    with pytest.raises(Rejected, match=reason):
        body_of(uploads, request_)
    assert uploads.bytes_held == 0


def test_more_bytes_than_there_is_room_for():
    uploads = Uploads(100)
    uploads.bytes_held = BODIES_IN_MEMORY * 100 - 50
    with pytest.raises(Rejected, match="BUSY") as busy:
        body_of(uploads, request_of(bytes(40), bytes(40)))
    assert busy.value.status == 503
    assert uploads.bytes_held == BODIES_IN_MEMORY * 100 - 50


def test_a_slow_detector_is_no_slow_upload():
    async def run() -> None:
        async with Uploads(100, timeout_s=0.01).body(request_of(b"a")):
            raise TimeoutError("of the detector")

    with pytest.raises(TimeoutError, match="detector"):
        asyncio.run(run())


def test_model_is_described_by_its_checkpoint(tmp_path: Path):
    save_tiny(tmp_path / "run" / "epoch_0001", tiny_config())
    checkpoint = open_checkpoint(tmp_path / "run")
    described = model_out(checkpoint)
    assert (described.name, described.digest, described.epoch, described.num_classes) == (
        "tiny",
        checkpoint.digest,
        1,
        1,
    )
    save_tiny(tmp_path / "other", tiny_config().override({"loop.seed": 1}))
    assert model_out(open_checkpoint(tmp_path / "other")).config_hash != described.config_hash
