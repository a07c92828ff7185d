"""What can go wrong through no fault of the program: each error says what, why and what to do.

Every job ends with the ``exit_code`` of the error that stopped it (README, "Exit codes"); anything that is not an
:class:`Mp3dError` is a defect of ours and ends with 1 and a traceback.
"""

import json
from collections.abc import Iterator


class Mp3dError(Exception):
    """A condition the user can mend. The message names the value, the rule and the likely fix."""

    exit_code = 1


class ConfigError(Mp3dError):
    """The command or its configuration is wrong; nothing was started."""

    exit_code = 2


class DataError(Mp3dError):
    """Files that cannot be used: no series, broken shards, another format version."""

    exit_code = 3


class CheckpointError(Mp3dError):
    """A checkpoint that is missing, torn, altered or of another format version."""

    exit_code = 3


class ResourceError(Mp3dError):
    """The cluster cannot give what the run asks for, for which Ray would wait for ever; or the disk is full."""

    exit_code = 4


class TrainingStopped(Mp3dError):
    """A process was lost; on Ray, more often than ``launch.max_failures`` allows."""


class Refusal(DataError):
    """One series (or picture) that is not used, with a reason code of the closed list in ``mp3d.data.reasons.REASONS``.

    Args:
        reason: the code, UPPER_CASE, stable across versions.
        detail: the offending value, the rule and what to do; holds no patient data and no file name.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


def as_json(error: Mp3dError) -> str:
    """An error as text that another process can raise; no pickle."""
    return json.dumps({"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}) + "\n"


def from_json(text: str) -> Mp3dError:
    """What :func:`as_json` was given; of a kind that this process does not know, with its exit code."""
    content = json.loads(text)
    kinds = {kind.__name__: kind for kind in _kinds(Mp3dError) if kind.__init__ is Exception.__init__}
    error = kinds.get(content["kind"], Mp3dError)(content["message"])
    error.exit_code = content["exit_code"]
    return error


def _kinds(kind: type[Mp3dError]) -> Iterator[type[Mp3dError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)
