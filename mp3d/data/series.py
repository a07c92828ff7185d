"""One series as a reader hands it over: pixels in HU, where they lie in the patient, and what was annotated."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int16, Int64, UInt8

AIR_HU = -1024
"""The lowest value of the Hounsfield scale on 12 bits, which scanners write for air outside the patient."""


@dataclass(frozen=True)
class Volume:
    """A regular stack of parallel CT slices.

    Attributes:
        hu: ``(d, h, w)`` int16 Hounsfield units; slices in ascending order along the slice normal.
        affine: 4 x 4 float64; maps the index ``(column, row, slice, 1)`` of a voxel's centre to patient millimetres
        (LPS).
    """

    hu: Int16[np.ndarray, "d h w"]
    affine: Float[np.ndarray, "4 4"]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along (z, y, x): slices, rows, columns."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


@dataclass(frozen=True)
class Truth:
    """What is known of one slice. ``None`` means nobody looked; an empty array means looked, none found."""

    boxes: Float[np.ndarray, "b 4"] | None = None
    """float32, xyxy, pixels, half-open: the box of the single pixel (x, y) is ``[x, y, x + 1, y + 1]``."""
    labels: np.ndarray | None = None
    """``(b,)`` int, from 1; one for each box."""
    mask: UInt8[np.ndarray, "h w"] | None = None
    """Label of every pixel, 0 where nothing is."""
    instances: np.ndarray | None = None
    """``(b,)`` int, from 1; which object of the series each box is a slice of. None: that is not known."""
    types: tuple[str | None, ...] | None = None
    """Kind of lesion of each box, in the data set's words (DeepLesion: bone, lung ...); None: that is not known."""
    diameters_mm: np.ndarray | None = None
    """``(b,)`` float, the measured long diameter (RECIST) of the lesion of each box; NaN, or None for all: that is not
    known."""


def boxes_3d(
    truths: Sequence[Truth],
) -> tuple[Float[np.ndarray, "n 6"], Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """The 3D boxes that the boxes of all slices are slices of.

    Returns:
        ``x1 y1 z1 x2 y2 z2`` (float32, voxels, half-open, z counted from the first truth), labels (0 where there are
        none) and instances, by rising instance. Boxes of no known instance are left out.
    """
    boxes: dict[int, np.ndarray] = {}
    labels: dict[int, int] = {}
    for z, truth in enumerate(truths):
        if truth.boxes is None or truth.instances is None:
            continue
        own_labels = np.zeros(len(truth.boxes), np.int64) if truth.labels is None else truth.labels
        for (x1, y1, x2, y2), label, instance in zip(truth.boxes, own_labels, truth.instances.tolist(), strict=True):
            box = np.array([x1, y1, z, x2, y2, z + 1], np.float32)
            known = boxes.setdefault(instance, box)
            boxes[instance] = np.r_[np.minimum(known[:3], box[:3]), np.maximum(known[3:], box[3:])]
            labels[instance] = int(label)
    instances = sorted(boxes)
    return (
        np.array([boxes[instance] for instance in instances], np.float32).reshape(-1, 6),
        np.array([labels[instance] for instance in instances], np.int64),
        np.array(instances, np.int64),
    )


@dataclass(frozen=True)
class CTSeries:
    """A CT series with its identity (as the source says it; hashed on writing) and one :class:`Truth` per slice."""

    patient: str
    study: str
    series: str
    volume: Volume
    truths: tuple[Truth, ...]
    first_index: int = 0
    """Number of the first slice in the source, for data sets that number their slices (DeepLesion)."""
    warnings: tuple[str, ...] = field(default=())
    """Reason codes of what was tolerated, e.g. ``LOCALIZER_DROPPED``."""
    image_label: int | None = None
    """Class of the whole, from 0, for data sets whose items are classified (nodules of LIDC-IDRI)."""

    def __post_init__(self) -> None:
        if len(self.truths) != len(self.volume.hu):
            raise ValueError(f"{len(self.truths)} truths for {len(self.volume.hu)} slices; there must be one per slice")


@dataclass(frozen=True)
class Picture:
    """A colour picture, kept as its JPEG bytes."""

    name: str
    """Stands for patient, study and series; hashed on writing."""
    jpeg: bytes
    rows: int
    columns: int
    image_label: int | None = None
    truth: Truth = Truth()
