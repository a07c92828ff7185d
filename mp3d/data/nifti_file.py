"""One NIfTI file (NIfTI-1 or -2, ``.nii`` or ``.nii.gz``) to an array and its affine, or a named refusal.

Common libraries read a cut off ``.nii.gz`` as zeros, take an affine that is not finite, or turn NaN into 0 without a
word. Here the header is checked before any voxel is read, and the file must be whole (gzip's checksum included).

Format: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h (orientation: "METHOD 2" and "METHOD 3" there).
"""

import gzip
import math
import zlib
from io import BufferedReader
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from mp3d.errors import Refusal

MAX_BYTES = 4 * 2**30
"""Of the voxels as they are stored, unpacked: 1,000 slices of 1024 x 1024 floats."""
MAX_TAIL_BYTES = 2**20
"""Some writers put a little behind the voxels."""
ORTHOGONAL_TOLERANCE = 1e-3
"""Cosine of the angle between two axes up to which it is rounding and no shear."""

_NIFTI1 = np.dtype(
    {
        "names": ["dim", "datatype", "pixdim", "offset", "slope", "intercept", "units", "qform", "sform", "quaternion",
                  "origin", "rows", "magic"],
        "formats": ["8i2", "i2", "8f4", "f4", "f4", "f4", "u1", "i2", "i2", "3f4", "3f4", "(3,4)f4", "S4"],
        "offsets": [40, 70, 76, 108, 112, 116, 123, 252, 254, 256, 268, 280, 344],
        "itemsize": 348,
    }
)  # fmt: skip
_NIFTI2 = np.dtype(
    {
        "names": ["magic", "datatype", "dim", "pixdim", "offset", "slope", "intercept", "qform", "sform", "quaternion",
                  "origin", "rows", "units"],
        "formats": ["S4", "i2", "8i8", "8f8", "i8", "f8", "f8", "i4", "i4", "3f8", "3f8", "(3,4)f8", "i4"],
        "offsets": [4, 12, 16, 104, 168, 176, 184, 344, 348, 352, 376, 400, 500],
        "itemsize": 540,
    }
)  # fmt: skip
_VOXELS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_MILLIMETRES = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""By the unit of space: unknown, metre, millimetre, micrometre."""


class NiftiImage(NamedTuple):
    """Voxels as they are stored (a view) with what makes values of them.

    Axes are permuted and flipped so that columns run most nearly to +x, rows to +y and slices to +z of LPS.
    """

    stored: Shaped[np.ndarray, "d h w"]
    slope: float
    intercept: float
    affine: Float[np.ndarray, "4 4"]
    """Index (column, row, slice, 1) of a voxel's centre to LPS millimetres."""

    def plane(self, z: int) -> Float[np.ndarray, "h w"]:
        """The values of one slice; not finite where they overflow."""
        with np.errstate(all="ignore"):
            return self.stored[z] * self.slope + self.intercept


def read_nifti_file(path: Path, what: str) -> NiftiImage:
    """Read a volume.

    Args:
        what: how messages call it, e.g. "the mask".

    Raises:
        Refusal: ``UNREADABLE``, ``BAD_IMAGE``, ``NOT_3D``, ``TOO_LARGE`` or ``UNKNOWN_ORIENTATION``.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if packed:
                with gzip.open(raw) as file:
                    return _read(file, what)
            return _read(raw, what)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refusal("BAD_IMAGE", f"{what} is damaged or cut off ({type(error).__name__}); copy it again") from error
    except OSError as error:
        raise Refusal("UNREADABLE", f"{what} cannot be read ({type(error).__name__})") from error


def _read(file: BufferedReader | gzip.GzipFile, what: str) -> NiftiImage:
    header = _read_header(file, what)
    shape = _shape(header, what)
    slope, intercept = float(header["slope"]), float(header["intercept"])
    if slope == 0 or not math.isfinite(slope):  # as the format says: no scaling
        slope, intercept = 1.0, 0.0
    if not math.isfinite(intercept):
        raise Refusal("BAD_IMAGE", f"the scl_inter of {what} is {intercept}; write it again")
    affine = _affine(header, what)
    if int(header["datatype"]) not in _VOXELS:
        raise Refusal("NOT_3D", f"{what} has datatype {header['datatype']}, not one number per voxel; write it again")
    dtype = np.dtype(_VOXELS[int(header["datatype"])]).newbyteorder(header.dtype["dim"].base.byteorder)
    offset = float(header["offset"])
    if not header.dtype.itemsize <= offset <= header.dtype.itemsize + MAX_TAIL_BYTES:
        raise Refusal("BAD_IMAGE", f"the vox_offset of {what} is {offset:g}; write it again")
    file.read(int(offset) - header.dtype.itemsize)  # extensions
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > MAX_BYTES:
        shown = " x ".join(map(str, shape))
        raise Refusal("TOO_LARGE", f"{what} has {shown} voxels, more than {MAX_BYTES >> 30} GiB; crop or split it")
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise Refusal("BAD_IMAGE", f"{what} has {len(data)} bytes of voxels instead of {num_bytes}; copy it again")
    if len(file.read(MAX_TAIL_BYTES)) == MAX_TAIL_BYTES:  # reading to the end makes gzip check its sum
        raise Refusal("BAD_IMAGE", f"{what} goes on behind its voxels; write it again")
    stored, affine = _oriented(np.frombuffer(data, dtype).reshape(shape[::-1]), affine)
    return NiftiImage(stored, slope, intercept, affine)


def _read_header(file: BufferedReader | gzip.GzipFile, what: str) -> np.void:
    start = file.read(4)
    for layout in (_NIFTI1, _NIFTI2):
        for order in ("<", ">"):
            if start == np.array(layout.itemsize, f"{order}i4").tobytes():
                data = start + file.read(layout.itemsize - 4)
                if len(data) < layout.itemsize:
                    raise Refusal("BAD_IMAGE", f"{what} ends inside its header; copy it again")
                header = np.frombuffer(data, layout.newbyteorder(order))[0]
                if header["magic"] not in (b"n+1", b"n+2"):
                    raise Refusal("BAD_IMAGE", f"{what} is no NIfTI in one file; write it as .nii or .nii.gz")
                return header
    raise Refusal("BAD_IMAGE", f"{what} is no NIfTI file; write it as .nii or .nii.gz")


def _shape(header: np.void, what: str) -> tuple[int, int, int]:
    """Voxels along the three axes of the file."""
    rank, *lengths = header["dim"].tolist()
    lengths = lengths[: max(0, rank)]
    shown = " x ".join(map(str, lengths))
    if not 3 <= rank <= 7 or min(lengths) < 1 or any(length != 1 for length in lengths[3:]):
        raise Refusal("NOT_3D", f"{what} has {shown or 'no'} voxels; write one volume per file")
    return lengths[0], lengths[1], lengths[2]


def _affine(header: np.void, what: str) -> Float[np.ndarray, "4 4"]:
    """Of the file's axes; the sform where there is one, else the qform."""
    if header["sform"] <= 0 and header["qform"] <= 0:
        raise Refusal("UNKNOWN_ORIENTATION", f"qform and sform code of {what} are 0; write it with its orientation")
    unit = int(header["units"]) & 7
    if unit not in _MILLIMETRES:
        raise Refusal("BAD_IMAGE", f"{what} has a unit of space (xyzt_units) {unit}; write it in millimetres")
    affine = np.eye(4)
    with np.errstate(all="ignore"):
        if header["sform"] > 0:
            affine[:3] = header["rows"]
        else:
            affine[:3, :3] = _rotation(header["quaternion"].astype(np.float64)) * header["pixdim"][1:4]
            affine[:3, 2] *= -1 if header["pixdim"][0] < 0 else 1
            affine[:3, 3] = header["origin"]
        affine[:3] *= _MILLIMETRES[unit]
        cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        shear = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if not (np.isfinite(affine).all() and shear <= ORTHOGONAL_TOLERANCE):  # NaN where an axis has no length
        detail = f"the axes of {what} are not finite or not orthogonal"
        raise Refusal("BAD_IMAGE", f"{detail}; resample it on orthogonal axes")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # NIfTI's axes point right, anterior, superior


def _rotation(quaternion: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "3 3"]:
    b, c, d = quaternion
    a = math.sqrt(max(0.0, 1.0 - float(quaternion @ quaternion)))
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )


def _oriented(
    stored: Shaped[np.ndarray, "k j i"], affine: Float[np.ndarray, "4 4"]
) -> tuple[Shaped[np.ndarray, "d h w"], Float[np.ndarray, "4 4"]]:
    """Permute and flip the axes to run most nearly along +x, +y and +z; moves no voxel in space."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    axes = max(
        permutations(range(3)), key=lambda order: sum(abs(cosines[world, axis]) for world, axis in enumerate(order))
    )
    to_old = np.zeros((4, 4))  # new index to old index
    to_old[3, 3] = 1
    lengths = stored.shape[::-1]
    for world, axis in enumerate(axes):
        if cosines[world, axis] < 0:
            to_old[axis, world], to_old[axis, 3] = -1, lengths[axis] - 1
            stored = np.flip(stored, 2 - axis)
        else:
            to_old[axis, world] = 1
    return stored.transpose([2 - axis for axis in axes[::-1]]), affine @ to_old
