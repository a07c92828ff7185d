"""DICOM files made to harm or mislead a reader: each a change of one good slice, with the verdict it must get.

A verdict is ``hu`` (read, with the right Hounsfield units) or a reason code.
"""

import os
import zlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
from pydicom import Dataset, uid
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import encapsulate

from tests.dicom_files import enhanced, set_stored, to_bytes

Attack = Callable[[Dataset], bytes]
"""The bytes that take the place of a good slice's file."""
Trap = Callable[[Path], object]
"""Puts something into the folder of a good series."""
LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT")
UNDEFINED = 0xFFFFFFFF
PIXEL_DATA = 0x7FE00010
PRIVATE = 0x00991010
ITEM, ITEM_END, SEQUENCE_END = (b"\xfe\xff" + code + bytes(4) for code in (b"\x00\xe0", b"\x0d\xe0", b"\xdd\xe0"))


def tag_bytes(tag: int) -> bytes:
    return (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """Explicit little endian; a length that is given may lie."""
    length = len(value) if length is None else length
    size = bytes(2) + length.to_bytes(4, "little") if vr in LONG_VRS else length.to_bytes(2, "little")
    return tag_bytes(tag) + vr + size + value


def body_offset(file: bytes) -> int:
    """Where the data set begins: behind preamble, prefix, and the meta group whose length the first element tells."""
    return 144 + int.from_bytes(file[140:144], "little")


def with_meta(body: bytes, syntax: str) -> bytes:
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = element(0x00020010, b"UI", value)
    return bytes(128) + b"DICM" + element(0x00020000, b"UL", len(meta).to_bytes(4, "little")) + meta + body


def body_of(ds: Dataset, syntax: uid.UID = uid.ExplicitVRLittleEndian) -> bytes:
    file = to_bytes(ds, syntax)
    return file[body_offset(file) :]


def rewritten(keyword: str, value: bytes, vr: bytes | None = None) -> Attack:
    """Another value, and perhaps another VR, in the place of an element's own, whatever pydicom thinks of it."""

    def attack(ds: Dataset) -> bytes:
        file = to_bytes(ds)
        tag = tag_bytes(tag_for_keyword(keyword) or 0)
        at = file.index(tag, body_offset(file))
        end = at + 8 + int.from_bytes(file[at + 6 : at + 8], "little")
        return file[:at] + tag + element(0, vr or file[at + 4 : at + 6], value)[4:] + file[end:]

    return attack


def changed(syntax: uid.UID = uid.ExplicitVRLittleEndian, **elements: object) -> Attack:
    """Other elements; the pixels stay as they are."""

    def attack(ds: Dataset) -> bytes:
        ds = deepcopy(ds)
        for keyword, value in elements.items():
            setattr(ds, keyword, value)
        return to_bytes(ds, syntax)

    return attack


def inserted(raw: bytes) -> Attack:
    """Elements in front of Pixel Data."""

    def attack(ds: Dataset) -> bytes:
        file = to_bytes(ds)
        at = file.rindex(tag_bytes(PIXEL_DATA) + b"OW")
        return file[:at] + raw + file[at:]

    return attack


def with_pixels(raw: bytes, syntax: str = uid.ExplicitVRLittleEndian) -> Attack:
    """Another element, or none, in the place of Pixel Data."""

    def attack(ds: Dataset) -> bytes:
        body = body_of(ds)
        return with_meta(body[: body.rindex(tag_bytes(PIXEL_DATA) + b"OW")] + raw, syntax)

    return attack


def compressed(syntax: str, frame: bytes, **elements: object) -> Attack:
    """A header that fits, and a frame that does not."""

    def attack(ds: Dataset) -> bytes:
        ds = deepcopy(ds)
        for keyword, value in elements.items():
            setattr(ds, keyword, value)
        return with_pixels(element(PIXEL_DATA, b"OB", encapsulate([frame]), UNDEFINED) + SEQUENCE_END, syntax)(ds)

    return attack


def stored(bits: int, signed: int, above: int = 0) -> Attack:
    """The same Hounsfield units in other bits; ``above`` stands in the bits above them."""

    def attack(ds: Dataset) -> bytes:
        ds = deepcopy(ds)
        hu = np.frombuffer(ds.PixelData, "<i2").astype(int) - 1024
        ds.RescaleIntercept = "-1024" if not signed else "0"
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, signed
        values = (hu if signed else hu + 1024) & ((1 << bits) - 1)
        set_stored(ds, values | (above << bits))
        return to_bytes(ds)

    return attack


def deflate_bomb(ds: Dataset) -> bytes:
    """Half a megabyte that inflates to half a gigabyte."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = [deflater.compress(element(PRIVATE, b"OB", b"", 2**29))]
    parts += [deflater.compress(bytes(2**20)) for _ in range(2**9)]
    return with_meta(b"".join(parts) + deflater.flush(), uid.DeflatedExplicitVRLittleEndian)


def nested(depth: int, tag: int = PRIVATE, vr: bytes = b"SQ", defined: bool = False) -> bytes:
    """Sequences in sequences."""
    content = b""
    if not defined:
        opened = element(tag, vr, tag_bytes(0xFFFEE000), UNDEFINED) + b"\xff" * 4
        return opened * depth + (ITEM_END + SEQUENCE_END) * depth
    for _ in range(depth):
        content = element(tag, vr, tag_bytes(0xFFFEE000) + len(content).to_bytes(4, "little") + content)
    return content


def nested_frames(ds: Dataset) -> bytes:
    """An Enhanced CT whose functional groups are nested."""
    file = to_bytes(enhanced([ds]))
    at = file.rindex(tag_bytes(0x52009229))
    return file[:at] + nested(500, 0x52009229) + file[at:]


def tiny_elements(ds: Dataset) -> bytes:
    """A million elements of eight bytes."""
    tags = np.zeros((10**6, 4), "<u2")
    tags[:, 0] = 0x0011 + 2 * (np.arange(10**6) >> 16)
    tags[:, 1] = np.arange(10**6) & 0xFFFF
    tags[:, 2] = int.from_bytes(b"LO", "little")
    return inserted(tags.tobytes())(ds)


def all_empty(ds: Dataset) -> bytes:
    ds = deepcopy(ds)
    for one in ds:
        one.value = b"" if one.VR == "OW" else None
    return to_bytes(ds)


def rgb(ds: Dataset) -> bytes:
    ds = deepcopy(ds)
    ds.SamplesPerPixel, ds.PlanarConfiguration, ds.PhotometricInterpretation = 3, 0, "RGB"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.PixelData = bytes(ds.Rows * ds.Columns * 3 + 1)
    return to_bytes(ds)


def palette(ds: Dataset) -> bytes:
    table = element(0x00281101, b"US", b"\x00\x00\x00\x00\x10\x00") + element(0x00281201, b"OW", bytes(2**17))
    return inserted(table)(_set(ds, PhotometricInterpretation="PALETTE COLOR"))


def runs(count: int) -> bytes:
    """A run-length coded frame of so many pixels, of zeros."""
    segment = b"\x81\x00" * (count // 128)
    return np.array([2, 64, 64 + len(segment), *[0] * 13], "<u4").tobytes() + 2 * segment


def jpeg_ls_size(ds: Dataset) -> bytes:
    """The code stream claims 65535 x 65535 pixels, the header does not."""
    frame = b"\xff\xd8\xff\xf7\x00\x0b\x10\xff\xff\xff\xff\x01\x01\x11\x00\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00"
    return compressed(uid.JPEGLSLossless, frame + bytes(16) + b"\xff\xd9")(ds)


def jpeg_2000(rows: int, columns: int, components: int = 1) -> Attack:
    """A code stream of one tile without content, of a size that the header does not have."""
    sizes = b"".join(size.to_bytes(4, "big") for size in (columns, rows, 0, 0, columns, rows, 0, 0))
    siz = b"\x00\x00" + sizes + components.to_bytes(2, "big") + b"\x0f\x01\x01" * components
    siz = b"\xff\x51" + (len(siz) + 2).to_bytes(2, "big") + siz
    cod = b"\xff\x52\x00\x0c\x00\x00\x00\x01\x00\x05\x04\x04\x00\x01"
    qcd = b"\xff\x5c\x00\x13\x40" + bytes(range(0x40, 0x50))
    sot = b"\xff\x90\x00\x0a\x00\x00\x00\x00\x00\x0e\x00\x01\xff\x93"
    return compressed(uid.JPEG2000Lossless, b"\xff\x4f" + siz + cod + qcd + sot + b"\xff\xd9")


def private_syntax(ds: Dataset) -> bytes:
    return with_meta(body_of(ds), "1.2.826.0.1.3680043.8.498.99")


def _set(ds: Dataset, **elements: object) -> Dataset:
    ds = deepcopy(ds)
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def _resized(change: Callable[[bytes], bytes]) -> Attack:
    """Pixel Data of another length, which it tells."""
    return lambda ds: to_bytes(_set(ds, PixelData=change(ds.PixelData)))


def rewritten_long(keyword: str, vr: bytes, length: int) -> Attack:
    """A value that claims to be longer than any file."""

    def attack(ds: Dataset) -> bytes:
        file = to_bytes(ds)
        tag = tag_bytes(tag_for_keyword(keyword) or 0)
        at = file.index(tag, body_offset(file))
        return file[:at] + tag + vr + bytes(2) + length.to_bytes(4, "little") + file[at + 8 :]

    return attack


SYNTAX = "UNSUPPORTED_TRANSFER_SYNTAX"
ATTACKS: dict[str, tuple[Attack, str]] = {
    # larger than they look
    "deflate bomb": (deflate_bomb, "TOO_LARGE"),
    "run lengths for 30000 x 30000": (compressed(uid.RLELossless, runs(128), Rows=30000, Columns=30000), "TOO_LARGE"),
    "run lengths of too many pixels": (compressed(uid.RLELossless, runs(2**26)), "DECODE_FAILED"),
    "run lengths of too few pixels": (compressed(uid.RLELossless, runs(128)), "DECODE_FAILED"),
    "JPEG-LS of 65535 x 65535": (jpeg_ls_size, "DECODE_FAILED"),
    "JPEG 2000 of 2147483647 x 2147483647": (jpeg_2000(2**31 - 1, 2**31 - 1), "DECODE_FAILED"),
    "JPEG 2000 of 16384 components": (jpeg_2000(33, 37, 16384), "DECODE_FAILED"),
    "JPEG 2000 of nothing": (jpeg_2000(33, 37), "DECODE_FAILED"),
    "65535 x 65535": (changed(Rows=65535, Columns=65535), "TOO_LARGE"),
    "2147483647 frames": (changed(NumberOfFrames=2**31 - 1), "MULTIFRAME_UNSUPPORTED"),
    "2147483647 frames, enhanced": (lambda ds: to_bytes(_set(enhanced([ds]), NumberOfFrames=2**31 - 1)), "TOO_LARGE"),
    "a million tiny elements": (tiny_elements, "TOO_LARGE"),
    "a million empty items": (
        inserted(element(PRIVATE, b"SQ", ITEM * 10**6 + SEQUENCE_END, UNDEFINED)),
        "TOO_LARGE",
    ),
    "a million fragments": (
        with_pixels(element(PIXEL_DATA, b"OB", ITEM * 10**6 + SEQUENCE_END, UNDEFINED), uid.RLELossless),
        "TRUNCATED",
    ),
    "a value of 64 KiB": (rewritten("PatientID", b"CANARY" * 10922), "BAD_HEADER"),
    # pixels that are not there, or too many
    "pixels 100 bytes short": (_resized(lambda pixels: pixels[:-100]), "PIXEL_LENGTH"),
    "pixels 100 bytes long": (_resized(lambda pixels: pixels + bytes(100)), "PIXEL_LENGTH"),
    "cut at half": (lambda ds: to_bytes(ds)[: len(to_bytes(ds)) // 2], "TRUNCATED"),
    "cut in the header": (lambda ds: to_bytes(ds)[:600], "TRUNCATED"),
    "no pixels": (with_pixels(b""), "NO_PIXELS"),
    "float pixels": (with_pixels(element(0x7FE00008, b"OF", bytes(33 * 37 * 4))), "NO_PIXELS"),
    "no frame": (with_pixels(element(PIXEL_DATA, b"OB", SEQUENCE_END, UNDEFINED), uid.RLELossless), "DECODE_FAILED"),
    "an empty frame": (
        with_pixels(element(PIXEL_DATA, b"OB", ITEM * 2 + SEQUENCE_END, UNDEFINED), uid.RLELossless),
        "DECODE_FAILED",
    ),
    "a fragment beyond the file": (
        with_pixels(element(PIXEL_DATA, b"OB", ITEM + ITEM[:4] + b"\xfe\xff\xff\xff", UNDEFINED), uid.RLELossless),
        "TRUNCATED",
    ),
    "run lengths of 15 segments": (compressed(uid.RLELossless, b"\x0f" + b"\xff" * 63), "DECODE_FAILED"),
    "JPEG-LS of noise": (compressed(uid.JPEGLSLossless, bytes(range(256))), "DECODE_FAILED"),
    "JPEG 2000 of noise": (compressed(uid.JPEG2000Lossless, bytes(range(256))), "DECODE_FAILED"),
    # sequences
    "500 sequences": (inserted(nested(500)), "BAD_HEADER"),
    "5000 sequences": (inserted(nested(5000)), "BAD_HEADER"),
    "500 sequences of defined length": (inserted(nested(500, defined=True)), "hu"),
    "5000 sequences of defined length": (inserted(nested(5000, defined=True)), "hu"),
    "500 unknowns": (inserted(nested(500, vr=b"UN")), "BAD_HEADER"),
    "an unknown that is a sequence": (inserted(nested(1, vr=b"UN")), "hu"),
    "500 functional groups": (nested_frames, "BAD_HEADER"),
    "an item that ends nowhere": (inserted(nested(1)[:20]), "TRUNCATED"),
    "the end of an item that never began": (inserted(ITEM_END), "TRUNCATED"),
    # numbers
    "spacing NaN": (rewritten("PixelSpacing", b"NaN\\NaN "), "BAD_SPACING"),
    "spacing negative": (changed(PixelSpacing=["-0.8", "0.6"]), "BAD_SPACING"),
    "spacing 0": (changed(PixelSpacing=["0.8", "0"]), "BAD_SPACING"),
    "spacing absurd": (changed(PixelSpacing=["1e300", "1e300"]), "BAD_SPACING"),
    "spacing of words": (rewritten("PixelSpacing", b"fine\\fine "), "BAD_HEADER"),
    "spacing of one value": (rewritten("PixelSpacing", b"0.8 "), "BAD_HEADER"),
    "position NaN": (rewritten("ImagePositionPatient", b"0\\0\\NaN "), "BAD_GEOMETRY"),
    "position 1e308": (changed(ImagePositionPatient=["0", "0", "1e308"]), "BAD_GEOMETRY"),
    "orientation 0": (changed(ImageOrientationPatient=["0"] * 6), "BAD_GEOMETRY"),
    "slope 0": (changed(RescaleSlope="0"), "BAD_RESCALE"),
    "slope NaN": (rewritten("RescaleSlope", b"NaN "), "BAD_RESCALE"),
    "slope inf": (rewritten("RescaleSlope", b"inf "), "BAD_RESCALE"),
    "intercept 1e300": (changed(RescaleIntercept="1e300"), "BAD_RESCALE"),
    "no slope": (rewritten("RescaleSlope", b""), "MISSING_RESCALE"),
    "frames 'abc'": (inserted(element(0x00280008, b"IS", b"abc ")), "BAD_HEADER"),
    "frames -1": (changed(NumberOfFrames="-1"), "MULTIFRAME_UNSUPPORTED"),
    "instance number of 300 digits": (rewritten("InstanceNumber", b"9" * 300), "hu"),
    "instance number beyond any": (rewritten("InstanceNumber", b"9" * 400), "hu"),
    # how it is written
    "an MZ preamble": (lambda ds: b"MZ" + to_bytes(ds)[2:], "hu"),
    "no preamble, no meta group": (body_of, "hu"),
    "no preamble": (lambda ds: to_bytes(ds)[132:], "NOT_DICOM"),
    "no meta group": (lambda ds: bytes(128) + b"DICM" + body_of(ds), "hu"),
    "big endian": (lambda ds: to_bytes(ds, uid.ExplicitVRBigEndian), "hu"),
    "implicit, declared explicit": (
        lambda ds: with_meta(body_of(ds, uid.ImplicitVRLittleEndian), uid.ExplicitVRLittleEndian),
        "hu",
    ),
    "explicit, declared deflated": (
        lambda ds: with_meta(body_of(ds), uid.DeflatedExplicitVRLittleEndian),
        "BAD_HEADER",
    ),
    "deflated and cut": (lambda ds: to_bytes(ds, uid.DeflatedExplicitVRLittleEndian)[:-300], "TRUNCATED"),
    "a private transfer syntax": (private_syntax, SYNTAX),
    "a film": (compressed(uid.MPEG2MPML, bytes(64)), SYNTAX),
    "a syntax of deflated frames": (lambda ds: with_meta(body_of(ds), "1.2.840.10008.1.2.8.1"), SYNTAX),
    "a syntax of a deflated JSON": (lambda ds: with_meta(body_of(ds), "1.2.840.10008.1.2.4.205"), SYNTAX),
    "an odd length": (inserted(element(PRIVATE, b"LO", b"odd")), "hu"),
    "a length beyond the file": (inserted(element(PRIVATE, b"OB", b"", 2**32 - 2)), "TRUNCATED"),
    "an unknown VR": (rewritten("InstanceNumber", b"3 ", b"ZZ"), "hu"),
    "rows as text": (rewritten("Rows", b"33", b"DS"), "PIXEL_LENGTH"),
    "rows in 8 bytes": (rewritten("Rows", bytes(8), b"FD"), "BAD_HEADER"),
    "spacing in bits": (rewritten("PixelSpacing", b"\x01\x00\x01\x00", b"US"), "BAD_HEADER"),
    "a charset that is none": (inserted(element(0x00080005, b"CS", b"ISO_IR 9999\\\xff\xfe")), "hu"),
    "a charset of bits": (inserted(element(0x00080005, b"US", b"\xff\xfe\x00")), "hu"),
    "spacing of 4 GiB": (rewritten_long("PixelSpacing", b"UT", 2**32 - 2), "BAD_HEADER"),
    "slope twice": (inserted(element(0x00281053, b"DS", b"2 ")), "BAD_HEADER"),
    "rows twice": (inserted(element(0x00280010, b"US", b"\x2c\x00")), "BAD_HEADER"),
    "everything empty": (all_empty, "BAD_PIXEL_FORMAT"),
    # pixels that are none of CT
    "12 bits of 16": (stored(12, 0), "hu"),
    "12 bits of 16, signed": (stored(13, 1), "hu"),
    "an overlay in the high bits": (stored(12, 0, above=0b1010), "hu"),
    "the wrong sign in the high bits": (stored(13, 1, above=0b101), "hu"),
    "an overlay plane of 65535 x 65535": (
        inserted(element(0x60000010, b"US", b"\xff\xff") + element(0x60000011, b"US", b"\xff\xff")),
        "hu",
    ),
    "1 bit": (changed(BitsAllocated=1, BitsStored=1, HighBit=0), "BAD_PIXEL_FORMAT"),
    "32 bits": (changed(BitsAllocated=32, BitsStored=32, HighBit=31), "BAD_PIXEL_FORMAT"),
    "high bit 40": (changed(BitsStored=12, HighBit=40), "BAD_PIXEL_FORMAT"),
    "sign 7": (changed(PixelRepresentation=7), "BAD_PIXEL_FORMAT"),
    "no rows": (changed(Rows=0), "BAD_PIXEL_FORMAT"),
    "colour": (rgb, "BAD_PIXEL_FORMAT"),
    "a palette": (palette, "BAD_PIXEL_FORMAT"),
}


def sparse(content: bytes) -> Trap:
    """Three gigabytes that take no room."""

    def trap(folder: Path) -> None:
        with (folder / "4.dcm").open("wb") as file:
            file.write(content)
            file.truncate(3 * 2**30)

    return trap


def grown(folder: Path) -> None:
    sparse((folder / "4.dcm").read_bytes())(folder)


def private_without_end(folder: Path) -> None:
    """A private value of undefined length, which ends nowhere."""
    file = (folder / "4.dcm").read_bytes()
    sparse(file[: body_offset(file)] + element(0x00091010, b"OB", ITEM, UNDEFINED))(folder)


def link(target: str, name: str = "link.dcm") -> Trap:
    return lambda folder: (folder / name).symlink_to(target)


TRAPS: dict[str, tuple[Trap, str]] = {
    "a pipe": (lambda folder: os.mkfifo(folder / "pipe.dcm"), "hu"),
    "a link to an endless device": (link("/dev/zero"), "hu"),
    "a link to the terminal": (link("/dev/tty"), "hu"),
    "a link to nothing": (link("absent"), "UNREADABLE"),
    "a link to itself": (link("link.dcm"), "UNREADABLE"),
    "a file that cannot be read": (link("/proc/self/mem"), "UNREADABLE"),
    "a folder in itself": (link(".", "folder"), "hu"),
    "a folder named as a file": (lambda folder: (folder / "folder.dcm").mkdir(), "hu"),
    "an empty file": (lambda folder: (folder / "empty.dcm").touch(), "NOT_DICOM"),
    "a name that is no text": (lambda folder: (folder / "caf\udce9.dcm").touch(), "NOT_DICOM"),
    "3 GiB of nothing": (sparse(b""), "NOT_DICOM"),
    "3 GiB of nothing behind the pixels": (grown, "hu"),
    "3 GiB of nothing behind the prefix": (sparse(bytes(128) + b"DICM"), "TOO_LARGE"),
    "3 GiB of nothing, deflated": (sparse(with_meta(b"", uid.DeflatedExplicitVRLittleEndian)), "BAD_HEADER"),
    "3 GiB without end": (private_without_end, "BAD_HEADER"),
}
