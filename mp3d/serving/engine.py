"""The bytes of a request to an answer, in one process; knows neither HTTP nor Ray."""

import json
import logging
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from time import perf_counter

from mp3d.checkpoint import Checkpoint
from mp3d.config import ServeConfig
from mp3d.data.decode import Pool
from mp3d.data.dicom import Listing, SeriesFiles, StoredSlice, group_series, load_volume
from mp3d.data.series import Volume
from mp3d.errors import Refusal
from mp3d.operating_points import FALLBACK_THRESHOLD
from mp3d.predict import Finding, Predictor, detection_head
from mp3d.serving.archive import unpack
from mp3d.serving.schema import Answer, ErrorOut, FindingOut, ModelOut, ProtocolOut, Rejected

MB = 2**20
logger = logging.getLogger(__name__)


class Engine:
    """Unpack, read, detect.

    Args:
        predictor: finds the lesions.
        model: what the answers say of the model.
        config: limits and the default threshold.
    """

    def __init__(self, predictor: Predictor, model: ModelOut, config: ServeConfig) -> None:
        self.predictor = predictor
        self.model = model
        self.config = config
        self.threshold = FALLBACK_THRESHOLD if config.score_threshold is None else config.score_threshold
        self.pool = Pool(num_workers=math.ceil(config.cpus_per_replica))

    def answer(
        self, body: bytes, threshold: float | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Answer:
        """
        Args:
            body: a zip that holds one CT series.
            threshold: least score of a finding; None takes the config's.
            progress: as in :meth:`Predictor.find_lesions`.

        Raises:
            Rejected: whatever is wrong with the request.
        """
        threshold = self.threshold if threshold is None else threshold
        started = perf_counter()
        series = read_series(body, self.config, self.pool)
        read = perf_counter()
        findings = self.predictor.find_lesions(series.volume, threshold, progress=progress)
        detected = perf_counter()

        sent = findings[: self.config.max_findings]
        return Answer(
            findings=tuple(finding_out(finding, series.stored[finding.slice_index]) for finding in sent),
            series_instance_uid=series.series_instance_uid,
            num_slices=len(series.volume.hu),
            spacing_mm=series.volume.spacing_mm,
            threshold=threshold,
            protocol=ProtocolOut(
                mode=self.predictor.mode,
                num_slices=self.predictor.clip.num_slices,
                slice_spacing_mm=self.predictor.clip.slice_spacing_mm,
                phases=self.predictor.phases,
                nms_iou=self.predictor.nms_iou,
            ),
            model=self.model,
            warnings=series.warnings + (("FINDINGS_CUT",) if len(sent) < len(findings) else ()),
            read_s=round(read - started, 3),
            detect_s=round(detected - read, 3),
        )


def answer_or_error(
    engine: Engine, body: bytes, threshold: float | None, progress: Callable[[int, int], None] | None = None
) -> Answer | ErrorOut:
    """:meth:`Engine.answer` as a value, whatever happens.

    What is no :class:`Rejected` is a defect. It is logged by place and type only, because its message may quote the
    patient's data, and this is the only place that sees it.
    """
    try:
        return engine.answer(body, threshold, progress)
    except Rejected as error:
        return ErrorOut(reason=error.reason, detail=error.detail)
    except Exception as error:  # the boundary of the endpoint: see above
        place = traceback.extract_tb(error.__traceback__)[-1]
        logger.error("defect: %s at %s:%s in %s", type(error).__name__, place.filename, place.lineno, place.name)
        return ErrorOut(reason="INTERNAL", detail=f"a defect of the endpoint ({type(error).__name__}); see its log")


@dataclass(frozen=True, eq=False)
class ReadSeries:
    """A decoded series: ``stored`` says where each slice comes from, ``warnings`` are the codes of an answer."""

    series_instance_uid: str
    volume: Volume
    stored: tuple[StoredSlice, ...]
    warnings: tuple[str, ...]


def read_series(body: bytes, config: ServeConfig, pool: Pool | None = None) -> ReadSeries:
    """The one CT series of a zip, parsed and decoded by ``pool``; the unpacked files are gone when this returns.

    Raises:
        Rejected: the zip, or what is in it, is not that.
    """
    files = unpack(body, max_files=config.max_slices, max_bytes=config.max_unpacked_mb * MB)
    with silent_pydicom():
        listing = group_series(files, config.geometry, pool)
        series = the_series(listing, len(files))
        try:
            volume, stored, codes = load_volume(series, config.geometry, pool, config.max_unpacked_mb * MB)
        except Refusal as refusal:
            raise Rejected(refusal.reason, refusal.detail) from refusal
    if listing.refused or listing.objects:
        codes += ("FILES_IGNORED",)
    return ReadSeries(series.series_instance_uid, volume, stored, codes)


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """pydicom's warnings quote values of the header, a patient's name among them; they must not reach a log."""
    pydicom = logging.getLogger("pydicom")
    before = pydicom.disabled
    pydicom.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        pydicom.disabled = before


def the_series(listing: Listing, num_files: int) -> SeriesFiles:
    """The one CT series of a listing.

    Raises:
        Rejected: ``NO_CT_SERIES``, with what was refused instead, or ``SEVERAL_SERIES``.
    """
    if len(listing.series) > 1:
        raise Rejected(
            "SEVERAL_SERIES",
            f"the zip holds {len(listing.series)} CT series (or acquisitions, phases or reconstructions of one); "
            "send one at a time",
        )
    if not listing.series:
        counts = Counter(refusal.reason for _, refusal in listing.refused)
        refused = ", ".join(f"{reason} {count} x" for reason, count in counts.most_common())
        first = f"; first: {listing.refused[0][1].detail}" if listing.refused else ""
        raise Rejected(
            "NO_CT_SERIES", f"none of the {num_files} files is of a CT series (refused: {refused or 'none'}{first})"
        )
    return listing.series[0]


def finding_out(finding: Finding, stored: StoredSlice) -> FindingOut:
    """The finding with its box on the image as it was sent, whose rows a tilt correction may have moved."""
    x1, y1, x2, y2 = finding.box_px
    return FindingOut(
        **asdict(finding)
        | {
            "box_px": (x1, y1 - stored.row_offset, x2, y2 - stored.row_offset),
            "sop_instance_uid": stored.sop_instance_uid,
            "frame_number": stored.frame or None,
        }
    )


def model_out(checkpoint: Checkpoint) -> ModelOut:
    """What answers say of a checkpoint.

    Raises:
        CheckpointError: its model is no detector.
    """
    config = json.dumps(checkpoint.config.model_dump(mode="json"), sort_keys=True)
    return ModelOut(
        name=checkpoint.config.name,
        digest=checkpoint.digest,
        config_hash=sha256(config.encode()).hexdigest(),
        epoch=checkpoint.epoch,
        score=checkpoint.score,
        num_classes=detection_head(checkpoint).num_classes,
    )
