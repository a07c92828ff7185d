"""Compressed frames: equal to the truth and to other decoders, or refused; never another image without a word."""

import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from pathlib import Path

import gdcm
import imagecodecs
import numpy as np
import pytest
import SimpleITK as sitk
from jaxtyping import Integer, UInt16
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import encapsulate

from mp3d.data.dicom import read_header, read_hu
from mp3d.data.dicom.decoders import COMPRESSED, LOSSY, MAX_TILES, decode_frame
from mp3d.data.dicom.pixels import read_stored
from mp3d.errors import Refusal
from tests.dicom_files import LOSSLESS, compressed, ct_slices, made_volume, set_stored, to_bytes
from tests.lossless_jpeg import lossless_jpeg

SHARED = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
FOLDER = SHARED / "odd" / "ct_transfer_syntaxes"
BY_GDCM = {
    uid.RLELossless: gdcm.TransferSyntax.RLELossless,
    uid.JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    uid.JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    uid.JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    uid.JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
}
FORMATS = [(16, 1), (16, 0), (12, 0), (12, 1), (13, 1), (9, 0)]
"""Bits Stored, Pixel Representation."""

name_of = pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name)


def stored_values(
    bits: int, signed: int, shape: tuple[int, int] = (48, 37), seed: int = 0
) -> Integer[np.ndarray, "h w"]:
    """Smooth like anatomy, with noise and both ends of the range."""
    rng = np.random.default_rng(seed)
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits) - 1
    smooth = np.cumsum(rng.integers(-(1 << bits >> 7) - 1, (1 << bits >> 7) + 2, shape), axis=1)
    values = np.clip(smooth + (low + high) // 2 + rng.integers(-9, 10, shape), low, high)
    values[0, :4] = low, high, 0, low
    return values


def ct_slice(stored: Integer[np.ndarray, "h w"], bits: int, signed: int) -> Dataset:
    ds = ct_slices(made_volume())[0]
    ds.Rows, ds.Columns = stored.shape
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, signed
    set_stored(ds, stored)
    return ds


def frame_of(syntax: uid.UID, seed: int = 0) -> tuple[bytes, UInt16[np.ndarray, "h w"]]:
    """A frame of 16 bits and its values."""
    values = stored_values(16, 0, seed=seed).astype(np.uint16)
    return compressed(values, syntax, 16), values


def transcoded_by_gdcm(file: bytes, syntax: uid.UID, path: Path) -> bytes:
    path.write_bytes(file)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(BY_GDCM[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return path.read_bytes()


def refused(frame: bytes, syntax: uid.UID, rows: int = 48, columns: int = 37) -> str:
    """Why a frame is refused; it must be, as ``DECODE_FAILED``."""
    with pytest.raises(Refusal) as caught:
        decode_frame(frame, syntax, rows, columns)
    assert caught.value.reason == "DECODE_FAILED"
    return caught.value.detail


class TestEqual:
    @name_of
    @pytest.mark.parametrize(("bits", "signed"), FORMATS)
    def test_to_the_truth(self, syntax: uid.UID, bits: int, signed: int) -> None:
        truth = stored_values(bits, signed)
        header = read_header(to_bytes(ct_slice(truth, bits, signed), syntax))
        assert header.transfer_syntax == syntax
        np.testing.assert_array_equal(read_stored(header), truth)

    @pytest.mark.parametrize("syntax", BY_GDCM, ids=lambda syntax: syntax.name)
    @pytest.mark.parametrize(("bits", "signed"), FORMATS)
    def test_to_gdcm_and_simpleitk(self, syntax: uid.UID, bits: int, signed: int, tmp_path: Path) -> None:
        """Files of another writer, read by other readers."""
        truth = stored_values(bits, signed)
        path = tmp_path / "file.dcm"
        file = transcoded_by_gdcm(to_bytes(ct_slice(truth, bits, signed)), syntax, path)
        header = read_header(file)
        assert header.transfer_syntax == syntax
        np.testing.assert_array_equal(read_stored(header), truth)
        simpleitk = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0]
        np.testing.assert_array_equal(read_hu(header), np.clip(simpleitk, -32768, 32767))
        if syntax != uid.RLELossless:  # which pydicom decodes by itself
            ds = dcmread(BytesIO(file))
            ds.pixel_array_options(decoding_plugin="gdcm")
            np.testing.assert_array_equal(ds.pixel_array, truth)

    @pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER}")
    def test_on_one_real_slice_in_every_syntax(self, tmp_path: Path) -> None:
        paths = sorted(FOLDER.iterdir())
        hu = [read_hu(read_header(path)) for path in paths]
        assert len(hu) == 6
        native = next(path for path in paths if read_header(path).transfer_syntax == uid.ExplicitVRLittleEndian)
        ds = dcmread(native)
        files = [to_bytes(ds, syntax) for syntax in (*LOSSLESS, uid.ExplicitVRBigEndian)]
        files += [transcoded_by_gdcm(native.read_bytes(), syntax, tmp_path / "file.dcm") for syntax in BY_GDCM]
        for other in [*hu[1:], *(read_hu(read_header(file)) for file in files)]:
            np.testing.assert_array_equal(other, hu[0])

    @pytest.mark.parametrize("name", ["JPEG-lossy.dcm", "JPGExtended.dcm"])
    def test_extended_jpeg_of_12_bits(self, name: str) -> None:
        """pydicom's own files; what they hold is lossy, so other decoders round otherwise."""
        import pydicom.data

        path = pydicom.data.get_testdata_file(name, download=False)
        header = read_header(Path(str(path)))
        assert header.transfer_syntax == uid.JPEGExtended12Bit
        np.testing.assert_array_equal(read_stored(header), sitk.GetArrayFromImage(sitk.ReadImage(path))[0])

    @pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless])
    @pytest.mark.parametrize("signed", [0, 1])
    def test_bits_above_the_stored_ones_do_not_count(self, syntax: uid.UID, signed: int) -> None:
        truth = stored_values(12, signed)
        garbage = np.random.default_rng(1).integers(0, 16, truth.shape) << 12
        ds = ct_slice((truth & 0xFFF) | garbage, 16, signed)
        file = bytearray(to_bytes(ds, syntax))
        for element, value in ((b"\x28\x00\x01\x01US\x02\x00", 12), (b"\x28\x00\x02\x01US\x02\x00", 11)):
            at = file.index(element) + len(element)
            file[at : at + 2] = value.to_bytes(2, "little")
        np.testing.assert_array_equal(read_stored(read_header(bytes(file))), truth)

    def test_where_the_code_stream_denies_the_sign(self) -> None:
        """Two ways to read it; where no value tells, both are the same."""
        signed = ct_slice(stored_values(16, 1), 16, 1)
        file = bytearray(to_bytes(signed, uid.JPEG2000Lossless))
        at = file.index(b"\x28\x00\x03\x01US\x02\x00") + 8
        file[at] = 0
        with pytest.raises(Refusal, match="signed values of 16 bits, the header unsigned"):
            read_stored(read_header(bytes(file)))
        positive = np.abs(stored_values(12, 1)).clip(0, 2000)
        file = bytearray(to_bytes(ct_slice(positive, 16, 1), uid.JPEG2000Lossless))
        file[file.index(b"\x28\x00\x03\x01US\x02\x00") + 8] = 0
        np.testing.assert_array_equal(read_stored(read_header(bytes(file))), positive)

    def test_fewer_bits_than_the_header_says(self) -> None:
        """Unsigned values of 12 bits under a header of signed ones of 16: is 4000 meant, or -96?"""
        values = np.full((40, 36), 2047)
        ds = ct_slice(values, 12, 0)
        for highest, answer in ((2047, None), (4000, "DECODE_FAILED")):
            values[3, 4] = highest
            set_stored(ds, values)
            file = to_bytes(ds, uid.JPEGLosslessSV1)
            for element, value in ((b"\x28\x00\x01\x01", 16), (b"\x28\x00\x02\x01", 15), (b"\x28\x00\x03\x01", 1)):
                at = file.index(element + b"US\x02\x00") + 8
                file = file[:at] + value.to_bytes(2, "little") + file[at + 2 :]
            if answer is None:
                np.testing.assert_array_equal(read_stored(read_header(file)), values)
            else:
                with pytest.raises(Refusal, match=answer):
                    read_stored(read_header(file))


class TestLosslessJpeg:
    @pytest.mark.parametrize("predictor", range(1, 8))
    @pytest.mark.parametrize(("precision", "shift", "restart_rows"), [(16, 0, 0), (12, 0, 1), (16, 3, 0), (13, 2, 5)])
    def test_by_the_formula(self, predictor: int, precision: int, shift: int, restart_rows: int) -> None:
        values = stored_values(precision, 0, (17, 11), seed=predictor) >> shift << shift
        stream = lossless_jpeg(values, precision, predictor, shift, restart_rows)
        decoded = decode_frame(stream, uid.JPEGLossless, 17, 11)
        np.testing.assert_array_equal(decoded.bits, values)
        assert decoded.precision == precision
        for cut in (1, 3, 40):
            refused(stream[: -2 - cut] + b"\xff\xd9", uid.JPEGLossless, 17, 11)

    @pytest.mark.parametrize("predictor", range(1, 8))
    def test_by_libjpeg_turbo(self, predictor: int) -> None:
        values = stored_values(16, 0).astype(np.uint16)
        stream = imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=16, predictor=predictor)
        np.testing.assert_array_equal(decode_frame(stream, uid.JPEGLossless, 48, 37).bits, values)

    def test_another_coding_process(self) -> None:
        values = stored_values(12, 0).astype(np.uint16)
        lossy = imagecodecs.jpeg8_encode(values, level=95, bitspersample=12)
        assert "another coding process" in refused(lossy, uid.JPEGLossless)
        assert "another coding process" in refused(frame_of(uid.JPEGLosslessSV1)[0], uid.JPEGExtended12Bit)
        assert "another coding process" in refused(frame_of(uid.JPEGLSLossless)[0], uid.JPEGLossless)


class TestDamage:
    @name_of
    def test_bytes_missing_anywhere(self, syntax: uid.UID) -> None:
        """Cut off, cut off before the end marker, or some left out inside: nobody decodes that to an image."""
        frame, values = frame_of(syntax)
        np.testing.assert_array_equal(decode_frame(frame, syntax, 48, 37).bits, values)
        end = frame.rfind(b"\xff\xd9") if syntax != uid.RLELossless else len(frame)
        rng = np.random.default_rng(0)
        for at in rng.integers(64, end - 40, 30):
            refused(frame[:at], syntax)
            refused(frame[:at] + frame[end:], syntax)
            refused(frame[:at] + frame[at + int(rng.integers(4, 30)) :], syntax)

    def test_missing_bytes_of_extended_jpeg(self) -> None:
        values = stored_values(12, 0).astype(np.uint16)
        frame = imagecodecs.jpeg8_encode(values, level=95, bitspersample=12)
        decode_frame(frame, uid.JPEGExtended12Bit, 48, 37)
        for cut in (3, 30, 300):
            refused(frame[:-cut], uid.JPEGExtended12Bit)

    @name_of
    def test_another_size(self, syntax: uid.UID) -> None:
        frame, _ = frame_of(syntax)
        for rows, columns in ((37, 48), (48, 36), (47, 37), (96, 37)):
            if (rows, columns) != (37, 48) or syntax != uid.RLELossless:  # run lengths know no rows
                refused(frame, syntax, rows, columns)

    @pytest.mark.parametrize("syntax", LOSSLESS[1:], ids=lambda syntax: syntax.name)
    def test_a_few_bytes_that_claim_a_huge_image(self, syntax: uid.UID) -> None:
        frame, _ = frame_of(syntax)
        huge = claiming(frame, syntax, 30000, 30000)
        tracemalloc.start()
        assert "30000 rows, 30000 columns" in refused(huge, syntax)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20

    def test_colours(self) -> None:
        colour = np.zeros((48, 37, 3), np.uint8)
        for syntax, stream in (
            (uid.JPEGLosslessSV1, imagecodecs.jpeg8_encode(colour, lossless=True)),
            (uid.JPEGLSLossless, imagecodecs.jpegls_encode(colour)),
            (uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode(colour, level=0, codecformat="J2K", reversible=True)),
        ):
            assert "3 samples" in refused(bytes(stream), syntax)

    def test_more_tiles_than_an_image_has(self) -> None:
        frame, _ = frame_of(uid.JPEG2000Lossless)
        assert f"at most {MAX_TILES}" in refused(
            frame[:24] + struct.pack(">2I", 1, 1) + frame[32:], uid.JPEG2000Lossless
        )
        refused(frame[:24] + bytes(8) + frame[32:], uid.JPEG2000Lossless)

    @name_of
    def test_bytes_behind_the_end(self, syntax: uid.UID) -> None:
        frame, values = frame_of(syntax)
        for padding in (b"\0", bytes(3), bytes(6)):
            np.testing.assert_array_equal(decode_frame(frame + padding, syntax, 48, 37).bits, values)
        refused(frame + b"\1" * 20, syntax)

    @name_of
    def test_random_bytes_changed(self, syntax: uid.UID) -> None:
        """An image of the right size or a named refusal, whatever is changed."""
        frame, _ = frame_of(syntax)
        rng = np.random.default_rng(0)
        reasons = set()
        for _ in range(100):
            changed = bytearray(frame)
            for at in rng.integers(0, len(frame) if rng.random() < 0.5 else 120, rng.integers(1, 5)):
                changed[at] = rng.integers(256)
            try:
                decoded = decode_frame(bytes(changed), syntax, 48, 37)
            except Refusal as refusal:
                reasons.add(refusal.reason)
                continue
            assert decoded.bits.shape == (48, 37)
        assert reasons == {"DECODE_FAILED"}


class TestRunLengths:
    SYNTAX = uid.RLELossless

    @pytest.mark.parametrize(
        ("high", "low"),
        [
            (b"\x02\1\2\3", b"\x03\1\2\3\4"),
            (b"\x03\1\2\3\4", b"\x03\1\2\3\4\x00\5"),
            (b"\x03\1\2\3\4", b"\xfc\1"),
            (b"\x03\1\2\3\4", b"\x03\1\2\3"),
            (b"\x03\1\2\3\4", b"\xfe\1\xff"),
            (b"\x03\1\2\3\4\xff\0\0\0", b"\x03\1\2\3\4"),
            (b"", b"\x03\1\2\3\4"),
        ],
        ids=["few", "more", "a longer run", "a cut literal", "a cut run", "zeros that are a run", "nothing"],
    )
    def test_another_number_of_bytes(self, high: bytes, low: bytes) -> None:
        refused(run_lengths(high, low), self.SYNTAX, 2, 2)

    @pytest.mark.parametrize("padding", [b"", b"\0", bytes(2), bytes(7)])
    def test_zeros_may_follow(self, padding: bytes) -> None:
        frame = run_lengths(b"\xff\0\xff\1" + padding, b"\x80\x03\1\2\3\0" + padding)
        assert decode_frame(frame, self.SYNTAX, 2, 2).bits.tolist() == [[1, 2], [259, 256]]

    @pytest.mark.parametrize("header", [(1, 64), (3, 64, 69, 74), (2, 64, 2**32 - 1), (2, 70, 64), (2, 0, 69), (0,)])
    def test_segments_elsewhere(self, header: tuple[int, ...]) -> None:
        frame = run_lengths(b"\x03\1\2\3\4", b"\x03\1\2\3\4")
        refused(struct.pack("<16I", *header, *[0] * (16 - len(header))) + frame[64:], self.SYNTAX, 2, 2)


@pytest.mark.parametrize("intercept", [0, -1024, 1000, 32767, -32768, -40000, 65000])
@pytest.mark.parametrize("signed", [0, 1])
def test_whole_numbers_are_rescaled_exactly(intercept: int, signed: int) -> None:
    stored = stored_values(16, signed)
    for values in (stored, stored // 4):
        ds = ct_slice(values, 16, signed)
        ds.RescaleIntercept = str(intercept)
        np.testing.assert_array_equal(read_hu(read_header(to_bytes(ds))), np.clip(values + intercept, -32768, 32767))


def test_uncompressed_images_need_no_codec(tmp_path: Path) -> None:
    """Only what a transfer syntax needs is imported; the packages have dozens of compiled codecs."""
    ds = ct_slice(stored_values(16, 1), 16, 1)
    for syntax, expected in ((uid.ExplicitVRLittleEndian, set()), (uid.RLELossless, {"_imcd"})):
        (tmp_path / "file.dcm").write_bytes(to_bytes(ds, syntax))
        code = (
            "import sys; from pathlib import Path; from mp3d.data.dicom import read_header, read_hu;"
            "read_hu(read_header(Path(sys.argv[1]))); print(*sys.modules)"
        )
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file.dcm")], capture_output=True, check=True)
        modules = run.stdout.decode().split()
        codecs = {name.partition(".")[2] for name in modules if name.startswith("imagecodecs.")}
        assert codecs - {"imagecodecs", "_shared", "_shared_cython"} == expected
        assert "torch" not in modules


def test_all_syntaxes_are_tested() -> None:
    assert set(LOSSLESS) == COMPRESSED - LOSSY


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (uid.JPEGLSNearLossless, lambda values: imagecodecs.jpegls_encode(values, level=2)),
        (uid.JPEG2000, lambda values: imagecodecs.jpeg2k_encode(values, level=90, codecformat="J2K", reversible=False)),
        (uid.HTJ2K, lambda values: imagecodecs.htj2k_encode(values, level=0.00002, reversible=False)),
    ],
    ids=["JPEG-LS", "JPEG 2000", "HTJ2K"],
)
def test_lossy_but_near(syntax: uid.UID, encode: Callable[[np.ndarray], bytes]) -> None:
    """Also where it overshoots the Bits Stored, of which coders of 16 bits know nothing."""
    values = stored_values(12, 0)
    file = with_frame(ct_slice(values, 12, 0), bytes(encode(values.astype(np.uint16))), syntax)
    assert 0 < np.abs(read_stored(read_header(file)).astype(int) - values).max() <= 10


def with_frame(ds: Dataset, frame: bytes, syntax: uid.UID) -> bytes:
    """A file with a frame that was compressed elsewhere."""
    ds = deepcopy(ds)
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return to_bytes(ds, syntax)


def claiming(frame: bytes, syntax: uid.UID, rows: int, columns: int) -> bytes:
    """The code stream with another size in its own header."""
    if frame.startswith(b"\xff\x4f"):
        return frame[:8] + struct.pack(">2I", columns, rows) + frame[16:]
    at = frame.index(b"\xff\xf7" if syntax == uid.JPEGLSLossless else b"\xff\xc3") + 5
    return frame[:at] + struct.pack(">2H", rows, columns) + frame[at + 4 :]


def run_lengths(high: bytes, low: bytes) -> bytes:
    return struct.pack("<16I", 2, 64, 64 + len(high), *[0] * 13) + high + low


def test_fill_bytes_before_the_end_of_a_jpeg_stream() -> None:
    """Any marker may have them before it (T.81 B.1.1.2)."""
    pixels = np.random.default_rng(0).integers(0, 4096, (24, 32), dtype=np.uint16)
    stream = imagecodecs.ljpeg_encode(pixels, bitspersample=12)
    assert stream.endswith(b"\xff\xd9")
    for fill in (b"\xff", b"\xff\xff\xff"):
        decoded = decode_frame(stream[:-2] + fill + stream[-2:], uid.JPEGLosslessSV1, *pixels.shape)
        assert np.array_equal(decoded.bits, pixels)
