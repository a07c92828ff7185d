"""Operating points of a detector: the score from which on it reports, for a number of false positives per image.

They are chosen on the validation split, never on the split that is reported, and kept beside the checkpoint they were
chosen for (``operating_points.json``, written aside and renamed); the files that the manifest hashes stay as they are.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from mp3d.checkpoint import Checkpoint
from mp3d.data.shard.aside import json_text, write_aside
from mp3d.errors import ConfigError
from mp3d.metrics.froc import FrocResult

OPERATING_POINTS = "operating_points.json"
FALLBACK_THRESHOLD = 0.3
"""Of a checkpoint without operating points."""


@dataclass(frozen=True)
class OperatingPoints:
    """
    Attributes:
        checkpoint: digest of the checkpoint they hold for.
        thresholds: by false positives per image, the lowest score that keeps within them; None where none does.
        sensitivity: by the same, of the validation split.
        protocol: the FROC protocol; ``split`` and ``data`` (manifest digest) say of which images.
    """

    checkpoint: str
    thresholds: dict[float, float | None]
    sensitivity: dict[float, float]
    protocol: str
    split: str
    data: str
    num_images: int
    num_lesions: int

    @classmethod
    def of(cls, froc: FrocResult, checkpoint: str, split: str, data: str) -> Self:
        return cls(
            checkpoint=checkpoint,
            thresholds={fps: None if math.isnan(score) else score for fps, score in froc.threshold_at.items()},
            sensitivity=dict(froc.sensitivity_at),
            protocol=froc.protocol.name,
            split=split,
            data=data,
            num_images=froc.num_images,
            num_lesions=froc.num_lesions,
        )

    def as_plain(self) -> dict[str, Any]:
        """JSON values, for :meth:`from_plain`."""
        by_rate = {name: {f"{fps:g}": value for fps, value in getattr(self, name).items()} for name in _BY_RATE}
        return asdict(self) | by_rate

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Self:
        """Raises: KeyError, TypeError or ValueError, the content is not of :meth:`as_plain`."""
        plain: dict[str, Any] = dict(content)
        for name in _BY_RATE:
            plain[name] = dict(sorted((float(fps), value) for fps, value in plain[name].items()))
        return cls(**plain)

    def threshold_for(self, fps_per_image: float) -> float:
        """The score to report from.

        Raises:
            ConfigError: there is no point for so many false positives.
        """
        threshold = self.thresholds.get(fps_per_image)
        if threshold is None:
            known = ", ".join(f"{fps:g}" for fps, score in self.thresholds.items() if score is not None)
            raise ConfigError(
                f"the checkpoint has no operating point for {fps_per_image:g} false positives per image "
                f"(it has: {known or 'none'}); take one of these, or say score_threshold"
            )
        return threshold


_BY_RATE = ("thresholds", "sensitivity")


def read_operating_points(checkpoint: Checkpoint) -> OperatingPoints | None:
    """Those beside a checkpoint; None where there are none, or of another checkpoint."""
    try:
        points = OperatingPoints.from_plain(json.loads((checkpoint.path / OPERATING_POINTS).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return points if points.checkpoint == checkpoint.digest else None


def keep_operating_points(checkpoint: Checkpoint, points: OperatingPoints) -> None:
    """Write them beside the checkpoint."""
    write_aside(checkpoint.path / OPERATING_POINTS, json_text(points.as_plain()))


def reporting_threshold(checkpoint: Checkpoint, asked: float | None, fps_per_image: float) -> tuple[float, str]:
    """The score from which on findings are reported, and where it comes from in words.

    Args:
        asked: a threshold that goes before everything else.
        fps_per_image: which operating point of the checkpoint.

    Raises:
        ConfigError: the checkpoint has operating points, but not this one.
    """
    if asked is not None:
        return asked, "given"
    points = read_operating_points(checkpoint)
    if points is None:
        return FALLBACK_THRESHOLD, "default: the checkpoint has no operating points (jobs/evaluate.py chooses them)"
    rate = f"{fps_per_image:g} false positive{'s' if fps_per_image != 1 else ''} per annotated key slice"
    return points.threshold_for(fps_per_image), f"{rate} ({points.split}, {points.num_images} key slices)"
