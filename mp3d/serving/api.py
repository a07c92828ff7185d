"""The HTTP side: routes, limits on what is received, errors as ``{reason, detail}``. Plain FastAPI; knows no Ray."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mp3d.config import ServeConfig
from mp3d.serving.schema import RESEARCH_USE_ONLY, STATUS, Answer, ErrorOut, ModelOut, Rejected

MB = 2**20
RETRY_AFTER_S = 5
UPLOAD_TIMEOUT_S = 600.0
"""Within this time a body must have arrived."""
BODIES_IN_MEMORY = 2
"""The bodies held at one time have no more bytes than this many of the largest size."""
MAX_DIGITS = 18
"""Of a believable Content-Length."""
ZIP_BODY = {"required": True, "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut} for status in sorted(set(STATUS.values()) - {404, 405})
}

Detect = Callable[[bytes, float | None], Awaitable[Answer]]
"""The rest of the way, from body and threshold to the answer; raises :class:`Rejected`."""


def create_api(detect: Detect, model: ModelOut, config: ServeConfig, ready: Callable[[], bool]) -> FastAPI:
    """The application.

    Args:
        model: what ``GET /model`` says.
        ready: whether a request would be answered now.
    """
    api = FastAPI(title="mp3d", description=RESEARCH_USE_ONLY, docs_url=None, redoc_url=None)
    uploads = Uploads(config.max_upload_mb * MB)

    @api.post("/findings", responses=ERRORS, openapi_extra={"requestBody": ZIP_BODY})
    async def findings(
        request: Request, response: Response, threshold: Annotated[float | None, Query(ge=0, le=1)] = None
    ) -> Answer:
        """Find lesions in a zip of one CT series; ``threshold`` is the least score of a finding."""
        response.headers["Cache-Control"] = "no-store"
        async with uploads.body(request) as body:
            return await detect(body, threshold)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: {"model": ErrorOut}})
    async def readyz() -> dict[str, str]:
        """The model is loaded."""
        if not ready():
            raise Rejected("BUSY", "the model is not loaded yet; come again")
        return {"status": "ready"}

    @api.get("/model")
    async def describe() -> ModelOut:
        """Which model answers."""
        return model

    @api.exception_handler(Rejected)
    async def rejected(_: Request, error: Rejected) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else None
        return _error(error.status, error.reason, error.detail, headers)

    @api.exception_handler(RequestValidationError)
    async def bad_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
        return _error(STATUS["BAD_PARAMETER"], "BAD_PARAMETER", faults)

    @api.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        reason = HTTPStatus(error.status_code).name
        return _error(
            error.status_code, reason, "POST a zip to /findings, or GET /model, /healthz, /readyz", error.headers
        )

    @api.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        return _error(
            500, "INTERNAL", f"a defect of the endpoint ({type(error).__name__}); nothing was found or stored"
        )

    return api


class Uploads:
    """Receives bodies, each within a size and a time, all together within :data:`BODIES_IN_MEMORY`.

    Args:
        max_bytes: largest body.
        timeout_s: longest time in which it arrives.
    """

    def __init__(self, max_bytes: int, timeout_s: float = UPLOAD_TIMEOUT_S) -> None:
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.bytes_held = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the context ends.

        Raises:
            Rejected: a form, too large, too slow, cut off, or more at one time than there is memory for.
        """
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise Rejected("MULTIPART", "the body is a form; send the zip itself: curl --data-binary @series.zip")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > MAX_DIGITS or int(declared) > self.max_bytes):
            raise self._too_large()
        received = bytearray()
        try:
            await self._receive(request, received)
            yield bytes(received)
        finally:
            self.bytes_held -= len(received)

    async def _receive(self, request: Request, received: bytearray) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                async for chunk in request.stream():
                    self._take(received, chunk)
        except TimeoutError as error:
            raise Rejected("UPLOAD_TIMEOUT", f"the body did not arrive within {self.timeout_s:g} s") from error
        except ClientDisconnect as error:
            raise Rejected("INCOMPLETE_BODY", "the connection was closed before the whole body had arrived") from error

    def _take(self, received: bytearray, chunk: bytes) -> None:
        if len(received) + len(chunk) > self.max_bytes:
            raise self._too_large()
        if self.bytes_held + len(chunk) > BODIES_IN_MEMORY * self.max_bytes:
            raise Rejected("BUSY", "other series are being received; come again")
        received += chunk
        self.bytes_held += len(chunk)

    def _too_large(self) -> Rejected:
        return Rejected("BODY_TOO_LARGE", f"the body has more than the {self.max_bytes} bytes allowed; send one series")


def _error(status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(ErrorOut(reason=reason, detail=detail).model_dump(), status, headers)
