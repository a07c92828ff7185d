"""What the readers of LIDC-IDRI marked, and the data set's XML files that say so.

A reader outlined every nodule of 3 mm and above on each slice, along the first pixels outside it, and rated it; a
smaller nodule is one point without ratings. Marks of what is no nodule are not read. Readers are numbered within one
CT: the data set does not say who they are.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from jaxtyping import Int32

from mp3d.errors import Refusal

MAX_XML_BYTES = 16 * 2**20
"""The readings of LIDC-IDRI have well below 4 MiB."""
MAX_ELEMENTS, MAX_DEPTH = 1_000_000, 20
"""Of an XML file; those of LIDC-IDRI are six deep."""
MAX_ANNOTATIONS = 1000
"""On one CT; LIDC-IDRI has at most 49."""
MAX_COORDINATE = 4095
"""Rows and columns of a CT are fewer."""
ROOT_TAG = "LidcReadMessage"
"""Of a reading of a CT; those of chest X-rays are ``IdriReadMessage``."""


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

    def __post_init__(self) -> None:
        if not len(self.points) or self.points.min() < 0 or self.points.max() > MAX_COORDINATE:
            raise ValueError("an outline without points, or with one that is on no image")
        if not math.isfinite(self.z_mm):
            raise ValueError("an outline at no z")


@dataclass(frozen=True, eq=False)
class Annotation:
    """A nodule of 3 mm and above as one reader saw it.

    Attributes:
        reader: number of the reader in this CT; None where that is not known.
        malignancy: 1 (highly unlikely) to 5 (highly suspicious); None: the reader left it out.
    """

    reader: int | None
    outlines: tuple[Outline, ...]
    malignancy: int | None

    def __post_init__(self) -> None:
        if self.malignancy is not None and self.malignancy not in range(1, 6):
            raise ValueError("malignancy is not 1 to 5")


@dataclass(frozen=True, eq=False)
class Reading:
    """All that the readers marked on one CT; ``small`` are the nodules below 3 mm; ``warnings`` are codes."""

    annotations: tuple[Annotation, ...]
    small: tuple[Outline, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.annotations) > MAX_ANNOTATIONS or not all(annotation.outlines for annotation in self.annotations):
            raise ValueError("more nodules than any CT has, or one without outline")


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
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError) as error:
        if builder.root is not None and _local(builder.root.tag) != ROOT_TAG:
            return None
        told = f"the reading cannot be parsed ({type(error).__name__}); fetch the XML file again"
        reading = Refusal("BAD_ANNOTATION", told)
    return SeriesReading(_series_of(builder.root), reading)


def pixels(points: list[tuple[int, int]]) -> Int32[np.ndarray, "p 2"]:
    """Points of an outline as an array; those beyond its range stay beyond any image."""
    return np.array(points, np.int64).clip(-1, MAX_COORDINATE + 1).astype(np.int32).reshape(-1, 2)


class _PlainBuilder(ElementTree.TreeBuilder):
    """Builds the tree of a document without a document type; keeps the root of one that breaks off."""

    root: Element | None = None
    num_elements = depth = 0

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError("a document type")

    def start(self, tag: str, attributes: dict[str, str], /) -> Element:
        element = super().start(tag, attributes)
        if self.root is None:
            self.root = element
        self.num_elements += 1
        self.depth += 1
        if self.num_elements > MAX_ELEMENTS or self.depth > MAX_DEPTH:
            raise ValueError("too many elements")
        return element

    def end(self, tag: str, /) -> Element:
        self.depth -= 1
        return super().end(tag)


def _reading(root: Element) -> Reading:
    if not _series_of(root) or root.find("{*}readingSession") is None:
        raise ValueError("no series, or no reader")
    annotations: list[Annotation] = []
    small: list[Outline] = []
    warnings: set[str] = set()
    for reader, session in enumerate(root.iterfind("{*}readingSession")):
        for nodule in session.iterfind("{*}unblindedReadNodule"):
            regions = (roi for roi in nodule.iterfind("{*}roi") if roi.find("{*}edgeMap") is not None)
            marks = [_outline(roi) for roi in regions]
            if not all(mark.sop_instance_uid for mark in marks):
                warnings.add("SLICE_UID_MISSING")
            outlines = tuple(mark for mark in marks if len(mark.points) > 1)  # a single point is a stray mark
            ratings = _ratings(nodule)
            if outlines and ratings:
                annotations.append(Annotation(reader, outlines, ratings.get("malignancy")))
                if "malignancy" not in ratings:
                    warnings.add("MALIGNANCY_MISSING")
            else:
                small += marks
    return Reading(tuple(annotations), tuple(small), tuple(sorted(warnings)))


def _ratings(nodule: Element) -> dict[str, int]:
    """Empty below 3 mm: then the element is absent, or, in a few readings, its values are empty or 0."""
    characteristics = nodule.iterfind("{*}characteristics/*")
    found = {_local(item.tag): int((item.text or "").strip() or 0) for item in characteristics}
    return found if all(found.values()) else {}


def _outline(roi: Element) -> Outline:
    inclusion = _text(roi, "inclusion").upper()
    if inclusion not in ("TRUE", "FALSE"):
        raise ValueError("inclusion is neither TRUE nor FALSE")
    points = [(int(_text(edge, "xCoord")), int(_text(edge, "yCoord"))) for edge in roi.iterfind("{*}edgeMap")]
    z_mm = float(_text(roi, "imageZposition"))
    sop_instance_uid = (roi.findtext("{*}imageSOP_UID") or "").strip()
    return Outline(pixels(points), z_mm, sop_instance_uid, inclusion == "TRUE")


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
