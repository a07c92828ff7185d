"""One NIfTI file (NIfTI-1 or -2, ``.nii`` or ``.nii.gz``) to an array and its affine, or a named refusal.

nibabel reads the header and turns the axes. Its ``load`` is not used: it mends a wrong header in silence, such as a
voxel size of 0, and stops before gzip's checksum, so damaged voxels may pass. Here the header is checked before any
voxel is read, and the file is read to its end.
"""

import gzip
import math
import zlib
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from nibabel.nifti1 import Nifti1Header, data_type_codes
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError

from mp3d.errors import Refusal

MAX_BYTES = 4 * 2**30
"""Of the voxels as they are stored, unpacked: 1,000 slices of 1024 x 1024 floats."""
MAX_TAIL_BYTES = 2**20
"""Some writers put a little behind the voxels."""
ORTHOGONAL_TOLERANCE = 1e-3
"""Cosine of the angle between two axes up to which it is rounding and no shear."""

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
    except HeaderDataError as error:
        raise Refusal("BAD_IMAGE", f"the header of {what} is wrong ({error}); write it again") from error
    except OSError as error:
        raise Refusal("UNREADABLE", f"{what} cannot be read ({type(error).__name__})") from error


def _read(file: BufferedReader | gzip.GzipFile, what: str) -> NiftiImage:
    header = _read_header(file, what)
    rank, *lengths = header["dim"].tolist()
    shape, shown = lengths[:3], " x ".join(map(str, lengths[: max(0, rank)]))
    if not 3 <= rank <= 7 or min(shape) < 1 or any(length != 1 for length in lengths[3:rank]):
        raise Refusal("NOT_3D", f"{what} has {shown or 'no'} voxels; write one volume per file")
    code = int(header["datatype"])
    dtype = header.get_data_dtype() if code in data_type_codes.value_set() else np.dtype(np.void)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise Refusal("NOT_3D", f"{what} has datatype {code}, not one number per voxel; write it again")
    slope, intercept = header.get_slope_inter()
    affine = _affine(header, what)
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= header.sizeof_hdr + MAX_TAIL_BYTES:
        raise Refusal("BAD_IMAGE", f"the vox_offset of {what} is {offset:g}; write it again")
    file.read(int(offset) - header.sizeof_hdr)  # extensions
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > MAX_BYTES:
        raise Refusal("TOO_LARGE", f"{what} has {shown} voxels, more than {MAX_BYTES >> 30} GiB; crop or split it")
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise Refusal("BAD_IMAGE", f"{what} has {len(data)} bytes of voxels instead of {num_bytes}; copy it again")
    if len(file.read(MAX_TAIL_BYTES)) == MAX_TAIL_BYTES:  # reading to the end makes gzip check its sum
        raise Refusal("BAD_IMAGE", f"{what} goes on behind its voxels; write it again")
    axes = io_orientation(affine)
    stored = apply_orientation(np.frombuffer(data, dtype).reshape(shape, order="F"), axes).T
    scale = (1.0, 0.0) if slope is None or intercept is None else (slope, intercept)
    return NiftiImage(stored, *scale, affine @ inv_ornt_aff(axes, shape))


def _read_header(file: BufferedReader | gzip.GzipFile, what: str) -> Nifti1Header:
    start = file.read(4)
    for kind in (Nifti1Header, Nifti2Header):
        for order in ("little", "big"):
            if start == kind.sizeof_hdr.to_bytes(4, order):
                data = start + file.read(kind.sizeof_hdr - 4)
                if len(data) < kind.sizeof_hdr:
                    raise Refusal("BAD_IMAGE", f"{what} ends inside its header; copy it again")
                header = kind(data, order, check=False)
                if header["magic"] != kind.single_magic:
                    raise Refusal("BAD_IMAGE", f"{what} is no NIfTI in one file; write it as .nii or .nii.gz")
                return header
    raise Refusal("BAD_IMAGE", f"{what} is no NIfTI file; write it as .nii or .nii.gz")


def _affine(header: Nifti1Header, what: str) -> Float[np.ndarray, "4 4"]:
    """Of the file's axes; the sform where there is one, else the qform."""
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    if sform_code <= 0 and qform_code <= 0:
        raise Refusal("UNKNOWN_ORIENTATION", f"qform and sform code of {what} are 0; write it with its orientation")
    unit = int(header["xyzt_units"]) & 7
    if unit not in _MILLIMETRES:
        raise Refusal("BAD_IMAGE", f"{what} has a unit of space (xyzt_units) {unit}; write it in millimetres")
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # the format says: 0 is taken as 1
    with np.errstate(all="ignore"):
        try:
            affine = np.asarray(header.get_sform() if sform_code > 0 else header.get_qform())
        except ValueError as error:  # the quaternion is longer than 1
            raise Refusal("BAD_IMAGE", f"the qform of {what} is no rotation ({error}); write it again") from error
        affine[:3] *= _MILLIMETRES[unit]
        cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        shear = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if not (np.isfinite(affine).all() and shear <= ORTHOGONAL_TOLERANCE):  # NaN where an axis has no length
        detail = f"the axes of {what} are not finite or not orthogonal"
        raise Refusal("BAD_IMAGE", f"{detail}; resample it on orthogonal axes")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # NIfTI's axes point right, anterior, superior
