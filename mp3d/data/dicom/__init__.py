"""DICOM CT to Hounsfield units and geometry, right or refused by name.

``group_series`` lists a folder or archive, ``load_volume`` reads one series. The steps: ``elements`` (bytes to raw
elements), ``header`` (what we need of them), ``frames`` (multi-frame images to frames), ``pixels`` (Pixel Data to HU),
``listing`` (files to series), ``volume`` (series to volume); the geometry gate is :mod:`mp3d.data.geometry`.
"""

from mp3d.data.dicom.header import Header, read_header
from mp3d.data.dicom.listing import Listing, SeriesFiles, group_series
from mp3d.data.dicom.pixels import read_hu
from mp3d.data.dicom.volume import StoredSlice, load_volume
from mp3d.data.reasons import REASONS, WARNINGS

__all__ = [
    "REASONS",
    "WARNINGS",
    "Header",
    "Listing",
    "SeriesFiles",
    "StoredSlice",
    "group_series",
    "load_volume",
    "read_header",
    "read_hu",
]
