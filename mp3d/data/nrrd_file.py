"""One NRRD file (``.nrrd``, or ``.nhdr`` with the voxels in a file beside it).

The format: https://teem.sourceforge.net/nrrd/format.html. Of its encodings raw and gzip are read.
"""

import gzip
import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from mp3d.data.stored_volume import (
    DEFLATE_RATIO,
    StoredVolume,
    check_affine,
    data_file_beside,
    read_voxels,
    volume_shape,
)
from mp3d.errors import Refusal

MAX_LINE_BYTES = 2**16
MAX_LINES = 2**12
_TYPES = {
    name: dtype
    for dtype, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}
_TO_LPS = {
    name: signs
    for signs, names in {
        (1, 1, 1): ("left-posterior-superior", "lps"),
        (-1, -1, 1): ("right-anterior-superior", "ras"),
        (1, -1, 1): ("left-anterior-superior", "las"),
    }.items()
    for name in names
}


def read_nrrd_file(path: Path, what: str) -> StoredVolume:
    """Read a volume; its affine is None where the file has no anatomical space, directions or origin.

    Args:
        what: how messages call it, e.g. "the mask".

    Raises:
        Refusal: ``BAD_IMAGE``, ``NOT_3D`` or ``TOO_LARGE``.
        OSError, EOFError, zlib.error: a file cannot be read or is damaged.
    """
    with path.open("rb") as file:
        fields = _read_header(file, what)
        try:
            shape = volume_shape([int(length) for length in fields["sizes"].split()], what)
            if int(fields["dimension"]) != len(fields["sizes"].split()):
                raise ValueError("dimension and sizes")
            dtype = _dtype(fields, what)
            affine = _affine(fields, what)
            skips = int(fields.get("lineskip", "0")), int(fields.get("byteskip", "0"))
        except KeyError as error:
            raise Refusal("BAD_IMAGE", f"the header of {what} lacks the field {error}; write it again") from error
        except ValueError as error:
            raise Refusal("BAD_IMAGE", f"the header of {what} cannot be parsed; write it again") from error
        if skips != (0, 0):
            raise Refusal("BAD_IMAGE", f"the header of {what} skips lines or bytes before the voxels; write it again")
        if "datafile" not in fields:
            return StoredVolume(_read_data(file, fields, shape, dtype, what), affine)
    with data_file_beside(path, fields["datafile"], what).open("rb") as file:
        return StoredVolume(_read_data(file, fields, shape, dtype, what), affine)


def _read_header(file: BinaryIO, what: str) -> dict[str, str]:
    """Fields by their name in lower case and without spaces; to the empty line, or to the end where none follows."""
    if not re.fullmatch(rb"NRRD000[1-6]\r?\n", file.readline(16)):
        raise Refusal("BAD_IMAGE", f"{what} is no NRRD file; write it as .nrrd")
    fields: dict[str, str] = {}
    for _ in range(MAX_LINES):
        line = file.readline(MAX_LINE_BYTES)
        text = line.decode("latin-1").rstrip("\r\n")
        if not text:
            return fields
        name, colon, value = text.partition(":")
        if len(line) == MAX_LINE_BYTES or not (colon or text.startswith("#")):
            break
        if text.startswith("#") or value.startswith("="):  # a comment, or a key of somebody's own
            continue
        name = name.lower().replace(" ", "")
        if name in fields:
            raise Refusal("BAD_IMAGE", f"the header of {what} has a field twice; write it again")
        fields[name] = value.strip()
    raise Refusal("BAD_IMAGE", f"the header of {what} is none, or too long; write it again")


def _dtype(fields: dict[str, str], what: str) -> np.dtype:
    kind = _TYPES.get(fields["type"].lower())
    if kind is None:
        raise Refusal("NOT_3D", f"the type of {what} is not one number per voxel; write it again")
    order = "little" if kind[1] == "1" else fields["endian"].lower()
    if order not in ("little", "big"):
        raise ValueError("endian")
    return np.dtype(kind).newbyteorder("<" if order == "little" else ">")


def _affine(fields: dict[str, str], what: str) -> Float[np.ndarray, "4 4"] | None:
    signs = _TO_LPS.get(fields.get("space", "").lower())
    if signs is None or not {"spacedirections", "spaceorigin"} <= fields.keys():
        return None
    if set(re.findall(r'"(.*?)"', fields.get("spaceunits", ""))) - {"mm", ""}:
        raise Refusal("BAD_IMAGE", f"{what} has another unit of space than mm; write it in millimetres")
    affine = np.eye(4)
    affine[:3, :3] = _vectors(fields["spacedirections"], 3).T
    affine[:3, 3] = _vectors(fields["spaceorigin"], 1)[0]
    check_affine(affine, what)
    return np.diag([*signs, 1.0]) @ affine


def _vectors(text: str, count: int) -> Float[np.ndarray, "n 3"]:
    """Vectors such as ``(0.7,0,0) (0,0.7,0) (0,0,5)``.

    Raises:
        ValueError: other than so many vectors of three numbers.
    """
    inside = re.fullmatch(r"\s*\(([^()]*)\)" * count + r"\s*", text)
    if inside is None:
        raise ValueError("vectors")
    return np.array([[float(number) for number in vector.split(",")] for vector in inside.groups()]).reshape(count, 3)


def _read_data(
    file: BinaryIO, fields: dict[str, str], shape: tuple[int, int, int], dtype: np.dtype, what: str
) -> np.ndarray:
    held_bytes = os.fstat(file.fileno()).st_size - file.tell()
    match fields.get("encoding", "").lower():
        case "raw":
            return read_voxels(file, shape, dtype, held_bytes, what)
        case "gzip" | "gz":
            with gzip.open(file) as unpacked:
                return read_voxels(unpacked, shape, dtype, held_bytes * DEFLATE_RATIO, what)
        case encoding:
            raise Refusal("BAD_IMAGE", f"{what} has the encoding {encoding[:20]!r}; write it as raw or gzip")
