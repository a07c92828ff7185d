"""A volume in one of the formats of research: NIfTI, NRRD or MetaImage, told by the end of its name."""

import gzip
import zlib
from pathlib import Path

from mp3d.data.metaimage_file import read_metaimage_file
from mp3d.data.nifti_file import read_nifti_file
from mp3d.data.nrrd_file import read_nrrd_file
from mp3d.data.stored_volume import StoredVolume
from mp3d.errors import Refusal

_READ = {
    ".nii": read_nifti_file,
    ".nii.gz": read_nifti_file,
    ".nrrd": read_nrrd_file,
    ".nhdr": read_nrrd_file,
    ".mha": read_metaimage_file,
    ".mhd": read_metaimage_file,
}


def is_volume_file(path: Path) -> bool:
    """Whether the name is that of a volume, not of other files such as the voxels beside a header."""
    return path.name.lower().endswith(tuple(_READ))


def read_volume_file(path: Path, what: str) -> StoredVolume:
    """Read a volume.

    Args:
        path: a name for which :func:`is_volume_file` holds.
        what: how messages call it, e.g. "the mask".

    Raises:
        Refusal: ``UNREADABLE``, ``BAD_IMAGE``, ``NOT_3D`` or ``TOO_LARGE``.
    """
    (read,) = {read for ending, read in _READ.items() if path.name.lower().endswith(ending)}
    try:
        return read(path, what)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refusal("BAD_IMAGE", f"{what} is damaged or cut off ({type(error).__name__}); copy it again") from error
    except OSError as error:
        raise Refusal("UNREADABLE", f"{what} cannot be read ({type(error).__name__})") from error
