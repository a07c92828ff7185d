"""One NIfTI file (NIfTI-1 or -2, ``.nii`` or ``.nii.gz``), its header parsed by nibabel."""

import gzip
import os
from io import BufferedReader
from pathlib import Path

import numpy as np
from jaxtyping import Float
from nibabel.nifti1 import Nifti1Header, data_type_codes
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from mp3d.data.stored_volume import (
    DEFLATE_RATIO,
    StoredVolume,
    check_affine,
    read_voxels,
    volume_shape,
)
from mp3d.errors import Refusal

MAX_TAIL_BYTES = 2**20
"""Some writers put a little behind the voxels, or between header and voxels."""
_MILLIMETRES = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""By the unit of space: unknown, metre, millimetre, micrometre."""


def read_nifti_file(path: Path, what: str) -> StoredVolume:
    """Read a volume; its affine is None where neither qform nor sform is set.

    Args:
        what: how messages call it, e.g. "the mask".

    Raises:
        Refusal: ``BAD_IMAGE``, ``NOT_3D`` or ``TOO_LARGE``.
        OSError, EOFError, zlib.error: the file cannot be read or is damaged.
    """
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            if packed:
                with gzip.open(raw) as file:
                    return _read(file, size * DEFLATE_RATIO, what)
            return _read(raw, size, what)
        except HeaderDataError as error:
            raise Refusal("BAD_IMAGE", f"the header of {what} is wrong ({error}); write it again") from error


def _read(file: BufferedReader | gzip.GzipFile, held_bytes: int, what: str) -> StoredVolume:
    header = _read_header(file, what)
    rank, *lengths = header["dim"].tolist()
    shape = volume_shape(lengths[:rank] if 0 <= rank <= len(lengths) else (), what)
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
    stored = read_voxels(file, shape, dtype, held_bytes, what, MAX_TAIL_BYTES)
    if slope is None or intercept is None:
        return StoredVolume(stored, affine)
    return StoredVolume(stored, affine, slope, intercept)


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


def _affine(header: Nifti1Header, what: str) -> Float[np.ndarray, "4 4"] | None:
    """Of the file's axes; the sform where there is one, else the qform."""
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    if sform_code <= 0 and qform_code <= 0:
        return None
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
    check_affine(affine, what)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # NIfTI's axes point right, anterior, superior
