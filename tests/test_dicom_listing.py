"""Which files make a series: localizers, other images, companions, and what is broken."""

import tracemalloc
import zlib
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
from pydicom import Dataset, uid
from pydicom.encaps import encapsulate

from mp3d.data.dicom import Listing, group_series, load_volume, read_header, read_hu
from mp3d.data.dicom.inflate import MAX_INFLATED_BYTES
from mp3d.errors import Refusal
from tests.dicom_files import ct_slices, dcmread_bytes, made_volume, rewritten, set_stored, to_bytes, to_files
from tests.test_dicom import LARGER, check_equal, load, refusal


class TestLocalizers:
    def test_dropped_by_image_type(self) -> None:
        truth = made_volume()
        slices = ct_slices(truth)
        scout = deepcopy(slices[0])
        scout.SOPInstanceUID += ".9"
        scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        scout.ImagePositionPatient = ["0", "0", "0"]
        volume, _, warnings = load([scout, *slices])
        check_equal(volume, truth)
        assert warnings == ("LOCALIZER_DROPPED",)

    def test_dropped_by_orientation_and_size(self) -> None:
        truth = made_volume()
        slices = ct_slices(truth)
        scout = ct_slices(made_volume(shape=(1, 9, 3), orientation=(0, 1, 0, 0, 0, -1)))[0]
        scout.SOPInstanceUID += ".9"
        volume, _, warnings = load([*slices, scout])
        check_equal(volume, truth)
        assert warnings == ("LOCALIZER_DROPPED",)

    def test_nothing_else(self) -> None:
        slices = ct_slices(made_volume())
        for ds in slices:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        assert refusal(slices).reason == "LOCALIZER_ONLY"

    @pytest.mark.parametrize("value", ["MIP", "PROJECTION IMAGE", "SCREEN SAVE"])
    def test_projections_are_dropped(self, value: str) -> None:
        truth = made_volume()
        slices = ct_slices(truth)
        for z in (1, 4):
            projection = deepcopy(slices[z])
            projection.SOPInstanceUID += ".9"
            projection.ImageType = ["DERIVED", "SECONDARY", value]
            set_stored(projection, np.full((5, 7), 3000))
            slices.append(projection)
        volume, _, warnings = load(slices)
        check_equal(volume, truth)
        assert warnings == ("PROJECTION_DROPPED",)
        assert refusal(slices[6:]).reason == "PROJECTION_ONLY"

    @pytest.mark.parametrize("values", [["ORIGINAL", "SECONDARY", "AXIAL"], ["DERIVED", "PRIMARY", "AXIAL", "ADD"]])
    def test_derived_and_secondary_slices_are_slices(self, values: list[str]) -> None:
        slices = ct_slices(made_volume())
        for ds in slices:
            ds.ImageType = values
        check_equal(load(slices)[0], made_volume())

    def test_two_stacks_are_refused(self) -> None:
        slices = ct_slices(made_volume())
        for ds in ct_slices(made_volume(orientation=(1, 0, 0, 0, 0, -1))):
            ds.SOPInstanceUID += ".2"
            slices.append(ds)
        assert refusal(slices).reason == "MIXED_ORIENTATION"


class TestGrouping:
    def test_folder_and_named_bytes_agree(self, tmp_path) -> None:
        files = to_files(ct_slices(made_volume()))
        for name, file in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(file)
        (tmp_path / "notes.txt").write_text("beside")
        on_disk, in_memory = group_series(tmp_path), group_series(files | {"notes.txt": b"beside"})
        assert on_disk.refused == in_memory.refused == []
        assert [series.key for series in on_disk.series] == [series.key for series in in_memory.series]
        check_equal(load_volume(*on_disk.series)[0], made_volume())

    def test_two_series_in_one_folder(self) -> None:
        slices = ct_slices(made_volume(seed=1))
        for ds in ct_slices(made_volume(seed=2)):
            ds.SeriesInstanceUID += ".7"
            slices.append(ds)
        assert len(group_series(to_files(slices)).series) == 2

    def test_empty_uids_do_not_merge_folders(self) -> None:
        files: dict[str, bytes] = {}
        for folder in "ab":
            slices = ct_slices(made_volume(seed=ord(folder)))
            for ds in slices:
                ds.SeriesInstanceUID = ds.StudyInstanceUID = ds.SOPInstanceUID = ds.PatientID = ""
            files |= {f"{folder}/{name}": file for name, file in to_files(slices).items()}
        listing = group_series(files)
        assert len(listing.series) == len({series.series for series in listing.series}) == 2
        for series in listing.series:
            assert series.warnings == ("EMPTY_SERIES_UID", "UNKNOWN_PATIENT")
            check_equal(load_volume(series)[0], made_volume(seed=ord(series.key[0])))

    def test_a_copied_series_is_one_series(self) -> None:
        files = to_files(ct_slices(made_volume()))
        listing = group_series(files | {f"copy/{name}": file for name, file in files.items()})
        volume, _, warnings = load_volume(*listing.series)
        check_equal(volume, made_volume())
        assert warnings == ("DUPLICATE_DROPPED",)

    def test_objects_are_passed_on(self) -> None:
        report = Dataset()
        report.SOPClassUID, report.Modality, report.SeriesInstanceUID = uid.BasicTextSRStorage, "SR", "1.2.3"
        listing = group_series(to_files(ct_slices(made_volume())) | {"report.dcm": to_bytes(report)})
        assert (len(listing.series), listing.refused, len(listing.objects)) == (1, [], 1)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda ds: setattr(ds, "Modality", "MR"), "NOT_CT"),
            (lambda ds: setattr(ds, "SOPClassUID", uid.SecondaryCaptureImageStorage), "NOT_CT"),
            (lambda ds: setattr(ds, "Rows", 6), "PIXEL_LENGTH"),
            (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-2]), "PIXEL_LENGTH"),
            (lambda ds: setattr(ds, "PixelData", ds.PixelData + bytes(2)), "PIXEL_LENGTH"),
            (lambda ds: delattr(ds, "PixelData"), "NO_PIXELS"),
            (lambda ds: setattr(ds, "BitsAllocated", 8), "BAD_PIXEL_FORMAT"),
            (lambda ds: setattr(ds, "HighBit", 11), "BAD_PIXEL_FORMAT"),
            (lambda ds: setattr(ds, "SamplesPerPixel", 3), "BAD_PIXEL_FORMAT"),
            (lambda ds: setattr(ds, "PhotometricInterpretation", "PALETTE COLOR"), "BAD_PIXEL_FORMAT"),
            (lambda ds: setattr(ds, "PixelRepresentation", None), "BAD_PIXEL_FORMAT"),
            (lambda ds: (setattr(ds, "Rows", 65535), setattr(ds, "Columns", 65535)), "TOO_LARGE"),
        ],
    )
    def test_a_whole_series_is_refused_once(self, change: Callable[[Dataset], object], reason: str) -> None:
        slices = ct_slices(made_volume())
        for ds in slices:
            change(ds)
        listing = group_series(to_files(slices))
        assert listing.series == []
        assert [refused.reason for _, refused in listing.refused] == [reason]

    def test_transfer_syntax_without_decoder(self) -> None:
        slices = ct_slices(made_volume())
        for ds in slices:
            ds.PixelData = encapsulate([b"\xff\xd8" + bytes(30)])
            ds["PixelData"].VR = "OB"
            ds["PixelData"].is_undefined_length = True
        listing = group_series(to_files(slices, uid.JPEGBaseline8Bit))
        ((_, refused),) = listing.refused
        assert refused.reason == "UNSUPPORTED_TRANSFER_SYNTAX"
        assert "JPEG Baseline" in refused.detail


class TestBrokenFiles:
    def listing(self, **others: bytes) -> Listing:
        return group_series(to_files(ct_slices(made_volume())) | others)

    def reasons(self, **others: bytes) -> dict[str, str]:
        listing = self.listing(**others)
        check_equal(load_volume(*listing.series)[0], made_volume())  # the good series is there all the same
        return {name: refused.reason for name, refused in listing.refused}

    def test_each_is_refused_by_name(self) -> None:
        other = ct_slices(made_volume())[0]
        other.SeriesInstanceUID += ".5"
        other.Modality = "MR"
        file = to_bytes(ct_slices(made_volume())[0])
        found = self.reasons(
            **{
                "garbage.dcm": bytes(range(256)) * 4,
                "empty": b"",
                "text.dcm": b"not DICOM",
                "magnetic.dcm": to_bytes(other),
                "cut_in_pixels.dcm": file[:-30],
                "cut_in_header.dcm": file[:420],
                "cut_in_meta.dcm": file[:150],
            }
        )
        assert found == {
            "garbage.dcm": "NOT_DICOM",
            "empty": "NOT_DICOM",
            "text.dcm": "NOT_DICOM",
            "magnetic.dcm": "NOT_CT",
            "cut_in_pixels.dcm": "TRUNCATED",
            "cut_in_header.dcm": "TRUNCATED",
            "cut_in_meta.dcm": "TRUNCATED",
        }

    def test_companions_are_passed_over(self) -> None:
        assert self.reasons(**{"a/69.xml": b"<x/>", "LICENSE": b"text", ".hidden": b"x", "n.csv": b"1,2"}) == {}

    @pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
    def test_a_cut_slice_inside_leaves_a_gap_and_at_the_end_a_shorter_stack(self, syntax: uid.UID) -> None:
        truth = made_volume()
        files = {str(z): to_bytes(ds, syntax) for z, ds in enumerate(ct_slices(truth))}
        inside = group_series(files | {"2": files["2"][:-20]})
        assert [(name, refused.reason) for name, refused in inside.refused] == [("2", "TRUNCATED")]
        with pytest.raises(Refusal, match="MISSING_SLICE"):
            load_volume(*inside.series)
        at_end = group_series(files | {"5": files["5"][:-20]})
        volume, _, warnings = load_volume(*at_end.series)
        np.testing.assert_array_equal(volume.hu, truth.hu[:5])
        assert warnings == ("BROKEN_FILE_DROPPED",)

    def test_a_cut_deflated_slice_shows_when_it_is_inflated(self) -> None:
        files = {
            str(z): to_bytes(ds, uid.DeflatedExplicitVRLittleEndian) for z, ds in enumerate(ct_slices(made_volume()))
        }
        (series,) = group_series(files | {"5": files["5"][:-20]}).series
        with pytest.raises(Refusal, match="TRUNCATED.*instance 1 ends inside"):
            load_volume(series)
        in_the_header = group_series(files | {"5": files["5"][:400]})
        assert [(name, refused.reason) for name, refused in in_the_header.refused] == [("5", "TRUNCATED")]

    @pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless])
    def test_damaged_compressed_pixels(self, syntax: uid.UID) -> None:
        ds = dcmread_bytes(to_bytes(ct_slices(LARGER)[0], syntax))
        for frame in (b"", bytes(64), b"\xff\x4f\xff\x51" + bytes(40), b"\xff\xd8\xff\xf7" + bytes(40)):
            ds.PixelData = encapsulate([frame or bytes(2)])
            with pytest.raises(Refusal, match="DECODE_FAILED"):
                read_hu(read_header(rewritten(ds)))

    @pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless])
    def test_code_stream_of_another_size(self, syntax: uid.UID) -> None:
        ds = dcmread_bytes(to_bytes(ct_slices(LARGER)[0], syntax))
        ds.Rows, ds.Columns = 37, 33  # as many pixels
        with pytest.raises(Refusal, match="DECODE_FAILED"):
            read_hu(read_header(rewritten(ds)))

    def test_a_deflated_bomb_is_stopped(self) -> None:
        deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        chunk = bytes(2**20)
        body = b"".join(deflater.compress(chunk) for _ in range(2 * MAX_INFLATED_BYTES >> 20)) + deflater.flush()
        file = to_bytes(ct_slices(made_volume())[0], uid.DeflatedExplicitVRLittleEndian)
        meta_end = 144 + int.from_bytes(file[140:144], "little")  # preamble, prefix and (0002,0000) before
        tracemalloc.start()
        with pytest.raises(Refusal, match="TOO_LARGE"):
            read_header(file[:meta_end] + body)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * MAX_INFLATED_BYTES

    def test_nested_sequences_do_not_end_the_process(self) -> None:
        item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff"
        file = to_bytes(ct_slices(made_volume())[0])
        at = file.index(b"\x08\x00\x60\x00CS")
        deep = file[:at] + b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff" + item * 5000
        assert self.reasons(**{"deep.dcm": deep})["deep.dcm"] in {"BAD_HEADER", "TRUNCATED"}

    @pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless])
    def test_random_bytes_changed(self, syntax: uid.UID) -> None:
        """Whatever is changed, the answer is a series or a named refusal."""
        rng = np.random.default_rng(0)
        good = {str(z): to_bytes(ds, syntax) for z, ds in enumerate(ct_slices(LARGER))}
        for _ in range(60):
            file = bytearray(good["3"])
            for at in rng.integers(128, len(file), rng.integers(1, 8)):
                file[at] = rng.integers(256)
            listing = group_series(good | {"3": bytes(file)})
            for series in listing.series:
                try:
                    volume, _, _ = load_volume(series)
                except Refusal:
                    continue
                assert volume.hu.dtype == np.int16
