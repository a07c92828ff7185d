"""Voxels as a file stores them, and the checks that every format shares.

No format's own library reads the voxels: nibabel's ``load`` mends a wrong header in silence and stops before gzip's
checksum; SimpleITK takes files that were cut off and axes that are not finite. Here the header is checked before any
voxel is read, nothing larger than the file can hold is allocated, and the file is read to its end.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from mp3d.errors import Refusal

MAX_BYTES = 4 * 2**30
"""Of the voxels as they are stored, unpacked: 1,000 slices of 1024 x 1024 floats."""
DEFLATE_RATIO = 1032
"""No deflated byte becomes more bytes than these."""
ORTHOGONAL_TOLERANCE = 1e-3
"""Cosine of the angle between two axes up to which it is rounding and no shear."""

Shape = tuple[int, int, int]


class StoredVolume(NamedTuple):
    """Voxels on the axes of their file.

    Attributes:
        stored: first the axis whose index runs fastest in the file.
        affine: index ``(i, j, k, 1)`` of a voxel's centre to LPS millimetres; None where the file does not say.
        slope, intercept: a value is ``stored * slope + intercept``.
    """

    stored: Shaped[np.ndarray, "i j k"]
    affine: Float[np.ndarray, "4 4"] | None
    slope: float = 1.0
    intercept: float = 0.0


class AxialVolume(NamedTuple):
    """The same voxels (a view), axes permuted and flipped so that columns run most nearly to +x, rows to +y and slices
    to +z of LPS."""

    stored: Shaped[np.ndarray, "d h w"]
    affine: Float[np.ndarray, "4 4"]
    """Index (column, row, slice, 1) of a voxel's centre to LPS millimetres."""
    slope: float
    intercept: float

    def plane(self, z: int) -> Float[np.ndarray, "h w"]:
        """The values of one slice; not finite where they overflow."""
        with np.errstate(all="ignore"):
            return self.stored[z] * self.slope + self.intercept


def to_axial(volume: StoredVolume, what: str) -> AxialVolume:
    """Turn a volume into the order of an axial series; nothing is resampled, an oblique rest stays in the affine.

    Args:
        what: how messages call it, e.g. "the mask".

    Raises:
        Refusal: ``UNKNOWN_ORIENTATION``.
    """
    if volume.affine is None:
        detail = f"{what} does not say how it lies in the patient (spacing, directions, origin)"
        raise Refusal("UNKNOWN_ORIENTATION", f"{detail}; write it with its orientation")
    axes = io_orientation(volume.affine)
    stored = apply_orientation(volume.stored, axes).T
    return AxialVolume(stored, volume.affine @ inv_ornt_aff(axes, volume.stored.shape), volume.slope, volume.intercept)


def volume_shape(lengths: Sequence[int], what: str) -> Shape:
    """The three lengths of a volume; further axes may have length 1.

    Raises:
        Refusal: ``NOT_3D``.
    """
    if not 3 <= len(lengths) <= 7 or min(lengths) < 1 or any(length != 1 for length in lengths[3:]):
        shown = " x ".join(map(str, lengths))
        raise Refusal("NOT_3D", f"{what} has {shown or 'no'} voxels; write one volume per file")
    return lengths[0], lengths[1], lengths[2]


def check_affine(affine: Float[np.ndarray, "4 4"], what: str) -> None:
    """Refuse axes that are not finite, have no length or are not orthogonal.

    Raises:
        Refusal: ``BAD_IMAGE``.
    """
    with np.errstate(all="ignore"):
        cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        shear = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if not (np.isfinite(affine).all() and shear <= ORTHOGONAL_TOLERANCE):  # NaN where an axis has no length
        detail = f"the axes of {what} are not finite or not orthogonal"
        raise Refusal("BAD_IMAGE", f"{detail}; resample it on orthogonal axes")


def check_size(shape: Shape, dtype: np.dtype, held_bytes: int, what: str) -> int:
    """The bytes of the voxels, checked before they are allocated.

    Args:
        held_bytes: the most that the file can hold, unpacked.

    Raises:
        Refusal: ``TOO_LARGE`` or ``BAD_IMAGE``.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > MAX_BYTES:
        shown = " x ".join(map(str, shape))
        raise Refusal("TOO_LARGE", f"{what} has {shown} voxels, more than {MAX_BYTES >> 30} GiB; crop or split it")
    if num_bytes > held_bytes:
        raise Refusal("BAD_IMAGE", f"{what} should have {num_bytes} bytes of voxels, but its file is too short for it")
    return num_bytes


def read_voxels(
    file: BinaryIO | gzip.GzipFile, shape: Shape, dtype: np.dtype, held_bytes: int, what: str, tail_bytes: int = 0
) -> Shaped[np.ndarray, "i j k"]:
    """Read the voxels, and to the end of the file, so that a packed one checks its sum.

    Args:
        held_bytes: as in :func:`check_size`.
        tail_bytes: so many may follow the voxels.

    Raises:
        Refusal: ``TOO_LARGE`` or ``BAD_IMAGE``.
    """
    num_bytes = check_size(shape, dtype, held_bytes, what)
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise Refusal("BAD_IMAGE", f"{what} has {len(data)} bytes of voxels instead of {num_bytes}; copy it again")
    if len(file.read(tail_bytes + 1)) > tail_bytes:
        raise Refusal("BAD_IMAGE", f"{what} goes on behind its voxels; write it again")
    return np.frombuffer(data, dtype).reshape(shape, order="F")


def inflate_voxels(packed: bytes, shape: Shape, dtype: np.dtype, what: str) -> Shaped[np.ndarray, "i j k"]:
    """Inflate the voxels of a zlib stream, to its checksum.

    Raises:
        Refusal: ``TOO_LARGE`` or ``BAD_IMAGE``.
    """
    num_bytes = check_size(shape, dtype, len(packed) * DEFLATE_RATIO, what)
    stream = zlib.decompressobj()
    data = stream.decompress(packed, num_bytes)
    more = stream.decompress(stream.unconsumed_tail, 1)
    if len(data) != num_bytes or more or not stream.eof:
        raise Refusal("BAD_IMAGE", f"{what} does not inflate to {num_bytes} bytes of voxels; copy it again")
    return np.frombuffer(data, dtype).reshape(shape, order="F")


def data_file_beside(path: Path, name: str, what: str) -> Path:
    """The file of the voxels that a header names; only a plain name in the header's own folder is followed.

    Raises:
        Refusal: ``BAD_IMAGE``.
    """
    if not name or set(name) & set("/\\%\0") or name in (".", "..") or name.upper().startswith("LIST"):
        detail = f"the header of {what} does not name one file in its own folder for the voxels"
        raise Refusal("BAD_IMAGE", f"{detail}; write header and voxels into one file")
    return path.with_name(name)
