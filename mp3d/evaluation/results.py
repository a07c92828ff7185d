"""What is true and what was answered, record by record: slices of a detector, cases of the other heads. No pixels."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from mp3d.data.batches import SliceInfo
from mp3d.errors import DataError
from mp3d.sample import Prediction, Target


@dataclass(frozen=True, eq=False)
class KeySliceResult:
    """What is true of one slice and what the model said: every box with its score, before any threshold or protocol.

    Attributes:
        patient: hashed id, as in the shards; so is ``series``.
        z_index: slice number in the source series.
        spacing_mm: z, y, x.
        true_boxes: xyxy in pixels of the slice, half-open; so are ``boxes``.
        true_types: kind of each lesion in the data set's words; "" where it is not known.
        true_instances: which lesion of the series each true box is a slice of, from 1; 0 where that is not known.
        true_diameters_mm: the long diameter that the data set gives for each lesion; NaN where that is not known.
    """

    patient: str
    series: str
    z_index: int
    spacing_mm: tuple[float, float, float]
    true_boxes: Float32[np.ndarray, "t 4"]
    true_labels: Int64[np.ndarray, " t"]
    true_types: tuple[str, ...]
    true_instances: Int64[np.ndarray, " t"]
    true_diameters_mm: Float32[np.ndarray, " t"]
    boxes: Float32[np.ndarray, "b 4"]
    scores: Float32[np.ndarray, " b"]
    labels: Int64[np.ndarray, " b"]

    @classmethod
    def of(cls, prediction: Prediction, target: Target, info: SliceInfo) -> Self:
        """From what :func:`~mp3d.evaluation.key_slices.predict_clips` yields.

        Raises:
            DataError: the slice is a picture, which has no spacing.
        """
        if info.spacing_mm is None:
            raise DataError(f"{info.series} is a picture; lesions are judged on CT slices")
        number = len(target["boxes"])
        return cls(
            patient=info.patient,
            series=info.series,
            z_index=info.z_index,
            spacing_mm=info.spacing_mm,
            true_boxes=target["boxes"].float().numpy(),
            true_labels=target["labels"].long().numpy(),
            true_types=tuple(kind or "" for kind in info.lesion_types or ("",) * number),
            true_instances=np.array(info.instances or (0,) * number, np.int64),
            true_diameters_mm=np.array(info.diameters_mm or (math.nan,) * number, np.float32),
            boxes=prediction["boxes"].float().numpy(),
            scores=prediction["scores"].float().numpy(),
            labels=prediction["labels"].long().numpy(),
        )

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """What :meth:`as_row` made."""
        return cls(
            patient=row["patient"],
            series=row["series"],
            z_index=row["z_index"],
            spacing_mm=tuple(row["spacing_mm"]),
            true_boxes=np.array([*row["true_boxes"]], dtype=np.float32).reshape(-1, 4),
            true_labels=np.array(row["true_labels"], dtype=np.int64),
            true_types=tuple(row["true_types"]),
            true_instances=np.array(row["true_instances"], dtype=np.int64),
            true_diameters_mm=np.array(row["true_diameters_mm"], dtype=np.float32),
            boxes=np.array([*row["boxes"]], dtype=np.float32).reshape(-1, 4),
            scores=np.array(row["scores"], dtype=np.float32),
            labels=np.array(row["labels"], dtype=np.int64),
        )


@dataclass(frozen=True)
class ClassifiedCase:
    """``label`` is what is true, ``logits`` are the model's, one a class; ids as hashed in the shards."""

    patient: str
    series: str
    label: int
    logits: tuple[float, ...]

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"logits": list(self.logits)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """What :meth:`as_row` made."""
        return cls(row["patient"], row["series"], row["label"], tuple(row["logits"]))


@dataclass(frozen=True)
class SegmentedCase:
    """How the mask of a case agrees with the true one.

    Attributes:
        patient: hashed id, as in the shards; so is ``series``.
        counts: of each class of the foreground, voxels in both masks, in the predicted one, in the true one.
        hausdorff_95_mm: of each class; NaN where one of the masks is empty, for pictures, and where the truth of a
            slice is not known.
        shown_slice: from 0, the slice with the most voxels where the answer is wrong; with the most marked, where none
            is wrong.
        shown_mask: the answer there, ``(h, w)`` uint8, deflated; its shape is that of the slice.
    """

    patient: str
    series: str
    counts: tuple[tuple[int, int, int], ...]
    hausdorff_95_mm: tuple[float, ...]
    shown_slice: int = 0
    shown_mask: bytes = b""

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"counts": [list(of) for of in self.counts], "hausdorff_95_mm": list(self.hausdorff_95_mm)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """What :meth:`as_row` made."""
        counts = tuple((int(both), int(ours), int(theirs)) for both, ours, theirs in row["counts"])
        distances = tuple(float("nan") if value is None else float(value) for value in row["hausdorff_95_mm"])
        return cls(row["patient"], row["series"], counts, distances, row["shown_slice"], row["shown_mask"])


Case = ClassifiedCase | SegmentedCase
Record = KeySliceResult | ClassifiedCase | SegmentedCase


def pack_mask(mask: UInt8[np.ndarray, "h w"]) -> bytes:
    return zlib.compress(mask.tobytes(), 6)


def unpack_mask(packed: bytes, shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w"] | None:
    """What :func:`pack_mask` made; None where it is not of this shape."""
    try:
        raw = zlib.decompressobj().decompress(packed, shape[0] * shape[1] + 1)
    except zlib.error:
        return None
    return np.frombuffer(raw, np.uint8).reshape(shape) if len(raw) == shape[0] * shape[1] else None


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
