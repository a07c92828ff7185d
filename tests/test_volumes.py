"""Volumes and masks in any orientation, and what is wrong with NIfTI files; other formats have tests of their own."""

import gzip
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mp3d.data.series import CTSeries, Volume
from mp3d.data.volumes import load_image, read_volumes
from mp3d.errors import ConfigError, DataError, Refusal
from tests.dicom_files import made_volume, random_orientation

VOLUME = made_volume(shape=(5, 6, 9))


def image_of(array: np.ndarray, affine: np.ndarray = VOLUME.affine) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def write_case(folder: Path, image: sitk.Image, mask: sitk.Image | None = None, codes: str = "LPS") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.DICOMOrient(image, codes), folder / "CT_image.nii.gz")
    if mask is not None:
        sitk.WriteImage(sitk.DICOMOrient(mask, codes), folder / "CT_mask.nii.gz")
    return folder / "CT_image.nii.gz"


def patched(path: Path, offset: int, values: bytes) -> Path:
    """Change bytes of the NIfTI-1 header."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[offset : offset + len(values)] = values
    path.write_bytes(gzip.compress(bytes(data)))
    return path


def load(root: Path, **options) -> CTSeries:
    source = read_volumes(root, **options)
    assert source.refused == ()
    (item,) = source.items
    series = item.load()
    assert isinstance(series, CTSeries)
    return series


def lesions() -> np.ndarray:
    mask = np.zeros(VOLUME.hu.shape, np.uint8)
    mask[1, 1:4, 2:7] = 1
    mask[3, 0:2, 0:3] = 2
    return mask


CODES = [
    "".join(letters) for axes in itertools.permutations(("LR", "PA", "SI")) for letters in itertools.product(*axes)
]


@pytest.mark.parametrize("codes", CODES[::5])
def test_any_axis_codes_give_the_same_volume_and_mask(tmp_path: Path, codes: str) -> None:
    write_case(tmp_path / "p1", image_of(VOLUME.hu), image_of(lesions()), codes)
    series = load(tmp_path, class_names=("a", "b"))
    np.testing.assert_array_equal(series.volume.hu, VOLUME.hu)
    np.testing.assert_allclose(series.volume.affine, VOLUME.affine, atol=1e-4)
    np.testing.assert_array_equal([truth.mask for truth in series.truths], lesions())
    boxes = [[] if truth.boxes is None else truth.boxes.tolist() for truth in series.truths]
    assert boxes == [[], [[2, 1, 7, 4]], [], [[0, 0, 3, 2]], []]
    labels = [truth.labels.tolist() for truth in series.truths if truth.labels is not None]
    assert labels == [[], [1], [], [2], []]
    assert series.patient == "p1"


def test_oblique_orientation_stays_in_the_affine(tmp_path: Path) -> None:
    a = 0.2
    oblique = made_volume(shape=(5, 6, 9), orientation=(np.cos(a), np.sin(a), 0, -np.sin(a), np.cos(a), 0))
    volume, _ = load_image(write_case(tmp_path, image_of(oblique.hu, oblique.affine), codes="SAR"))
    np.testing.assert_array_equal(volume.hu, oblique.hu)
    np.testing.assert_allclose(volume.affine, oblique.affine, atol=1e-4)


def test_fractions_are_rounded_and_extremes_clipped(tmp_path: Path) -> None:
    values = VOLUME.hu.astype(np.float32)
    values[0, 0, :4] = [-1000.4, 39.6, 1e6, -1e6]
    volume, warnings = load_image(write_case(tmp_path, image_of(values)))
    assert volume.hu[0, 0, :4].tolist() == [-1000, 40, 32767, -32768]
    assert warnings == ("HU_CLIPPED",)


def test_scale_slope_of_the_header(tmp_path: Path) -> None:
    path = patched(write_case(tmp_path, image_of(VOLUME.hu)), 112, struct.pack("<2f", 2.0, -5.0))
    np.testing.assert_array_equal(load_image(path)[0].hu, 2 * VOLUME.hu.astype(int) - 5)


def test_without_masks_nobody_looked(tmp_path: Path) -> None:
    write_case(tmp_path / "p1", image_of(VOLUME.hu))
    assert all(truth.boxes is truth.mask is None for truth in load(tmp_path, mask=None).truths)


def test_folders_without_exactly_one_pair_are_refused(tmp_path: Path) -> None:
    write_case(tmp_path / "no_mask", image_of(VOLUME.hu))
    write_case(tmp_path / "two_images", image_of(VOLUME.hu), image_of(lesions()))
    sitk.WriteImage(image_of(VOLUME.hu), tmp_path / "two_images" / "CT_image2.nii.gz")
    source = read_volumes(tmp_path, image="CT_image*.nii.gz")
    assert source.items == ()
    assert [(key, refusal.reason) for key, refusal in source.refused] == [
        ("no_mask/CT_image.nii.gz", "MISSING_MASK"),
        ("two_images/CT_image.nii.gz", "MISSING_MASK"),
        ("two_images/CT_image2.nii.gz", "MISSING_MASK"),
    ]


def test_a_patient_with_two_studies_is_one(tmp_path: Path) -> None:
    for number in (1, 2):
        write_case(tmp_path / "a" / f"study{number}", image_of(VOLUME.hu), image_of(lesions()))
    write_case(tmp_path / "b" / "study1" / "CT", image_of(VOLUME.hu), image_of(lesions()))
    with pytest.raises(ConfigError, match="lie 2 to 3 folders below the root.*--patient-level"):
        read_volumes(tmp_path)
    assert [item.patient for item in read_volumes(tmp_path / "b").items] == ["CT"]  # the only one there
    source = read_volumes(tmp_path, patient_level=1, class_names=("a", "b"))
    assert [item.patient for item in source.items] == ["a", "a", "b"]
    loaded = [item.load() for item in source.items]
    assert [(series.patient, series.study) for series in loaded if isinstance(series, CTSeries)] == [
        ("a", "a/study1"),
        ("a", "a/study2"),
        ("b", "b/study1/CT"),
    ]
    assert [item.patient for item in read_volumes(tmp_path, patient_level=2).items] == ["study1", "study2", "study1"]
    for level in (0, -1, 3):
        with pytest.raises(ConfigError, match=f"patient_level is {level}, .* it must be 1 to 2"):
            read_volumes(tmp_path, patient_level=level)


@pytest.mark.parametrize(("names", "patients"), [("{}/CT", "ab"), ("nifti/{}", "ab"), ("nifti/{}/CT", "ab")])
def test_the_only_level_on_which_folders_differ_names_the_patient(tmp_path: Path, names: str, patients: str) -> None:
    for patient in patients:
        folder = tmp_path / names.format(patient)
        folder.mkdir(parents=True)
        (folder / "CT_image.nii.gz").touch()
        (folder / "CT_mask.nii.gz").touch()
    assert [item.patient for item in read_volumes(tmp_path).items] == [*patients]


def test_a_folder_for_each_patient_needs_no_level(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_case(tmp_path / name, image_of(VOLUME.hu), image_of(lesions()))
    assert [item.patient for item in read_volumes(tmp_path).items] == ["a", "b"]
    assert [item.patient for item in read_volumes(tmp_path, patient_level=1).items] == ["a", "b"]
    assert [item.patient for item in read_volumes(tmp_path / "a").items] == ["a"]
    with pytest.raises(ConfigError, match="patient_level is 1, and the images lie 0 folders below.*leave it out"):
        read_volumes(tmp_path / "a", patient_level=1)


def test_no_image_is_told_with_the_names_looked_for(tmp_path: Path) -> None:
    sitk.WriteImage(image_of(VOLUME.hu), tmp_path / "scan.nii.gz")
    with pytest.raises(DataError, match=r"'CT_image\.nii\.gz'; .*--image, .*'CT_mask\.nii\.gz'.*--mask"):
        read_volumes(tmp_path)


def refused(path: Path) -> str:
    with pytest.raises(Refusal) as caught:
        load_image(path)
    return caught.value.reason


@pytest.mark.parametrize(
    ("offset", "values", "reason"),
    [
        (252, struct.pack("<2h", 0, 0), "UNKNOWN_ORIENTATION"),  # qform_code, sform_code
        (40, struct.pack("<5h", 4, 9, 6, 1, 5), "NOT_3D"),  # dim
        (40, struct.pack("<4h", 3, 30000, 30000, 30000), "TOO_LARGE"),
        (40, struct.pack("<4h", 3, 9, 6, 4000), "BAD_IMAGE"),
        (70, struct.pack("<h", 128), "NOT_3D"),  # datatype: RGB
        (108, struct.pack("<f", 1e9), "BAD_IMAGE"),  # vox_offset
        (123, b"\x07", "BAD_IMAGE"),  # xyzt_units
        (70, struct.pack("<h", 999), "NOT_3D"),  # no datatype
        (70, struct.pack("<h", 1536), "NOT_3D"),  # 128-bit floats, which not every machine has
        (112, struct.pack("<2f", 1, np.nan), "BAD_IMAGE"),  # scl_slope, scl_inter
        (254, struct.pack("<h3f", 0, 1, 1, 1), "BAD_IMAGE"),  # sform_code; a quaternion longer than 1
        (0, bytes(348), "BAD_IMAGE"),
    ],
)
def test_bad_headers(tmp_path: Path, offset: int, values: bytes, reason: str) -> None:
    assert refused(patched(write_case(tmp_path, image_of(VOLUME.hu)), offset, values)) == reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_affine(tmp_path: Path, value: float) -> None:
    path = write_case(tmp_path, image_of(VOLUME.hu))
    assert refused(patched(path, 280, struct.pack("<12f", *[value] * 12))) in {"BAD_IMAGE", "BAD_SPACING"}


def test_sheared_axes_are_refused(tmp_path: Path) -> None:
    path = write_case(tmp_path, image_of(VOLUME.hu))
    patched(path, 252, struct.pack("<2h", 0, 1))
    rows = [-0.6, 0, 0, 31.25, 0, -0.8, 0.9, -17.5, 0, 0, 2.5, -204.5]
    assert refused(patched(path, 280, struct.pack("<12f", *rows))) == "BAD_IMAGE"


def test_qform_alone(tmp_path: Path) -> None:
    """SimpleITK writes both; an oblique and mirrored grid needs the whole quaternion and its sign."""
    affine = made_volume(orientation=random_orientation(np.random.default_rng(4))).affine @ np.diag([1, 1, -1, 1])
    path = tmp_path / "CT_image.nii.gz"
    sitk.WriteImage(image_of(VOLUME.hu, affine), path)
    both, _ = load_image(path)
    patched(path, 254, struct.pack("<h", 0))
    patched(path, 280, bytes(48))
    qform, _ = load_image(path)
    np.testing.assert_array_equal(qform.hu, both.hu)
    np.testing.assert_allclose(qform.affine, both.affine, atol=1e-4)
    assert np.linalg.det(both.affine) > 0


@pytest.mark.parametrize("width", [0, -0.6])
def test_a_voxel_size_is_not_mended(tmp_path: Path, width: float) -> None:
    path = patched(write_case(tmp_path, image_of(VOLUME.hu)), 254, struct.pack("<h", 0))
    assert refused(patched(path, 80, struct.pack("<f", width))) == "BAD_IMAGE"


def test_a_qfac_of_0_is_1(tmp_path: Path) -> None:
    path = patched(write_case(tmp_path, image_of(VOLUME.hu)), 254, struct.pack("<h", 0))
    expected, _ = load_image(path)
    volume, _ = load_image(patched(path, 76, struct.pack("<f", 0)))
    np.testing.assert_array_equal(volume.affine, expected.affine)


@pytest.mark.parametrize("order", "<>")
def test_nifti_2_in_both_byte_orders(tmp_path: Path, order: str) -> None:
    header = bytearray(540)
    struct.pack_into(f"{order}i4s4xhh8q", header, 0, 540, b"n+2", 4, 16, 3, 9, 6, 5, 1, 1, 1, 1)
    struct.pack_into(f"{order}q", header, 168, 544)
    struct.pack_into(f"{order}2i", header, 344, 0, 1)
    ras = np.diag([-1, -1, 1, 1]) @ VOLUME.affine / np.array([[1000.0], [1000], [1000], [1]])
    struct.pack_into(f"{order}12d", header, 400, *ras[:3].ravel())
    struct.pack_into(f"{order}i", header, 500, 1)  # metres
    path = tmp_path / "CT_image.nii"
    path.write_bytes(bytes(header) + bytes(4) + VOLUME.hu.astype(f"{order}i2").tobytes())
    volume, _ = load_image(path)
    np.testing.assert_array_equal(volume.hu, VOLUME.hu)
    np.testing.assert_allclose(volume.affine, VOLUME.affine, atol=1e-9)


def test_a_flipped_bit_in_the_packed_voxels(tmp_path: Path) -> None:
    path = write_case(tmp_path, image_of(VOLUME.hu))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert refused(path) == "BAD_IMAGE"


def test_the_checksum_behind_the_packed_voxels(tmp_path: Path) -> None:
    path = write_case(tmp_path, image_of(VOLUME.hu))
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # of the CRC: all voxels are there
    path.write_bytes(data)
    assert refused(path) == "BAD_IMAGE"
    path.write_bytes(data[:-8])
    assert refused(path) == "BAD_IMAGE"


def test_a_file_that_goes_on_behind_its_voxels(tmp_path: Path) -> None:
    path = write_case(tmp_path, image_of(VOLUME.hu))
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data + bytes(1000)))
    np.testing.assert_array_equal(load_image(path)[0].hu, VOLUME.hu)
    path.write_bytes(gzip.compress(data + bytes(2**21)))
    assert refused(path) == "BAD_IMAGE"


def test_a_fourth_axis_of_one_is_no_matter(tmp_path: Path) -> None:
    path = patched(write_case(tmp_path, image_of(VOLUME.hu)), 40, struct.pack("<5h", 4, 9, 6, 5, 1))
    np.testing.assert_array_equal(load_image(path)[0].hu, VOLUME.hu)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    values = VOLUME.hu.astype(np.float32)
    values[0, 0, 0] = np.nan
    assert refused(write_case(tmp_path, image_of(values))) == "BAD_IMAGE"


@pytest.mark.parametrize("width", [1, 9.5])
def test_normalised_values_are_no_hu(tmp_path: Path, width: float) -> None:
    values = (VOLUME.hu - VOLUME.hu.min()) / np.float32(np.ptp(VOLUME.hu)) * width - 1
    assert refused(write_case(tmp_path / "float", image_of(values.astype(np.float32)))) == "NOT_HU"
    whole = np.arange(VOLUME.hu.size, dtype=np.int16).reshape(VOLUME.hu.shape)
    scaled = patched(write_case(tmp_path / "scaled", image_of(whole)), 112, struct.pack("<2f", 1 / VOLUME.hu.size, 0))
    assert refused(scaled) == "NOT_HU"


def test_a_small_range_of_whole_numbers_may_be_hu(tmp_path: Path) -> None:
    load_image(write_case(tmp_path, image_of(np.full_like(VOLUME.hu, -1000))))


def test_spacing_and_number_of_slices(tmp_path: Path) -> None:
    wide = Volume(VOLUME.hu, VOLUME.affine @ np.diag([20, 20, 1, 1]))
    assert refused(write_case(tmp_path, image_of(wide.hu, wide.affine))) == "BAD_SPACING"
    assert refused(write_case(tmp_path, image_of(VOLUME.hu[:2]))) == "TOO_FEW_SLICES"
    with pytest.raises(Refusal, match="the image has 1 slice, at least"):
        load_image(write_case(tmp_path, image_of(VOLUME.hu[:1])))


def test_damaged_file(tmp_path: Path) -> None:
    path = write_case(tmp_path, image_of(VOLUME.hu))
    path.write_bytes(path.read_bytes()[:-60])
    assert refused(path) == "BAD_IMAGE"
    path.write_bytes(b"no image")
    assert refused(path) == "BAD_IMAGE"


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (image_of(lesions()[:, :, :-1]), "MASK_MISMATCH"),
        (image_of(lesions(), made_volume(origin=(-31.25, 17.5, -200)).affine), "MASK_MISMATCH"),
        (image_of(lesions(), made_volume(spacing_mm=(2.5, 0.8, 0.61)).affine), "MASK_MISMATCH"),
        (image_of(lesions()), "BAD_LABELS"),  # holds 2, and there is one class
        (image_of(lesions() * np.float32(0.5)), "BAD_LABELS"),
    ],
)
def test_bad_masks(tmp_path: Path, mask: sitk.Image, reason: str) -> None:
    write_case(tmp_path / "p1", image_of(VOLUME.hu), mask)
    (item,) = read_volumes(tmp_path).items
    with pytest.raises(Refusal) as caught:
        item.load()
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        ((0, 255), "holds 255 for its one class; write 1 instead of 255"),
        ((0, 0.5), "holds 0.5 for its one class; write 1 instead of 0.5"),
        ((1, 255), "holds 255, but its one class is 1; name its classes"),
        ((0, np.nan), "holds nan, but its one class is 1; name its classes"),
    ],
)
def test_a_mask_of_one_class_with_another_value(tmp_path: Path, values: tuple[float, float], detail: str) -> None:
    mask = np.where(lesions() > 0, values[1], values[0]).astype(np.float32)
    write_case(tmp_path / "p1", image_of(VOLUME.hu), image_of(mask))
    with pytest.raises(Refusal, match=detail):
        read_volumes(tmp_path).items[0].load()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image is empty"):
        read_volumes(tmp_path, image="")
    with pytest.raises(ConfigError, match="0 class names"):
        read_volumes(tmp_path, class_names=())
