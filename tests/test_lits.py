"""The LiTS reader, on pairs in its format with the headers that it is known for."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from mp3d.data.lits import IRCADB_CASES, VDT_TEST, VDT_VAL, read_lits
from mp3d.data.prepare import prepare
from mp3d.data.reasons import REASONS, WARNINGS
from mp3d.data.series import CTSeries, boxes_3d
from mp3d.data.shard import open_shards
from mp3d.errors import DataError
from tests.tiny import ID_KEY

SHAPE = (12, 10, 6)
"""Columns, rows, slices of the patient: to the left, to posterior, to superior."""
SPACING = (0.7, 0.8, 2.5)
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.array(
    [[0.7, 0, 0, -100], [0, 0.8, 0, -90], [0, 0, 2.5, 40], [0, 0, 0, 1]]
)
"""Of those axes, to the right, anterior, superior, as NIfTI has it."""


UNIT = np.array([[-1.0, 0, 0, 20], [0, 1, 0, -30], [0, 0, 1, 500], [0, 0, 0, 1]])
"""An identity but for a sign and an origin."""


def patient() -> tuple[np.ndarray, np.ndarray]:
    """Voxels (column, row, slice) and labels: a liver, with a tumour on slices 1 and 2 and another on slice 4."""
    hu = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:11, 1:9, 1:5] = 1
    labels[3:6, 2:5, 1:3] = 2
    labels[7:10, 5:8, 4] = 2
    return hu, labels


def turned(codes: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The patient with the file's axes in another order and direction: voxels, labels, affine."""
    hu, labels = patient()
    image = nibabel.Nifti1Image(hu, AFFINE)
    start = nibabel.orientations.io_orientation(AFFINE)
    change = nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(tuple(codes)))
    mask = nibabel.Nifti1Image(labels, AFFINE).as_reoriented(change)
    image = image.as_reoriented(change)
    return np.asarray(image.dataobj), np.asarray(mask.dataobj), image.affine


def write(
    root: Path,
    case: int,
    codes: str = "LPS",
    image_affine: np.ndarray | None = None,
    mask_affine: np.ndarray | None = None,
    ending: str = ".nii",
    mask_folder: str = "",
) -> None:
    hu, labels, affine = turned(codes)
    (root / mask_folder).mkdir(parents=True, exist_ok=True)
    for values, own, path in (
        (hu, image_affine, root / f"volume-{case}{ending}"),
        (labels, mask_affine, root / mask_folder / f"segmentation-{case}{ending}"),
    ):
        image = nibabel.Nifti1Image(values, affine if own is None else own)
        nibabel.save(image, path)


def load(root: Path, **options: Any) -> CTSeries:
    source = read_lits(root, **options)
    assert source.refused == ()
    loaded = source.items[0].load()
    assert isinstance(loaded, CTSeries)
    assert set(loaded.warnings) <= WARNINGS.keys()
    return loaded


def check(series: CTSeries) -> None:
    """Voxels and labels are the patient's, in the order of an axial series."""
    hu, labels = patient()
    np.testing.assert_array_equal(series.volume.hu, hu.T)
    np.testing.assert_array_equal([truth.mask for truth in series.truths], labels.T)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "RPS", "ILA", "SAR"])
def test_orientations_differ_from_case_to_case(tmp_path: Path, codes: str):
    write(tmp_path, 5, codes)
    series = load(tmp_path)
    check(series)
    np.testing.assert_allclose(series.volume.affine, np.diag([-1, -1, 1, 1]) @ AFFINE, atol=1e-4)
    assert series.warnings == ()


def test_boxes_are_those_of_tumours(tmp_path: Path):
    write(tmp_path, 5)
    source = read_lits(tmp_path)
    assert source.class_names == ("liver", "tumour")
    truths = load(tmp_path).truths
    found = [[] if truth.boxes is None else truth.boxes.tolist() for truth in truths]
    assert found == [[], [[3, 2, 6, 5]], [[3, 2, 6, 5]], [], [[7, 5, 10, 8]], []]
    boxes, labels, _ = boxes_3d(truths)
    assert boxes.tolist() == [[3, 2, 1, 6, 5, 3], [7, 5, 4, 10, 8, 5]]
    assert labels.tolist() == [2, 2]
    assert all(truth.boxes is not None for truth in truths)


def test_tumours_alone_and_the_liver_whole(tmp_path: Path):
    write(tmp_path, 5)
    _, labels = patient()
    tumour = load(tmp_path, classes="tumour").truths
    np.testing.assert_array_equal([truth.mask for truth in tumour], (labels == 2).T)
    assert boxes_3d(tumour)[1].tolist() == [1, 1]
    assert read_lits(tmp_path, classes="tumour").class_names == ("tumour",)
    liver = load(tmp_path, classes="liver").truths
    np.testing.assert_array_equal([truth.mask for truth in liver], (labels > 0).T)
    assert all(truth.boxes is None for truth in liver)
    assert read_lits(tmp_path, classes="liver").class_names == ("liver",)
    assert read_lits(tmp_path, classes="liver").options != read_lits(tmp_path).options


@pytest.mark.parametrize("codes", ["LPS", "RAS", "ILA"])
@pytest.mark.parametrize("identity", [np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0]), UNIT])
def test_an_identity_affine_gives_way_to_the_segmentations(tmp_path: Path, codes: str, identity: np.ndarray):
    write(tmp_path, 28, codes, image_affine=identity)
    series = load(tmp_path)
    check(series)
    assert series.volume.spacing_mm == pytest.approx(SPACING[::-1])
    assert series.warnings == ("AFFINE_REPAIRED",)


def test_two_identities_need_a_table(tmp_path: Path):
    write(tmp_path, 28, "RAS", image_affine=np.eye(4), mask_affine=np.eye(4))
    (item,) = read_lits(tmp_path).items
    with pytest.raises(DataError, match=r"UNKNOWN_ORIENTATION: .*\(spacings\)"):
        item.load()
    table = tmp_path / "spacings.csv"
    table.write_text("case,x,y,z\n28,0.7,0.8,2.5\n29,1,1,1\n")
    series = load(tmp_path, spacings=table)
    check(series)
    assert series.volume.spacing_mm == pytest.approx(SPACING[::-1])
    assert series.warnings == ("AFFINE_REPAIRED",)
    assert read_lits(tmp_path, spacings=table).options != read_lits(tmp_path).options


def test_identities_with_an_origin_count_where_they_agree(tmp_path: Path):
    write(tmp_path, 5, image_affine=UNIT, mask_affine=UNIT)
    series = load(tmp_path)
    assert (series.volume.spacing_mm, series.warnings) == ((1, 1, 1), ())
    write(tmp_path, 5, image_affine=UNIT, mask_affine=np.eye(4))
    with pytest.raises(DataError, match="UNKNOWN_ORIENTATION"):
        load(tmp_path)


def test_no_affine_at_all_is_like_an_identity(tmp_path: Path):
    write(tmp_path, 28)
    path = tmp_path / "volume-28.nii"
    data = bytearray(path.read_bytes())
    data[252:256] = bytes(4)  # qform_code, sform_code
    path.write_bytes(data)
    series = load(tmp_path)
    check(series)
    assert series.warnings == ("AFFINE_REPAIRED",)


@pytest.mark.parametrize(
    "mask_affine",
    [
        AFFINE @ np.diag([-1, 1, 1, 1]),  # another direction
        AFFINE + np.array([[0, 0, 0, 5.0], *[[0] * 4] * 3]),  # another origin
        np.eye(4),
        UNIT,
    ],
)
def test_the_image_counts_where_headers_disagree(tmp_path: Path, mask_affine: np.ndarray):
    write(tmp_path, 5, mask_affine=mask_affine)
    series = load(tmp_path)
    check(series)
    np.testing.assert_allclose(series.volume.affine, np.diag([-1, -1, 1, 1]) @ AFFINE, atol=1e-4)
    assert series.warnings == ("MASK_HEADER_IGNORED",)


def test_a_segmentation_on_other_axes_but_in_the_same_place_keeps_its_header(tmp_path: Path):
    write(tmp_path, 5, "LPS")
    write(tmp_path / "other", 5, "RPI")
    (tmp_path / "other" / "volume-5.nii").unlink()
    (tmp_path / "segmentation-5.nii").unlink()
    series = load(tmp_path)
    check(series)
    assert series.warnings == ()


def test_spacings_that_disagree_are_refused_unless_given(tmp_path: Path):
    write(tmp_path, 5, mask_affine=AFFINE @ np.diag([1, 1, 2, 1]))
    with pytest.raises(DataError, match=r"MASK_MISMATCH: .*\[0\.7, 0\.8, 2\.5\] and \[0\.7, 0\.8, 5\.0\]"):
        read_lits(tmp_path).items[0].load()
    table = tmp_path / "spacings.csv"
    table.write_text("case,x,y,z\n5,0.7,0.8,5\n")
    assert load(tmp_path, spacings=table).volume.spacing_mm == pytest.approx((5, 0.8, 0.7))


def test_other_shapes_and_labels_are_refused(tmp_path: Path):
    write(tmp_path, 5)
    write(tmp_path, 6)
    path = tmp_path / "segmentation-5.nii"
    nibabel.save(nibabel.Nifti1Image(patient()[1][:-1], AFFINE), path)
    nibabel.save(nibabel.Nifti1Image(patient()[1] * 2, AFFINE), tmp_path / "segmentation-6.nii")
    first, second = read_lits(tmp_path).items
    with pytest.raises(DataError, match="MASK_MISMATCH"):
        first.load()
    with pytest.raises(DataError, match="BAD_LABELS: the mask holds 4"):
        second.load()


def test_pairs_are_found_in_any_folders(tmp_path: Path):
    write(tmp_path / "Training Batch 1", 0)
    write(tmp_path / "Training Batch 2", 28, ending=".nii.gz")
    write(tmp_path / "volumes", 2, mask_folder="../masks")
    write(tmp_path / "twice" / "a", 7)
    write(tmp_path / "twice" / "b", 7)
    write(tmp_path / "alone", 8, mask_folder="lost")
    (tmp_path / "alone" / "lost" / "segmentation-8.nii").rename(tmp_path / "alone" / "segmentation-9.nii")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test-volume-0.nii").write_bytes(b"")
    source = read_lits(tmp_path)
    assert [(item.key, item.patient, item.split) for item in source.items] == [
        ("volume-0", "lits-0", "val"),
        ("volume-2", "lits-2", "test"),
        ("volume-28", "lits-28", "train"),
    ]
    assert [(key, refusal.reason) for key, refusal in source.refused] == [
        ("volume-7", "MISSING_MASK"),
        ("volume-8", "MISSING_MASK"),
    ]
    assert {refusal.reason for _, refusal in source.refused} <= REASONS.keys()
    assert source.notes == (
        "1 cases are in 3D-IRCADb-01 too (28 to 44, 46 to 48): do not use both",
        "1 files of the challenge's test set, whose truth is not published, not used",
        "1 segmentations without their volume, not used",
    )
    assert {item.split for item in read_lits(tmp_path, split="drawn").items} == {None}


def test_the_split_of_the_vdt_authors():
    assert (len(VDT_VAL), len(VDT_TEST), len(set(range(131)) - VDT_VAL - VDT_TEST)) == (13, 13, 105)
    assert len(IRCADB_CASES) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case,x,y\n1,1,1\n", "line 2"),
        ("case,x,y,z\n1,1,1,0\n", "line 2"),
        ("case,x,y,z\n1,1,1,nan\n", "line 2"),
        ("case,x,y,z\n1,1,1,1\n1,1,1,2\n", "line 3"),
        ("case,x,y,z\n1,1,1\n", "line 2"),
        ("case,x,y,z\none,1,1,1\n", "line 2"),
    ],
)
def test_a_broken_table_names_the_line(tmp_path: Path, content: str, message: str):
    write(tmp_path, 5)
    (tmp_path / "spacings.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_lits(tmp_path, spacings=tmp_path / "spacings.csv")
    with pytest.raises(DataError, match="No such file"):
        read_lits(tmp_path, spacings=tmp_path / "none.csv")


def test_an_empty_folder_is_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"no volume-N\.nii"):
        read_lits(tmp_path)


def test_prepared(tmp_path: Path):
    for case in (0, 1, 2):
        write(tmp_path / "raw", case)
    result = prepare(read_lits(tmp_path / "raw"), tmp_path / "out", id_key=ID_KEY, runner="local")
    assert {split: counts["boxes"] for split, counts in result.counts.items()} == {"train": 3, "val": 3, "test": 3}
    entry = open_shards(tmp_path / "out").entries[0]
    assert entry.boxes_per_row == (0, 1, 1, 0, 1, 0)
