"""Asks the endpoint: ``python -m mp3d.client http://127.0.0.1:8000 FOLDER`` prints the findings of a CT series.

Needs nothing but the standard library and pydantic. Proxies of the environment are not used: a patient's images go to
the address that was given, or nowhere.
"""

import argparse
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from pydantic import ValidationError

from mp3d.errors import ConfigError, DataError, Mp3dError, ResourceError
from mp3d.serving.schema import Answer, ErrorOut, Rejected

IN_MEMORY_BYTES = 64 * 2**20
"""A larger zip is made in a temporary file."""
BUSY = (429, 503)
DEFAULT_RETRY_AFTER_S = 5.0


class Busy(ResourceError):
    """The endpoint says: come again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def find_lesions(url: str, series: str | Path, threshold: float | None = None, timeout_s: float = 1800) -> Answer:
    """Send a CT series and wait for the findings; a busy endpoint is asked again.

    Args:
        url: of the endpoint, without ``/findings``.
        series: folder with the DICOM files of one series, or a zip of it.
        threshold: least score of a finding; None takes the endpoint's.
        timeout_s: for all of it.

    Raises:
        ConfigError: no URL.
        DataError: no such folder or zip, or no file in it.
        Rejected: the endpoint refuses the series, with a reason code.
        ResourceError: no endpoint there, or no answer in time.
    """
    query = "" if threshold is None else "?" + urlencode({"threshold": threshold})
    target = f"{_base(url)}/findings{query}"
    deadline = time.monotonic() + timeout_s
    with zipped(Path(series)) as body:
        length = body.seek(0, 2)
        while True:
            body.seek(0)
            headers = {"Content-Type": "application/zip", "Content-Length": str(length)}
            try:
                text = _send(Request(target, body, headers), deadline)
                break
            except Busy as busy:
                if time.monotonic() + busy.retry_after_s > deadline:
                    raise
                time.sleep(busy.retry_after_s)
    try:
        return Answer.model_validate_json(text)
    except ValidationError as error:
        raise ResourceError(f"what answers at {url} is no mp3d endpoint of this version") from error


def wait_until_ready(url: str, timeout_s: float = 120) -> None:
    """Return as soon as the endpoint has loaded its model.

    Raises:
        ResourceError: it has not in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _send(Request(f"{_base(url)}/readyz"), deadline)
            return
        except (ResourceError, Rejected) as error:
            if time.monotonic() > deadline:
                raise ResourceError(f"{url} was not ready after {timeout_s:g} s: {error}") from error
            time.sleep(0.5)


@contextmanager
def zipped(series: Path) -> Iterator[IO[bytes]]:
    """A zip as it is, or a new one of all files in a folder and its subfolders, numbered instead of named.

    Raises:
        DataError: neither a zip nor a folder with files.
    """
    if series.is_file():
        if not zipfile.is_zipfile(series):
            raise DataError(f"{series} is no zip; give a zip of one CT series, or the folder that holds it")
        with series.open("rb") as file:
            yield file
        return
    files = [path for path in sorted(series.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    if not files:
        raise DataError(f"{series} is no folder with files; give the folder of one CT series, or a zip of it")
    with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for number, path in enumerate(files, 1):
                archive.write(path, f"{number:05d}")
        file.seek(0)
        yield file


def _send(request: Request, deadline: float) -> bytes:
    """Body of a good answer."""
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(request, timeout=max(deadline - time.monotonic(), 1)) as response:
            return response.read()
    except HTTPError as error:
        raise _refused(error) from error
    except (OSError, HTTPException) as error:
        raise _unreachable(request.full_url, error) from error


def _refused(error: HTTPError) -> Mp3dError:
    """What an answer that is no success says."""
    try:
        said = ErrorOut.model_validate_json(error.read())
    except (ValidationError, OSError, HTTPException):
        said = ErrorOut(reason=f"HTTP {error.code}", detail="the answer is not that of an mp3d endpoint; check the URL")
    if error.code in BUSY:
        after = error.headers.get("Retry-After", "")
        return Busy(f"{said.reason}: {said.detail}", float(after) if after.isdecimal() else DEFAULT_RETRY_AFTER_S)
    if error.code in (404, 405) or said.reason.startswith("HTTP"):
        return ResourceError(f"{error.url}: {said.reason}: {said.detail}")
    return Rejected(said.reason, said.detail)


def _unreachable(url: str, error: Exception) -> ResourceError:
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, ConnectionRefusedError):
        hint = "nothing listens there; start it with: serve run serve.app:build checkpoint=<checkpoint or run>"
    elif isinstance(cause, TimeoutError):
        hint = "no answer in time; a CPU needs minutes for a long series: give it more with --timeout"
    elif isinstance(cause, (BrokenPipeError, ConnectionResetError)):
        hint = "the connection was closed while the zip was sent; it may be larger than the endpoint accepts"
    else:
        hint = str(cause)
    return ResourceError(f"{url}: {hint}")


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{url!r} is no URL of an endpoint; give one like http://127.0.0.1:8000")
    return url.rstrip("/")


def table(answer: Answer) -> str:
    """The findings as aligned text, with what they refer to."""
    z, y, x = answer.spacing_mm
    lines = [
        f"model   {answer.model.name}, epoch {answer.model.epoch}, {answer.model.digest[:12]}",
        f"series  {answer.num_slices} slices, spacing {z:g} x {y:g} x {x:g} mm (z y x)",
        f"found   {len(answer.findings)} with a score of at least {answer.threshold:g} "
        f"({answer.read_s + answer.detect_s:.1f} s)",
    ]
    lines += [f"note    {warning}" for warning in answer.warnings]
    if answer.findings:
        lines += [
            "",
            f"{'score':>5} {'slice':>5}  {'box x1 y1 x2 y2 (px)':<27} {'centre x y z (LPS mm)':<27} {'mm':>6} label",
        ]
    for found in answer.findings:
        box = " ".join(f"{value:6.1f}" for value in found.box_px)
        centre = " ".join(f"{value:8.1f}" for value in found.centre_lps_mm)
        place = f"{found.slice_index:5d}  {box:<27} {centre:<27}"
        lines.append(f"{found.score:5.2f} {place} {found.diameter_mm:6.1f} {found.label:5d}")
    return "\n".join([*lines, "", answer.research_use_only])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mp3d.client", description="Find lesions in a CT series.")
    parser.add_argument("url", help="of the endpoint, such as http://127.0.0.1:8000")
    parser.add_argument("series", help="folder with the DICOM files of one CT series, or a zip of it")
    parser.add_argument("--threshold", type=float, help="least score of a finding, 0 to 1 (default: the endpoint's)")
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="seconds to wait (default: 1800)")
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    args = parser.parse_args(argv)
    try:
        answer = find_lesions(args.url, args.series, args.threshold, args.timeout)
    except Mp3dError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(answer.model_dump_json(indent=1) if args.json else table(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
