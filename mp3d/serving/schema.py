"""What the endpoint says: an :class:`Answer`, or an :class:`ErrorOut` with a reason code."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mp3d.errors import Mp3dError

RESEARCH_USE_ONLY = "Research use only. Not a medical device; not for diagnosis or treatment."

STATUS: dict[str, int] = {
    "EMPTY_BODY": 400,
    "INCOMPLETE_BODY": 400,
    "NOT_A_ZIP": 400,
    "ZIP_DAMAGED": 400,
    "NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "UPLOAD_TIMEOUT": 408,
    "BODY_TOO_LARGE": 413,
    "UNPACKED_TOO_LARGE": 413,
    "TOO_MANY_FILES": 413,
    "MULTIPART": 415,
    "BAD_PARAMETER": 422,
    "ZIP_EMPTY": 422,
    "ZIP_ENCRYPTED": 422,
    "ZIP_COMPRESSION": 422,
    "ZIP_DUPLICATE_NAME": 422,
    "NO_CT_SERIES": 422,
    "SEVERAL_SERIES": 422,
    "INTERNAL": 500,
    "BUSY": 503,
}
"""The endpoint's own reason codes and their HTTP status; a reason of ``mp3d.data.reasons`` has 422."""

Point = tuple[float, float, float]


class Out(BaseModel):
    """Field docstrings become the descriptions in ``/openapi.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FindingOut(Out):
    """One box on one slice of the series."""

    box_px: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the image, half-open: the box of the single pixel (x, y) is x, y, x + 1, y + 1."""
    slice_index: int
    """From 0, in ascending order along the slice normal; counts interpolated slices (warning UNEVEN_RESAMPLED)."""
    sop_instance_uid: str
    """Of the image of that slice; of an interpolated slice, of the nearest one."""
    frame_number: int | None = None
    """Of a multi-frame image, from 1; null: the image has one frame."""
    box_lps_mm: tuple[Point, Point, Point, Point]
    """The corners (x1, y1), (x2, y1), (x2, y2), (x1, y2) in patient coordinates (LPS), in the plane of the slice."""
    centre_lps_mm: Point
    diameter_mm: float
    """The longer side of the box."""
    score: Annotated[float, Field(ge=0, le=1)]
    label: Annotated[int, Field(ge=1)]
    """Lesion class of the checkpoint, from 1; a universal detector has one."""


class ModelOut(Out):
    """Which model answers."""

    name: str
    """Of the training run."""
    digest: str
    """SHA-256 over the checkpoint's files."""
    config_hash: str
    """SHA-256 of the training configuration."""
    epoch: int
    score: float
    """Of the checkpoint's last validation."""
    num_classes: int


class ProtocolOut(Out):
    """How the series was searched."""

    mode: Literal["window", "slab", "stream"]
    """What the network reads at a time: a clip around every position of the z grid, a clip for several of them, or the
    series as one clip. Predictions are reported on the nearest slice.
    """
    num_slices: int
    """That a position is judged by."""
    slice_spacing_mm: float | None
    """Of the z grid; null: the series' own."""
    phases: int = 1
    """Grids that the series was read on, shifted against one another."""
    nms_iou: float
    """Overlap above which only the best of several boxes on one slice is kept."""


class Answer(Out):
    """Findings of one series, best first."""

    findings: tuple[FindingOut, ...]
    series_instance_uid: str
    num_slices: int
    spacing_mm: Point
    """Between slices, rows and columns (z, y, x)."""
    threshold: float
    """Boxes with a lower score are not reported."""
    protocol: ProtocolOut
    model: ModelOut
    warnings: tuple[str, ...]
    """Codes of what was tolerated (``mp3d.data.reasons``); ``FILES_IGNORED``: some files are not of the series;
    ``FINDINGS_CUT``: there were more findings than are sent."""
    read_s: float
    """Seconds to unpack, check and decode the series."""
    detect_s: float
    """Seconds of the detector."""
    research_use_only: str = RESEARCH_USE_ONLY


class ErrorOut(Out):
    """Why there is no answer."""

    reason: str
    """A stable code, UPPER_CASE."""
    detail: str
    """What was wrong, the rule, and what to do; holds no patient data and no file name."""


class Rejected(Mp3dError):
    """A request that is not answered with findings.

    Args:
        reason: a code of :data:`STATUS` or of ``mp3d.data.reasons``.
        detail: as in :class:`ErrorOut`.
    """

    exit_code = 3

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)

    @property
    def status(self) -> int:
        return STATUS.get(self.reason, 422)
