"""The application as it is deployed: on Ray Serve, over HTTP, with a checkpoint."""

import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from mp3d.checkpoint import open_checkpoint
from mp3d.client import find_lesions, wait_until_ready
from mp3d.config import ClassificationHead, ServeConfig
from mp3d.data.dicom import group_series, load_volume
from mp3d.errors import CheckpointError
from mp3d.predict import Predictor
from mp3d.serving.schema import Rejected
from tests.serving_world import save_tiny, tiny_config, write_series

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
THRESHOLD = 0.01


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save_tiny(folder / "epoch_0001", tiny_config())
    return folder


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, run: Path) -> Iterator[str]:
    from ray import serve

    from serve.app import build

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config = ServeConfig(checkpoint=str(run), score_threshold=THRESHOLD, cpus_per_replica=0.5, max_upload_mb=1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(config), name="mp3d")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_series(tmp_path / "CT")
    return tmp_path / "CT"


def post(endpoint: str, body: bytes, query: str = "") -> tuple[int, dict]:
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=60)
    connection.request("POST", f"/findings{query}", body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_answer_is_that_of_the_predictor(endpoint: str, run: Path, series: Path):
    wait_until_ready(endpoint, 60)
    answer = find_lesions(endpoint, series, timeout_s=60)
    volume, _, _ = load_volume(group_series(series).series[0])
    expected = Predictor.open(run, "cpu").find_lesions(volume, THRESHOLD)
    assert len(answer.findings) == len(expected) > 0
    assert answer.findings[0].score == pytest.approx(expected[0].score, abs=1e-4)
    assert {found.slice_index for found in answer.findings} == {found.slice_index for found in expected}
    assert answer.model.digest == open_checkpoint(run).digest
    assert answer.threshold == THRESHOLD


def test_many_at_once_are_all_answered_alike(endpoint: str, series: Path):
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda _: find_lesions(endpoint, series, timeout_s=120), range(24)))
    assert len({answer.findings for answer in answers}) == 1


def test_bad_requests_get_a_reason(endpoint: str, series: Path, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    with pytest.raises(Rejected, match="NO_CT_SERIES"):
        find_lesions(endpoint, tmp_path / "texts")
    for body, query, status, reason in (
        (b"hello", "", 400, "NOT_A_ZIP"),
        (b"", "", 400, "EMPTY_BODY"),
        (b"PK\x05\x06" + bytes(18), "", 422, "ZIP_EMPTY"),
        (b"hello", "?threshold=2", 422, "BAD_PARAMETER"),
        (bytes(2**20 + 1), "", 413, "BODY_TOO_LARGE"),
    ):
        answered, error = post(endpoint, body, query)
        assert (answered, error["reason"]) == (status, reason)
    assert len(find_lesions(endpoint, series).findings) > 0


def test_laptop_config_names_only_what_there_is():
    """Ray accepts unknown keys in silence."""
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig, ServeApplicationSchema, ServeDeploySchema

    config = yaml.safe_load((Path(__file__).parents[1] / "serve" / "laptop.yaml").read_text())
    (application,) = config["applications"]
    for schema, part in (
        (ServeDeploySchema, config),
        (HTTPOptions, config["http_options"]),
        (LoggingConfig, config["logging_config"]),
        (ServeApplicationSchema, application),
    ):
        assert set(part) <= set(schema.model_fields)
    ServeDeploySchema.model_validate(config)
    assert ServeConfig.model_validate(application["args"]).checkpoint.startswith("/")
    assert application["import_path"] == "serve.app:build"
    assert config["http_options"]["host"] == "127.0.0.1"


def test_checkpoint_is_verified_before_anything_is_deployed(tmp_path: Path):
    from serve.app import build

    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        build(ServeConfig(checkpoint=str(tmp_path)))
    save_tiny(tmp_path / "classifier", tiny_config(ClassificationHead(num_classes=2)))
    with pytest.raises(CheckpointError, match="finds no lesions"):
        build(ServeConfig(checkpoint=str(tmp_path / "classifier")))
