"""Corrections of a stack that was asked to be corrected: tilt, uneven spacing; and what hangs on them."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pydicom import Dataset

from mp3d.config import GeometryPolicy, ServeConfig
from mp3d.data.dicom import StoredSlice, group_series, load_volume
from mp3d.data.dicom_folder import read_dicom
from mp3d.data.geometry import MAX_RESAMPLED_GAP_MM
from mp3d.data.series import AIR_HU, CTSeries, Volume
from mp3d.errors import Refusal
from mp3d.predict import Predictor
from mp3d.serving.engine import Engine, read_series
from mp3d.serving.schema import ModelOut, Rejected
from tests.dicom_files import ct_slices, enhanced, made_volume, structure_set, to_bytes, to_files
from tests.serving_world import BrightBoxes, tiny_config, zip_of
from tests.test_rtstruct import outline

SHEAR = GeometryPolicy(tilt="shear")
RESAMPLE = GeometryPolicy(uneven="resample")


def tilted(volume: Volume, rows_per_slice: float) -> list[Dataset]:
    """Slices of a straight volume as a tilted gantry takes them: each begins so many rows further down."""
    slices = ct_slices(volume)
    for z, ds in enumerate(slices):
        place = (volume.affine @ [0, z * rows_per_slice, z, 1])[:3]
        ds.ImagePositionPatient = [f"{value:.8g}" for value in place]
    return slices


def load(slices: list[Dataset], policy: GeometryPolicy) -> tuple[Volume, tuple[StoredSlice, ...], tuple[str, ...]]:
    (series,) = group_series(to_files(slices), policy).series
    return load_volume(series, policy)


def moved(num_slices: int, distances: list[float]) -> list[Dataset]:
    slices = ct_slices(made_volume(shape=(num_slices, 5, 7)))
    for ds, distance in zip(slices, distances, strict=True):
        ds.ImagePositionPatient = ["-31.25", "17.5", f"{-204.5 + distance:.6g}"]
    return slices


class TestTilt:
    @pytest.mark.parametrize("rows", [1, -1, 2])
    def test_whole_rows_come_back_exactly(self, rows: int) -> None:
        source = made_volume(shape=(6, 9, 7), spacing_mm=(2.5, 0.8, 0.6))
        volume, stored, warnings = load(tilted(source, rows), SHEAR)
        assert warnings == ("TILT_CORRECTED",)
        assert volume.hu.shape == (6, 9 + 5 * abs(rows), 7)
        for z in range(6):
            first = z * rows - min(0, 5 * rows)
            assert stored[z].row_offset == pytest.approx(first, abs=1e-6)
            np.testing.assert_array_equal(volume.hu[z, first : first + 9], source.hu[z])
            outside = np.delete(volume.hu[z], np.s_[first : first + 9], axis=0)
            assert (outside == AIR_HU).all()
        expected = source.affine.copy()
        expected[:3, 3] = (source.affine @ [0, min(0, 5 * rows), 0, 1])[:3]
        np.testing.assert_allclose(volume.affine, expected, rtol=0, atol=1e-4)

    def test_padding_outside_the_field_of_view_is_not_mixed_in(self) -> None:
        source = made_volume(shape=(6, 9, 7))
        source.hu[:, :4] = -3024
        source.hu[:, 4:] = 100
        volume, _, _ = load(tilted(source, 0.5), SHEAR)
        assert set(np.unique(volume.hu)) == {-1024, -462, 100}

    def test_structure_sets_lie_right_on_the_corrected_stack(self, tmp_path: Path) -> None:
        source = made_volume(shape=(6, 12, 14))
        region = [outline(source, 2, 3.5, 1.5 + 2, 6.5, 5.5 + 2)]  # in the patient; slice 2 begins 2 rows further down
        files = to_files(tilted(source, 1)) | {"rs.dcm": to_bytes(structure_set([region], ["GTV"]))}
        for name, file in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(file)
        (item,) = read_dicom(tmp_path, tilt="shear").items
        series = item.load()
        assert isinstance(series, CTSeries)
        box = series.truths[2].boxes
        assert box is not None
        assert box.tolist() == [[4, 4, 7, 8]]
        np.testing.assert_array_equal(series.volume.hu[2, 4:8, 4:7], source.hu[2, 2:6, 4:7])
        assert read_dicom(tmp_path).options != read_dicom(tmp_path, tilt="shear").options
        with pytest.raises(Refusal, match="GANTRY_TILT"):
            read_dicom(tmp_path).items[0].load()

    @pytest.mark.parametrize(("along", "degrees"), [(0, 15), (1, 40)])
    def test_a_shear_that_no_gantry_makes(self, along: int, degrees: float) -> None:
        slices = ct_slices(made_volume(shape=(20, 3, 4)))
        for z, ds in enumerate(slices):
            ds.ImagePositionPatient[along] += z * 2.5 * np.tan(np.radians(degrees))
        with pytest.raises(Refusal, match="GANTRY_TILT.* no gantry tilt"):
            load(slices, SHEAR)

    def test_a_finding_is_told_on_the_image_that_was_sent(self, tmp_path: Path) -> None:
        source = made_volume(shape=(6, 32, 40))
        source.hu[:] = -1000
        source.hu[3, 5, 9] = 800
        slices = tilted(source, -1)
        for name, file in to_files(slices).items():
            (tmp_path / "CT").mkdir(exist_ok=True)
            (tmp_path / "CT" / Path(name).name).write_bytes(file)
        model = ModelOut(name="bright", digest="d", config_hash="c", epoch=1, score=0.5, num_classes=1)
        predictor = Predictor(BrightBoxes(), tiny_config().clip, 0.5, torch.device("cpu"))
        engine = Engine(predictor, model, ServeConfig(checkpoint="none", tilt="shear"))
        answer = engine.answer(zip_of(tmp_path / "CT"))
        (found,) = answer.findings
        assert answer.warnings == ("TILT_CORRECTED",)
        assert found.box_px == pytest.approx((9, 5, 10, 6), abs=1e-6)
        assert found.sop_instance_uid == slices[3].SOPInstanceUID
        place = (source.affine @ [9, 5 - 3, 3, 1])[:3]
        assert found.centre_lps_mm == pytest.approx(place, abs=1e-3)


class TestUnevenSpacing:
    def test_is_interpolated_to_the_median_spacing(self) -> None:
        slices = moved(6, [0, 2, 4, 5, 7, 9])
        volume, stored, warnings = load(slices, RESAMPLE)
        source = made_volume().hu.astype(float)
        assert warnings == ("UNEVEN_RESAMPLED",)
        assert volume.spacing_mm[0] == pytest.approx(2)
        assert volume.affine[:3, 3] == pytest.approx([-31.25, 17.5, -204.5])
        expected = np.stack([source[0], source[1], source[2], source[3:5].mean(axis=0), source[4:6].mean(axis=0)])
        np.testing.assert_allclose(volume.hu, expected, rtol=0, atol=0.5)
        assert [origin.sop_instance_uid[-1] for origin in stored[:3]] == ["1", "2", "3"]

    def test_a_missing_slice_is_interpolated_and_two_are_not(self) -> None:
        volume, _, _ = load(moved(6, [0, 2, 6, 8, 10, 12]), RESAMPLE)
        source = made_volume().hu
        np.testing.assert_allclose(volume.hu[2], source[1:3].mean(axis=0), atol=0.5)
        assert len(volume.hu) == 7
        with pytest.raises(Refusal, match=r"UNEVEN_SPACING.*across 5\.000 mm at most"):
            load(moved(6, [0, 2, 8, 10, 12, 14]), RESAMPLE)
        step = MAX_RESAMPLED_GAP_MM * 0.6
        with pytest.raises(Refusal, match=r"UNEVEN_SPACING.*across 10\.000 mm at most"):
            load(moved(6, [0, step, 3 * step, 4 * step, 5 * step, 6 * step]), RESAMPLE)

    def test_the_endpoint_resamples_where_it_is_told_to(self) -> None:
        body = io.BytesIO()
        with zipfile.ZipFile(body, "w") as archive:
            for name, file in to_files(moved(6, [0, 2, 4, 5, 7, 9])).items():
                archive.writestr(name, file)
        with pytest.raises(Rejected, match="uneven = resample") as caught:
            read_series(body.getvalue(), ServeConfig(checkpoint="none"))
        assert caught.value.reason == "UNEVEN_SPACING"
        series = read_series(body.getvalue(), ServeConfig(checkpoint="none", uneven="resample"))
        assert (len(series.volume.hu), len(series.stored), series.warnings) == (5, 5, ("UNEVEN_RESAMPLED",))

    def test_even_series_are_left_as_they_are(self) -> None:
        volume, _, warnings = load(ct_slices(made_volume()), RESAMPLE)
        np.testing.assert_array_equal(volume.hu, made_volume().hu)
        assert warnings == ()

    def test_contours_on_uneven_slices_are_refused(self, tmp_path: Path) -> None:
        region = [outline(made_volume(), 0, 0.5, 0.5, 3.5, 3.5)]
        files = to_files(moved(6, [0, 2, 4, 5, 7, 9])) | {"canary/rs.dcm": to_bytes(structure_set([region], ["GTV"]))}
        (tmp_path / "canary").mkdir()
        for name, file in files.items():
            (tmp_path / name).write_bytes(file)
        with pytest.raises(Refusal, match="CONTOUR_OFF_PLANE"):
            read_dicom(tmp_path, uneven="resample").items[0].load()

    def test_stacks_of_two_spacings_are_two_series(self) -> None:
        slices = moved(8, [0, 2, 4, 6, 7, 12, 17, 22])
        for ds in slices[4:]:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "ADD"]
        listing = group_series(to_files(slices))
        assert sorted(load_volume(series)[0].spacing_mm[0] for series in listing.series) == pytest.approx([2, 5])
        assert {series.warnings for series in listing.series} == {("SPLIT_BY_SPACING",)}
        assert len(group_series(to_files(slices), RESAMPLE).series) == 1

    def test_a_gap_between_acquisitions_is_a_missing_slice(self) -> None:
        slices = moved(8, [0, 2, 4, 6, 10, 12, 14, 16])
        for ds in slices[4:]:
            ds.AcquisitionNumber = 2
        (series,) = group_series(to_files(slices)).series
        with pytest.raises(Refusal, match="MISSING_SLICE"):
            load_volume(series)


class TestPadding:
    def with_padding(self, bits: int, stored: int, signed: int) -> np.ndarray:
        slices = ct_slices(made_volume())
        for ds in slices:
            ds.PixelRepresentation = signed
            pixels = np.frombuffer(ds.PixelData, "<u2").reshape(5, 7).copy()
            pixels[0, :3] = stored & 0xFFFF
            ds.PixelData = pixels.tobytes()
            ds.add_new(0x00280120, "US", bits)
        volume, _, warnings = load(slices, GeometryPolicy())
        rest = volume.hu.copy()
        rest[:, 0, :3] = made_volume().hu[:, 0, :3]
        np.testing.assert_array_equal(rest, made_volume().hu)
        assert (warnings == ("PADDING_TO_AIR",)) == (volume.hu[0, 0, 0] == AIR_HU)
        return volume.hu[0, 0, :3]

    def test_bright_padding_becomes_air(self) -> None:
        assert self.with_padding(32767, 32767, signed=1).tolist() == [AIR_HU] * 3
        assert self.with_padding(65535, 65535, signed=0).tolist() == [AIR_HU] * 3

    def test_dark_padding_and_a_wrong_tag_change_nothing(self) -> None:
        assert self.with_padding(63536, -2000, signed=1).tolist() == [-3024] * 3
        assert self.with_padding(1064, 1064, signed=1).tolist() == [40] * 3  # a tag that names soft tissue


def test_an_enhanced_image_can_be_tilted_too() -> None:
    source = made_volume(shape=(6, 9, 7))
    (series,) = group_series({"one": to_bytes(enhanced(tilted(source, 1)))}).series
    volume, stored, warnings = load_volume(series, SHEAR)
    assert warnings == ("TILT_CORRECTED",)
    np.testing.assert_array_equal(volume.hu[2, 2:11], source.hu[2])
    assert [(origin.frame, round(origin.row_offset)) for origin in stored] == [(z + 1, z) for z in range(6)]
