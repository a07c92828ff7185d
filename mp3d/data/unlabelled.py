"""Series to look for lesions in: whatever CT a folder holds, in DICOM, NIfTI, NRRD or MetaImage. No labels."""

import os.path
from dataclasses import dataclass
from pathlib import Path

from mp3d.config import GeometryPolicy
from mp3d.data.dicom import SeriesFiles, StoredSlice, group_series, load_volume
from mp3d.data.files import walk
from mp3d.data.series import Volume
from mp3d.data.volume_file import is_volume_file
from mp3d.data.volumes import load_image
from mp3d.errors import DataError, Refusal


@dataclass(frozen=True)
class UnlabelledSeries:
    """A series that was listed and not yet read.

    Attributes:
        first_file: its file, or the first of its files, relative to what was listed; unique in a listing.
        source: the files of a DICOM series, or the one file of a volume.
    """

    first_file: str
    source: SeriesFiles | Path
    policy: GeometryPolicy = GeometryPolicy()

    @property
    def name(self) -> str:
        """The Series Instance UID where DICOM gives one, else the file; two acquisitions of a series share it."""
        return self.series_instance_uid or self.first_file

    @property
    def folder(self) -> str:
        """What holds all of its files, relative to what was listed, whose own name is ``"."``."""
        files = [self.first_file]
        if isinstance(self.source, SeriesFiles):
            files += [header.name for header in self.source.slices]
        return os.path.commonpath([os.path.dirname(file) for file in files]) or "."

    @property
    def series_instance_uid(self) -> str | None:
        """None where there is none, or an empty one."""
        return None if isinstance(self.source, Path) else self.source.series_instance_uid or None

    def load(self) -> tuple[Volume, tuple[StoredSlice, ...] | None, tuple[str, ...]]:
        """The volume; of DICOM, where each of its slices is stored; warning codes.

        Raises:
            Refusal: it is no regular stack of CT slices in Hounsfield units.
        """
        if isinstance(self.source, Path):
            volume, warnings = load_image(self.source)
            return volume, None, warnings
        return load_volume(self.source, self.policy)


def list_unlabelled(
    root: Path, policy: GeometryPolicy | None = None, volumes: str = "*"
) -> tuple[list[UnlabelledSeries], list[tuple[str, Refusal]]]:
    """Every CT series under a folder (or in one file), by its first file; and what was refused.

    Args:
        volumes: which volumes in one file are meant, by a pattern of their names.

    Raises:
        DataError: there is no such folder or file.
    """
    policy = policy or GeometryPolicy()
    if not root.exists():
        raise DataError(f"{root} is not there; name a folder, or a file, of DICOM, NIfTI, NRRD or MetaImage")
    if root.is_file() and is_volume_file(root):
        return [UnlabelledSeries(root.name, root)], []
    listing = group_series({root.name: root.read_bytes()} if root.is_file() else root, policy)
    found = [UnlabelledSeries(series.key, series, policy) for series in listing.series]
    if root.is_dir():
        names = {path.relative_to(root).as_posix(): path for path in walk(root) if is_volume_file(path)}
        found += [UnlabelledSeries(name, path) for name, path in names.items() if path.match(volumes)]
        listing.refused[:] = [(name, refusal) for name, refusal in listing.refused if name not in names]
    return sorted(found, key=lambda series: series.first_file), sorted(listing.refused, key=lambda each: each[0])
