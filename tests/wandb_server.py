"""A W&B server of the tests: as much of its protocol as the client needs, and every way to fail it.

server.mode   up | refuse (nothing listens) | silent (accepts, never answers) | error (500) | garbage (200, not JSON)
"""

import json
import socket
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class WandbServer:
    """What it received stands in ``history`` (rows by run), ``upserts``, ``files`` and, in full, ``bodies``."""

    def __init__(self) -> None:
        self.mode = "up"
        self.upserts: list[dict[str, Any]] = []
        self.history: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.events: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.files: dict[str, bytes] = {}
        self.operations: list[tuple[str, dict[str, Any]]] = []
        self.bodies: list[bytes] = []
        self.released = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                split = urlsplit(self.path)
                if split.path.startswith("/mode/"):  # for whoever is in another process
                    owner.turn(split.path.removeprefix("/mode/"))
                    return self.reply(200, b"{}")
                if owner.mode == "silent":
                    owner.released.wait(120)
                    return None
                if owner.mode == "refuse":
                    return self.close_connection_at_once()
                if owner.mode in ("error", "garbage"):
                    return self.reply(500, b"no") if owner.mode == "error" else self.reply(200, b"<html>")
                owner.bodies.append(body)
                return self.reply(200, json.dumps(owner.handle(split.path, body)).encode())

            def close_connection_at_once(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def reply(self, code: int, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def turn(self, mode: str) -> None:
        self.mode = mode
        if mode == "up":
            self.released.set()
            self.released = threading.Event()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def handle(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            run = path.split("/")[-2]
            for name, part in json.loads(body).get("files", {}).items():
                rows = {"wandb-history.jsonl": self.history, "wandb-events.jsonl": self.events}.get(name)
                if rows is not None:
                    rows[run] += [json.loads(line) for line in part["content"]]
            return {}
        if path.startswith("/upload/"):
            self.files[path.removeprefix("/upload/")] = body
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        name, variables = request.get("operationName") or "", request.get("variables") or {}
        self.operations.append((name, variables))
        return {"data": self.data(name, variables)}

    def data(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        known = {upsert["name"] for upsert in self.upserts}
        match name:
            case "RunResumeStatus":
                if variables["name"] not in known:
                    return {"model": None}
                rows = self.history[variables["name"]]
                bucket = {
                    "id": "b", "name": variables["name"], "summaryMetrics": "{}", "displayName": "n", "logLineCount": 0,
                    "historyLineCount": len(rows), "eventsLineCount": 0, "eventsTail": "[]", "config": "{}", "tags": [],
                    "historyTail": json.dumps([json.dumps(rows[-1])] if rows else []), "notes": None,
                    "wandbConfig": '{"t": 1}',
                }  # fmt: skip
                return {"model": {"id": "m", "name": "mp3d", "entity": {"id": "e", "name": "team"}, "bucket": bucket}}
            case "UpsertBucket":
                self.upserts.append(variables)
                project = {"id": "p", "name": "mp3d", "entity": {"id": "e", "name": "team"}}
                bucket = {
                    "id": "b", "name": variables["name"], "displayName": variables.get("displayName") or "n",
                    "description": "", "config": "{}", "sweepName": "", "project": project, "historyLineCount": 0,
                }  # fmt: skip
                return {"upsertBucket": {"bucket": bucket, "inserted": variables["name"] not in known}}
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case "Viewer":
                return {"viewer": {"id": "u", "username": "u", "entity": "team", "flags": "{}", "teams": {"edges": []}}}
            case "":  # whether there is an artifact of that name
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                sequence = {"id": "s", "latestArtifact": None}
                artifact = {"id": "a", "digest": "d", "state": "PENDING", "aliases": [], "artifactSequence": sequence}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest":
                upload = {"uploadUrl": f"{self.url}/upload/manifest.json", "uploadHeaders": []}
                file = {"id": "f", "name": "manifest.json", "displayName": "manifest.json", **upload}
                return {"createArtifactManifest": {"artifactManifest": {"id": "x", "file": file}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}
            case _:
                return {}
