"""The client against a real endpoint on the loopback, and against servers that are none."""

import json
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import uvicorn

from mp3d.client import find_lesions, main, wait_until_ready, zipped
from mp3d.config import ServeConfig
from mp3d.errors import ConfigError, DataError, ResourceError
from mp3d.predict import Predictor
from mp3d.serving.api import create_api
from mp3d.serving.engine import Engine
from mp3d.serving.schema import Answer, ModelOut, Rejected
from tests.serving_world import BrightBoxes, tiny_config, write_series, zip_of

MODEL = ModelOut(name="bright", digest="d" * 64, config_hash="c" * 64, epoch=3, score=0.5, num_classes=1)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The real application with a detector of bright voxels, on a free port."""
    config = ServeConfig(checkpoint="none", max_upload_mb=1)
    engine = Engine(Predictor(BrightBoxes(), tiny_config().clip, 0.5, torch.device("cpu")), MODEL, config)

    async def detect(body: bytes, threshold: float | None) -> Answer:
        return engine.answer(body, threshold)

    api = create_api(detect, MODEL, config, ready=lambda: True)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_series(tmp_path / "CT")
    return tmp_path / "CT"


Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def fake_server(reply: Callable[[int], Reply]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers its n-th request with ``reply(n)``; yields its URL and the paths that were asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = reply(len(paths))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_folder_and_zip_get_the_same_findings(endpoint: str, series: Path, tmp_path: Path):
    (tmp_path / "series.zip").write_bytes(zip_of(series))
    wait_until_ready(endpoint, 5)
    of_folder, of_zip = find_lesions(endpoint, series), find_lesions(endpoint + "/", tmp_path / "series.zip")
    assert of_folder.findings == of_zip.findings
    assert len(of_folder.findings) == 1
    assert find_lesions(endpoint, series, threshold=0.9).findings == ()


def test_refusal_keeps_its_reason(endpoint: str, series: Path):
    sorted(series.iterdir())[2].unlink()
    with pytest.raises(Rejected) as refused:
        find_lesions(endpoint, series)
    assert refused.value.reason == "MISSING_SLICE"
    with pytest.raises(Rejected, match="BAD_PARAMETER"):
        find_lesions(endpoint, series, threshold=7)


def test_too_large_zip_is_explained(endpoint: str, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        archive.writestr("large", bytes(20 * 2**20))
    # the endpoint answers and closes before it has read everything: the answer, or the closed connection, arrives first
    with pytest.raises((Rejected, ResourceError), match=r"BODY_TOO_LARGE|larger than the endpoint accepts"):
        find_lesions(endpoint, tmp_path / "large.zip")


def test_command_line_prints_a_table(endpoint: str, series: Path, capsys: pytest.CaptureFixture[str]):
    assert main([endpoint, str(series)]) == 0
    printed = capsys.readouterr().out
    assert "bright, epoch 3, dddddddddddd" in printed
    assert "6 slices, spacing 2.5 x 0.9 x 0.8 mm" in printed
    row = next(line for line in printed.splitlines() if line.startswith(" 0.80"))
    assert row.split()[1:6] == ["3", "9.0", "5.0", "10.0", "6.0"]
    assert "Research use only" in printed


def test_command_line_prints_json(endpoint: str, series: Path, capsys: pytest.CaptureFixture[str]):
    assert main([endpoint, str(series), "--json", "--threshold", "0.1"]) == 0
    assert Answer.model_validate(json.loads(capsys.readouterr().out)).threshold == 0.1


def test_command_line_fails_with_one_line(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "note.txt").write_text("no image")
    for argv, code in (([endpoint, str(tmp_path)], 3), ([endpoint, "nowhere"], 3), (["ftp://x", str(tmp_path)], 2)):
        assert main(argv) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1


def test_nothing_listens(series: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ResourceError, match="serve run serve.app:build"):
        find_lesions(url, series)
    with pytest.raises(ResourceError, match="not ready"):
        wait_until_ready(url, 0.6)


def test_no_answer_in_time(series: Path):
    with (
        fake_server(lambda _: (time.sleep(1.5), (200, {}, b""))[1]) as (url, _),
        pytest.raises(ResourceError, match="in time"),
    ):
        find_lesions(url, series, timeout_s=1)


def test_busy_endpoint_is_asked_again(endpoint: str, series: Path):
    good = find_lesions(endpoint, series).model_dump_json().encode()
    busy = b'{"reason": "BUSY", "detail": "come again"}'

    def reply(count: int) -> Reply:
        return (200, {}, good) if count == 3 else (503, {"Retry-After": "0"}, busy)

    with fake_server(reply) as (url, paths):
        assert len(find_lesions(url, series, threshold=0.25).findings) == 1
    assert paths == ["/findings?threshold=0.25"] * 3


def test_busy_for_too_long(series: Path):
    with (
        fake_server(lambda _: (503, {"Retry-After": "30"}, b"")) as (url, paths),
        pytest.raises(ResourceError, match="503"),
    ):
        find_lesions(url, series, timeout_s=2)
    assert len(paths) == 1


@pytest.mark.parametrize("reply", [(404, {}, b"not here"), (500, {}, b"oops"), (200, {}, b"<html>")])
def test_something_else_answers(series: Path, reply: Reply):
    with fake_server(lambda _: reply) as (url, _), pytest.raises(ResourceError, match="mp3d endpoint"):
        find_lesions(url, series)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "file:///etc/passwd", "http://"])
def test_no_url(url: str, series: Path):
    with pytest.raises(ConfigError, match="http://127"):
        find_lesions(url, series)


def test_zip_has_no_names(tmp_path: Path):
    folder = tmp_path / "DOE^JANE"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.dcm", "a.dcm", "sub/c.dcm", ".hidden"):
        (folder / name).write_text(name)
    with zipped(folder) as body:
        archive = zipfile.ZipFile(body)
        assert [archive.read(name).decode() for name in archive.namelist()] == ["a.dcm", "b.dcm", "sub/c.dcm"]
        body.seek(0)
        assert b"DOE" not in body.read()


def test_neither_folder_nor_zip(tmp_path: Path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "file", tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(DataError), zipped(path):
            pass


def test_proxies_of_the_environment_are_not_used(endpoint: str, series: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert len(find_lesions(endpoint, series).findings) == 1
