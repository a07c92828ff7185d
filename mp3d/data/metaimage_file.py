"""One MetaImage (``.mha``, or ``.mhd`` with the voxels in a file beside it), as ITK writes them."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from mp3d.data.stored_volume import (
    StoredVolume,
    check_affine,
    data_file_beside,
    inflate_voxels,
    read_voxels,
    volume_shape,
)
from mp3d.errors import Refusal

MAX_LINE_BYTES = 2**12
MAX_LINES = 2**10
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
"""MET_LONG is left out: its size depends on the machine that wrote it."""
_DATA_FILE = "ElementDataFile"


def read_metaimage_file(path: Path, what: str) -> StoredVolume:
    """Read a volume; its affine is None where the file has no spacing, directions or offset.

    Args:
        what: how messages call it, e.g. "the mask".

    Raises:
        Refusal: ``BAD_IMAGE``, ``NOT_3D`` or ``TOO_LARGE``.
        OSError, zlib.error: a file cannot be read or is damaged.
    """
    with path.open("rb") as file:
        fields = _read_header(file, what)
        try:
            shape = volume_shape([int(length) for length in fields["DimSize"].split()], what)
            if int(fields["NDims"]) != len(fields["DimSize"].split()):
                raise ValueError("NDims and DimSize")
            dtype = _dtype(fields, what)
            affine = _affine(fields, what)
            header_size = int(fields.get("HeaderSize", "0"))
        except KeyError as error:
            raise Refusal("BAD_IMAGE", f"the header of {what} lacks the field {error}; write it again") from error
        except ValueError as error:
            raise Refusal("BAD_IMAGE", f"the header of {what} cannot be parsed; write it again") from error
        if header_size or not _is_true(fields, "BinaryData"):
            detail = f"the voxels of {what} are text, or begin behind another header"
            raise Refusal("BAD_IMAGE", f"{detail}; write it again as .mha")
        if fields[_DATA_FILE] == "LOCAL":
            return StoredVolume(_read_data(file, fields, shape, dtype, what), affine)
    with data_file_beside(path, fields[_DATA_FILE], what).open("rb") as file:
        return StoredVolume(_read_data(file, fields, shape, dtype, what), affine)


def _read_header(file: BinaryIO, what: str) -> dict[str, str]:
    """Fields up to the one that says where the voxels are; the first line must be one, too."""
    fields: dict[str, str] = {}
    for _ in range(MAX_LINES):
        line = file.readline(MAX_LINE_BYTES)
        name, equals, value = line.decode("latin-1").partition("=")
        name = name.strip()
        if not (line.endswith(b"\n") and equals):
            break
        if name in fields:
            raise Refusal("BAD_IMAGE", f"the header of {what} has a field twice; write it again")
        fields[name] = value.strip()
        if name == _DATA_FILE:
            return fields
    raise Refusal("BAD_IMAGE", f"{what} is no MetaImage; write it as .mha")


def _is_true(fields: dict[str, str], name: str) -> bool:
    return fields.get(name, "False").lower() == "true"


def _dtype(fields: dict[str, str], what: str) -> np.dtype:
    kind = _TYPES.get(fields["ElementType"])
    if kind is None or int(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise Refusal("NOT_3D", f"the type of {what} is not one number of a fixed size per voxel; write it again")
    big = _is_true(fields, "BinaryDataByteOrderMSB") or _is_true(fields, "ElementByteOrderMSB")
    return np.dtype(kind).newbyteorder(">" if big else "<")


def _affine(fields: dict[str, str], what: str) -> Float[np.ndarray, "4 4"] | None:
    """The rows of the matrix are the directions of the axes."""
    directions = _first(fields, "TransformMatrix", "Rotation", "Orientation")
    origin = _first(fields, "Offset", "Position", "Origin")
    spacing = fields.get("ElementSpacing")
    if directions is None or origin is None or spacing is None:
        return None
    affine = np.eye(4)
    with np.errstate(invalid="ignore"):  # infinite times 0
        affine[:3, :3] = _numbers(directions, 9).reshape(3, 3).T * _numbers(spacing, 3)
    affine[:3, 3] = _numbers(origin, 3)
    check_affine(affine, what)
    return affine


def _first(fields: dict[str, str], *names: str) -> str | None:
    return next((fields[name] for name in names if name in fields), None)


def _numbers(text: str, count: int) -> Float[np.ndarray, "n"]:
    numbers = np.array([float(number) for number in text.split()])
    if len(numbers) != count:
        raise ValueError("numbers")
    return numbers


def _read_data(
    file: BinaryIO, fields: dict[str, str], shape: tuple[int, int, int], dtype: np.dtype, what: str
) -> np.ndarray:
    if _is_true(fields, "CompressedData"):
        return inflate_voxels(file.read(), shape, dtype, what)
    return read_voxels(file, shape, dtype, os.fstat(file.fileno()).st_size - file.tell(), what)
