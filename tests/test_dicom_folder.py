"""A folder of DICOM to a source of CT series with lesions."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset

from mp3d.data.dicom_folder import read_dicom
from mp3d.data.series import CTSeries
from mp3d.errors import ConfigError
from tests.dicom_files import ct_slices, made_volume, structure_set, to_bytes, to_files
from tests.test_rtstruct import outline

VOLUME = made_volume(shape=(6, 12, 14))


def write(root: Path, slices: list[Dataset], **others: bytes) -> Path:
    for name, file in (to_files(slices) | others).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file)
    return root


def lesion(names: tuple[str, ...] = ("GTV",)) -> Dataset:
    region = [outline(VOLUME, 2, 0.5, 1.5, 4.5, 5.5), outline(VOLUME, 2, 8.5, 6.5, 12.5, 9.5)]
    return structure_set([region] * len(names), names)


def load(root: Path, **options: str) -> CTSeries:
    source = read_dicom(root, **options)
    assert source.refused == ()
    (item,) = source.items
    series = pickle.loads(pickle.dumps(item)).load()  # as it travels to another process
    assert isinstance(series, CTSeries)
    return series


def test_boxes_of_a_structure_set(tmp_path: Path) -> None:
    series = load(write(tmp_path, ct_slices(VOLUME), **{"rs.dcm": to_bytes(lesion())}))
    np.testing.assert_array_equal(series.volume.hu, VOLUME.hu)
    assert series.patient == "CANARY-ID"
    truth = series.truths[2]
    assert truth.boxes is not None
    assert truth.labels is not None
    assert truth.mask is not None
    assert truth.boxes.tolist() == [[1, 2, 5, 6], [9, 7, 13, 10]]
    assert truth.labels.tolist() == [1, 1]
    assert truth.instances is not None
    assert truth.instances.tolist() == [1, 2]  # they touch on no slice
    assert truth.mask.sum() == 16 + 12
    for other in (*series.truths[:2], *series.truths[3:]):  # looked, none found
        assert other.boxes is not None
        assert other.boxes.shape == (0, 4)
        assert other.mask is not None
        assert not other.mask.any()
    assert series.warnings == ()


def test_without_structure_set_nobody_looked(tmp_path: Path) -> None:
    series = load(write(tmp_path, ct_slices(VOLUME)))
    assert all(truth.boxes is truth.labels is truth.mask is None for truth in series.truths)


def test_structure_set_without_a_matching_region(tmp_path: Path) -> None:
    series = load(write(tmp_path, ct_slices(VOLUME), **{"rs.dcm": to_bytes(lesion(("Liver",)))}))
    assert series.truths[2].boxes is None
    assert series.warnings == ("ROI_NOT_FOUND",)


def test_the_roi_names_are_chosen(tmp_path: Path) -> None:
    write(tmp_path, ct_slices(VOLUME), **{"rs.dcm": to_bytes(lesion(("Liver",)))})
    assert load(tmp_path, roi="^Liver$").truths[2].boxes is not None
    with pytest.raises(ConfigError, match="regular expression"):
        read_dicom(tmp_path, roi="(")


def test_attached_by_frame_of_reference_where_no_series_is_named(tmp_path: Path) -> None:
    ds = lesion()
    del ds.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    series = load(write(tmp_path, ct_slices(VOLUME), **{"rs.dcm": to_bytes(ds)}))
    assert series.truths[2].boxes is not None


def test_of_another_series(tmp_path: Path) -> None:
    slices = ct_slices(VOLUME)
    for ds in slices:
        ds.SeriesInstanceUID += ".4"
    root = write(tmp_path, slices, **{"rs.dcm": to_bytes(lesion())})
    assert load(root).truths[2].boxes is None
    assert read_dicom(root).notes == ("1 structure sets or segmentations belong to no series here",)


def test_regions_of_several_structure_sets_add_up(tmp_path: Path) -> None:
    more = structure_set([[outline(VOLUME, 4, 0.5, 0.5, 3.5, 3.5)]], ["lesion 2"])
    series = load(write(tmp_path, ct_slices(VOLUME), **{"1": to_bytes(lesion()), "2": to_bytes(more)}))
    assert [0 if truth.boxes is None else len(truth.boxes) for truth in series.truths] == [0, 0, 2, 0, 1, 0]


def test_one_bad_file_stops_nothing(tmp_path: Path) -> None:
    other = ct_slices(VOLUME)[0]
    other.SeriesInstanceUID += ".5"
    other.Modality = "PT"
    file = to_bytes(ct_slices(VOLUME)[0])
    bad = {
        "broken.dcm": b"\x00" * 500,
        "truncated.dcm": file[:-100],
        "not_ct.dcm": to_bytes(other),
        "rs.dcm": to_bytes(lesion())[:-60],
    }
    source = read_dicom(write(tmp_path, ct_slices(VOLUME), **bad))
    assert [(key, refusal.reason) for key, refusal in source.refused] == [
        ("broken.dcm", "NOT_DICOM"),
        ("not_ct.dcm", "NOT_CT"),
        ("rs.dcm", "BAD_STRUCTURE_SET"),
        ("truncated.dcm", "TRUNCATED"),
    ]
    (item,) = source.items
    series = item.load()
    assert isinstance(series, CTSeries)
    np.testing.assert_array_equal(series.volume.hu, VOLUME.hu)


def test_messages_and_notes_name_nobody(tmp_path: Path) -> None:
    root = tmp_path / "CANARY-FOLDER"
    write(root, ct_slices(VOLUME), **{"CANARY.dcm": b"CANARY", "CANARY2.dcm": to_bytes(lesion())[:-60]})
    source = read_dicom(root)
    assert len(source.refused) == 2
    assert "CANARY" not in " ".join([*(str(refusal) for _, refusal in source.refused), *source.notes])


def test_listing_does_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", ct_slices(VOLUME))
    monkeypatch.chdir(tmp_path)
    (item,) = read_dicom(Path("data")).items
    monkeypatch.chdir("/")
    assert isinstance(item.load(), CTSeries)
