"""DICOM to HU and geometry: right, or refused by name; never silently wrong."""

from copy import deepcopy

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import Dataset, uid

from mp3d.data.dicom import WARNINGS, StoredSlice, group_series, load_volume, read_header, read_hu
from mp3d.data.dicom.pixels import read_stored
from mp3d.data.series import Volume
from mp3d.errors import Refusal
from tests.dicom_files import ct_slices, made_volume, random_orientation, set_stored, to_bytes, to_files

SYNTAXES = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
)

LARGER = made_volume(shape=(4, 33, 37))
"""JPEG 2000 is written here from 32 x 32 pixels on."""


def load(slices: list[Dataset], seed: int = 0) -> tuple[Volume, tuple[StoredSlice, ...], tuple[str, ...]]:
    listing = group_series(to_files(slices, seed=seed))
    assert not listing.refused
    (series,) = listing.series
    volume, stored, warnings = load_volume(series)
    assert set(warnings) <= set(WARNINGS)
    return volume, stored, warnings


def refusal(slices: list[Dataset]) -> Refusal:
    """The one refusal of a series, at listing or loading; its text names nobody."""
    listing = group_series(to_files(slices))
    if listing.refused:
        ((_, refused),) = listing.refused
    else:
        with pytest.raises(Refusal) as caught:
            load_volume(*listing.series)
        refused = caught.value
    assert "canary" not in str(refused).lower()
    assert "1.2.826" not in str(refused)
    return refused


def check_equal(volume: Volume, truth: Volume) -> None:
    np.testing.assert_array_equal(volume.hu, truth.hu)
    np.testing.assert_allclose(volume.affine, truth.affine, rtol=0, atol=1e-4)


class TestGeometry:
    @pytest.mark.parametrize("seed", range(20))
    def test_any_orientation_and_file_order(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        truth = made_volume(
            shape=tuple(rng.integers(3, 9, 3)),
            spacing_mm=tuple(rng.uniform(0.3, 6, 3)),
            orientation=random_orientation(rng),
            origin=rng.uniform(-500, 500, 3),
            seed=seed,
        )
        slices = ct_slices(truth)
        volume, stored, _ = load(slices, seed)
        check_equal(volume, truth)
        assert stored == tuple(StoredSlice(ds.SOPInstanceUID) for ds in slices)
        assert np.linalg.det(volume.affine[:3, :3]) > 0

    def test_axial_order_is_ascending_in_z_whatever_the_instance_number(self) -> None:
        truth = made_volume()
        volume, _, warnings = load(ct_slices(truth))
        check_equal(volume, truth)
        assert volume.spacing_mm == pytest.approx((2.5, 0.8, 0.6))
        assert warnings == ()

    def test_slice_thickness_is_not_the_slice_spacing(self) -> None:
        slices = ct_slices(made_volume())
        for ds in slices:
            ds.SliceThickness = "5"
        assert load(slices)[0].spacing_mm[0] == pytest.approx(2.5)

    def test_jitter_within_tolerance(self) -> None:
        truth = made_volume(shape=(10, 4, 5))
        slices = ct_slices(truth)
        rng = np.random.default_rng(0)
        for ds in slices:
            ds.ImagePositionPatient[2] += rng.uniform(-0.02, 0.02)
        volume, _, _ = load(slices)
        np.testing.assert_array_equal(volume.hu, truth.hu)
        centres = np.arange(10)[:, None] * (volume.affine - truth.affine)[:3, 2] + (volume.affine - truth.affine)[:3, 3]
        assert np.abs(centres).max() < 0.02

    def test_missing_slice_names_the_gap(self) -> None:
        slices = ct_slices(made_volume())
        del slices[3]
        refused = refusal(slices)
        assert refused.reason == "MISSING_SLICE"
        assert "slice 3 of 5 (instance 4)" in refused.detail
        assert "1 missing" in refused.detail

    def test_two_gaps_are_counted(self) -> None:
        slices = ct_slices(made_volume(shape=(12, 3, 4)))
        assert "3 missing" in refusal([ds for z, ds in enumerate(slices) if z not in (2, 6, 7)]).detail

    @pytest.mark.parametrize("shift", [0.06, 0.5, -0.9])
    def test_uneven_spacing(self, shift: float) -> None:
        slices = ct_slices(made_volume())
        slices[2].ImagePositionPatient[2] += shift
        assert refusal(slices).reason == "UNEVEN_SPACING"

    def test_drifting_spacing(self) -> None:
        slices = ct_slices(made_volume(shape=(60, 2, 3)))
        for z, ds in enumerate(slices):
            ds.ImagePositionPatient[2] += 0.0008 * z**2
        refused = refusal(slices)
        assert (refused.reason, "drifts" in refused.detail) == ("UNEVEN_SPACING", True)

    @pytest.mark.parametrize("degrees", [-20, 1, 15])
    def test_gantry_tilt(self, degrees: float) -> None:
        slices = ct_slices(made_volume(shape=(20, 3, 4)))
        for z, ds in enumerate(slices):
            ds.ImagePositionPatient[1] += z * 2.5 * np.tan(np.radians(degrees))
        refused = refusal(slices)
        assert refused.reason == "GANTRY_TILT"
        assert f"{abs(degrees):.1f} degrees" in refused.detail

    def test_tilted_but_perpendicular_is_no_shear(self) -> None:
        angle = np.radians(15)
        truth = made_volume(orientation=(1, 0, 0, 0, np.cos(angle), np.sin(angle)))
        slices = ct_slices(truth)
        for ds in slices:
            ds.GantryDetectorTilt = "15"
        volume, _, warnings = load(slices)
        check_equal(volume, truth)
        assert warnings == ()

    def test_tilt_tag_against_the_positions_is_reported(self) -> None:
        slices = ct_slices(made_volume())
        for ds in slices:
            ds.GantryDetectorTilt = "-12.5"
        assert load(slices)[2] == ("TILT_TAG_IGNORED",)

    def test_shifted_slice(self) -> None:
        slices = ct_slices(made_volume())
        slices[4].ImagePositionPatient[0] += 3
        refused = refusal(slices)
        assert refused.reason == "SHIFTED_SLICE"
        assert "slice 5 of 6" in refused.detail

    def test_coronal_stack_is_reported(self) -> None:
        truth = made_volume(orientation=(1, 0, 0, 0, 0, -1))
        volume, _, warnings = load(ct_slices(truth))
        check_equal(volume, truth)
        assert warnings == ("NOT_AXIAL",)

    def test_too_few_slices(self) -> None:
        assert refusal(ct_slices(made_volume())[:2]).reason == "TOO_FEW_SLICES"

    @pytest.mark.parametrize("spacing", [["NaN", "NaN"], ["-0.8", "0"], ["0.8", "inf"], ["12", "12"]])
    def test_bad_pixel_spacing(self, spacing: list[str]) -> None:
        files = to_files(ct_slices(made_volume()))
        ours = "\\".join(["0.8", "0.6"]).encode()
        bad = "\\".join(spacing).encode()
        # written past pydicom, which would not write such values
        files = {name: _with_value(file, b"\x28\x00\x30\x00DS", ours, bad) for name, file in files.items()}
        with pytest.raises(Refusal, match="BAD_SPACING") as caught:
            load_volume(*group_series(files).series)
        assert "instance" in caught.value.detail

    @pytest.mark.parametrize(
        ("keyword", "value", "reason"),
        [
            ("PixelSpacing", ["0.8", "0.7"], "MIXED_SPACING"),
            ("ImageOrientationPatient", ["1", "0", "0", "0", "0.9998", "0.02"], "MIXED_ORIENTATION"),
            ("ImageOrientationPatient", ["1", "0", "0", "1", "0", "0"], "BAD_GEOMETRY"),
            ("ImageOrientationPatient", ["2", "0", "0", "0", "2", "0"], "BAD_GEOMETRY"),
            ("ImageOrientationPatient", None, "MISSING_GEOMETRY"),
            ("ImagePositionPatient", None, "MISSING_GEOMETRY"),
            ("ImagePositionPatient", ["0", "0", "1E300"], "BAD_GEOMETRY"),
            ("ImageOrientationPatient", ["1E300", "0", "0", "0", "1", "0"], "BAD_GEOMETRY"),
            ("PixelSpacing", None, "MISSING_GEOMETRY"),
        ],
    )
    def test_one_slice_differs(self, keyword: str, value: list[str] | None, reason: str) -> None:
        slices = ct_slices(made_volume())
        setattr(slices[3], keyword, value)
        refused = refusal(slices)
        assert refused.reason == reason
        assert "instance" in refused.detail

    def test_one_slice_of_another_size(self) -> None:
        slices = ct_slices(made_volume())
        slices[3].Rows, slices[3].Columns = 7, 5
        assert refusal(slices).reason == "MIXED_SIZE"

    def test_agrees_with_simpleitk_where_that_is_right(self, tmp_path) -> None:
        truth = made_volume(orientation=random_orientation(np.random.default_rng(3)))
        names = []
        for z, file in enumerate(to_files(ct_slices(truth)).values()):  # SimpleITK wants them in order
            names.append(str(tmp_path / f"{z}.dcm"))
            (tmp_path / f"{z}.dcm").write_bytes(file)
        image = sitk.ReadImage(names)
        volume, _, _ = load_volume(*group_series(tmp_path).series)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume.hu)
        point = image.TransformIndexToPhysicalPoint([2, 3, 4])
        np.testing.assert_allclose(point, (volume.affine @ [2, 3, 4, 1])[:3], atol=1e-3)


class TestDuplicates:
    def test_equal_pixels_are_dropped(self) -> None:
        truth = made_volume()
        slices = ct_slices(truth)
        twin = deepcopy(slices[2])
        twin.SOPInstanceUID = slices[2].SOPInstanceUID + ".9"
        volume, uids, warnings = load([*slices, twin])
        check_equal(volume, truth)
        assert len(uids) == 6
        assert warnings == ("DUPLICATE_DROPPED",)

    def test_different_pixels_are_refused(self) -> None:
        slices = ct_slices(made_volume())
        twin = deepcopy(slices[2])
        twin.SOPInstanceUID = slices[2].SOPInstanceUID + ".9"
        set_stored(twin, np.zeros((5, 7)))
        assert refusal([*slices, twin]).reason == "DUPLICATE_SLICE"

    @pytest.mark.parametrize(
        ("keyword", "value"),
        [("AcquisitionNumber", 2), ("ConvolutionKernel", "B70f"), ("ImageType", ["DERIVED", "PRIMARY", "AXIAL"])],
    )
    def test_phases_under_one_uid_are_split(self, keyword: str, value: object) -> None:
        first, second = made_volume(seed=1), made_volume(seed=2)
        slices = ct_slices(first)
        for ds in ct_slices(second):
            ds.SOPInstanceUID += ".2"
            setattr(ds, keyword, value)
            slices.append(ds)
        listing = group_series(to_files(slices))
        volumes = [load_volume(series)[0] for series in listing.series]
        assert {volume.hu.tobytes() for volume in volumes} == {first.hu.tobytes(), second.hu.tobytes()}
        assert len({series.series for series in listing.series}) == 2
        assert all(series.warnings == ("SPLIT_BY_ACQUISITION",) for series in listing.series)

    def test_phases_in_two_kernels_are_four(self) -> None:
        slices = []
        for seed, (phase, kernel) in enumerate([(1, "B30f"), (1, "B70f"), (2, "B30f"), (2, "B70f")]):
            for ds in ct_slices(made_volume(seed=seed)):
                ds.SOPInstanceUID += f".{seed}"
                ds.AcquisitionNumber, ds.ConvolutionKernel = phase, kernel
                slices.append(ds)
        volumes = [load_volume(series)[0] for series in group_series(to_files(slices)).series]
        assert {volume.hu.tobytes() for volume in volumes} == {made_volume(seed=n).hu.tobytes() for n in range(4)}

    def test_acquisition_numbers_alone_do_not_split(self) -> None:
        truth = made_volume()
        slices = ct_slices(truth)
        for z, ds in enumerate(slices):
            ds.AcquisitionNumber = 1 + z // 2
        check_equal(load(slices)[0], truth)


class TestHounsfieldUnits:
    @pytest.mark.parametrize("fractional_first", [True, False])
    def test_slope_and_intercept_of_each_slice(self, fractional_first: bool) -> None:
        truth = made_volume()
        slices = ct_slices(truth)
        exact = np.empty(truth.hu.shape)
        for z, ds in enumerate(slices):
            slope, intercept = (0.377, -1000.5 + z) if (z == 0) == fractional_first else (1.0, -1024.0)
            stored = np.rint((truth.hu[z] - intercept) / slope)
            set_stored(ds, stored)
            ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
            exact[z] = slope * stored + intercept
        volume, _, _ = load(slices)
        assert np.abs(volume.hu - exact).max() <= 0.5 + 1e-3

    def test_monochrome1_changes_nothing(self) -> None:
        truth = made_volume()
        slices = ct_slices(truth)
        for ds in slices:
            ds.PhotometricInterpretation = "MONOCHROME1"
        check_equal(load(slices)[0], truth)

    @pytest.mark.parametrize(
        ("keyword", "value", "reason"),
        [
            ("RescaleSlope", None, "MISSING_RESCALE"),
            ("RescaleIntercept", None, "MISSING_RESCALE"),
            ("RescaleSlope", "0", "BAD_RESCALE"),
            ("RescaleSlope", "1E-30", "BAD_RESCALE"),
            ("RescaleIntercept", "1E30", "BAD_RESCALE"),
            ("RescaleType", "Z_EFF", "NOT_HU"),
        ],
    )
    def test_no_hounsfield_units(self, keyword: str, value: str | None, reason: str) -> None:
        slices = ct_slices(made_volume())
        setattr(slices[2], keyword, value)
        refused = refusal(slices)
        assert (refused.reason, "instance 4" in refused.detail) == (reason, True)

    def test_values_beyond_int16_are_clipped(self) -> None:
        slices = ct_slices(made_volume())
        for ds in slices:
            ds.PixelRepresentation, ds.RescaleIntercept = 0, "0"
            set_stored(ds, np.full((5, 7), 65535))
        assert (load(slices)[0].hu == 32767).all()

    @pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
    @pytest.mark.parametrize(("bits", "signed"), [(16, 1), (16, 0), (12, 0), (13, 1)])
    def test_transfer_syntaxes_agree(self, syntax: uid.UID, bits: int, signed: int) -> None:
        rng = np.random.default_rng(bits)
        low = -(2 ** (bits - 1)) if signed else 0
        stored = rng.integers(low, low + 2**bits, (33, 47))
        ds = ct_slices(made_volume())[0]
        ds.Rows, ds.Columns = stored.shape
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, signed
        set_stored(ds, stored)
        header = read_header(to_bytes(ds, syntax))
        np.testing.assert_array_equal(read_stored(header), stored)
        expected = np.clip(stored - 1024, -32768, 32767)
        np.testing.assert_array_equal(read_hu(header), expected)

    def test_bits_above_the_stored_ones_do_not_count(self) -> None:
        stored = np.arange(35).reshape(5, 7) * 100
        ds = ct_slices(made_volume())[0]
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
        set_stored(ds, stored | 0xA000)
        np.testing.assert_array_equal(read_stored(read_header(to_bytes(ds))), stored)

    def test_jpeg2000_with_the_other_sign_than_the_header(self) -> None:
        """Seen in files of old archives: signed values coded as unsigned."""
        stored = np.arange(-35 * 18, 35 * 18).reshape(35, 36) * 6
        ds = ct_slices(made_volume())[0]
        ds.Rows, ds.Columns = stored.shape
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 13, 12, 0
        set_stored(ds, stored & 0x1FFF)
        file = to_bytes(ds, uid.JPEG2000Lossless)
        signed = _with_value(file, b"\x28\x00\x03\x01US", b"\x00\x00", b"\x01\x00")
        np.testing.assert_array_equal(read_stored(read_header(signed)), stored)

    def test_a_file_without_preamble(self) -> None:
        ds = ct_slices(made_volume())[0]
        for syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian):
            file = to_bytes(ds, syntax)
            bare = file[file.index(b"\x00\x08\x00\x08" if "Big" in syntax.name else b"\x08\x00\x08\x00", 132) :]
            np.testing.assert_array_equal(read_hu(read_header(bare)), made_volume().hu[0])


def _with_value(file: bytes, element: bytes, old: bytes, new: bytes) -> bytes:
    """Replace the value of a short explicit little-endian element."""
    at = file.index(element) + len(element)
    length = int.from_bytes(file[at : at + 2], "little")
    assert file[at + 2 : at + 2 + length].rstrip() == old
    new += b" " * (len(new) % 2)
    return file[:at] + len(new).to_bytes(2, "little") + new + file[at + 2 + length :]
