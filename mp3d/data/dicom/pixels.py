"""Pixel Data of one slice to Hounsfield units, sizes checked before anything is decoded.

Hounsfield units are slope x stored value + intercept (DICOM PS3.3 C.11.1), each slice with its own slope and intercept.
MONOCHROME1 says how to display a value, not what it is, so it changes nothing here.
"""

from io import SEEK_END, BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int16, Integer, UInt16
from pydicom import uid

from mp3d.data.dicom.decoders import COMPRESSED, LOSSY, Decoded, decode_frame
from mp3d.data.dicom.elements import ITEM, SEQUENCE_DELIMITER, File, open_body, open_source
from mp3d.data.dicom.header import Header
from mp3d.data.series import AIR_HU
from mp3d.errors import Refusal

NATIVE = frozenset(
    {
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    }
)
SUPPORTED = NATIVE | COMPRESSED

MAX_SLICE_PIXELS = 4096 * 4096
"""A few bytes of RLE can claim any size."""
MAX_GROWTH, MAX_EXTRA_BYTES = 2, 2**20
"""No coder lets pixels grow to more than these times and bytes."""
MIN_SLOPE, MAX_SLOPE = 1e-4, 1e3
MAX_INTERCEPT = 1e5
"""Beyond these, 16-bit integers give no Hounsfield units of a patient."""
HOUNSFIELD = frozenset({"", "HU", "HOUNSFIELD", "HOUNSFIELD UNITS", "US", "UNSPECIFIED"})
"""Values of Rescale Type; some scanners call their Hounsfield units unspecified."""
INT16 = np.iinfo(np.int16)


def check_pixel_format(header: Header) -> None:
    """What can be said of the pixels from the header alone.

    Raises:
        Refusal: ``NO_PIXELS``, ``TRUNCATED``, ``UNSUPPORTED_TRANSFER_SYNTAX``, ``BAD_PIXEL_FORMAT``, ``TOO_LARGE`` or
            ``PIXEL_LENGTH``.
    """
    if header.pixels is None and not header.cut:
        raise Refusal("NO_PIXELS", f"{header.label} has no Pixel Data (7FE0,0010); export it with its pixels")
    if header.pixels is None or header.cut:
        where = "before" if header.pixels is None else "inside"
        raise Refusal("TRUNCATED", f"{header.label} ends {where} Pixel Data (7FE0,0010); copy it again")
    if header.transfer_syntax not in SUPPORTED:
        known = header.transfer_syntax in uid.AllTransferSyntaxes
        name = uid.UID(header.transfer_syntax).name if known else "a private or unknown transfer syntax"
        raise Refusal(
            "UNSUPPORTED_TRANSFER_SYNTAX",
            f"{header.label} is stored as {name} (0002,0010); export it uncompressed, or as RLE, JPEG "
            "lossless, JPEG-LS or JPEG 2000",
        )
    if problems := _format_problems(header):
        raise Refusal("BAD_PIXEL_FORMAT", f"{header.label}: {', '.join(problems)}; export the original CT images")
    if header.rows * header.columns > MAX_SLICE_PIXELS:
        size = f"{header.rows} x {header.columns} pixels"
        raise Refusal("TOO_LARGE", f"{header.label} has {size}, at most {MAX_SLICE_PIXELS} are read")
    native = header.transfer_syntax in NATIVE
    expected = header.rows * header.columns * 2 if native else None
    if header.pixels.length != expected and (native or not header.frame):
        given, right = ("an undefined number of" if n is None else n for n in (header.pixels.length, expected))
        raise Refusal(
            "PIXEL_LENGTH",
            f"{header.label}: Pixel Data (7FE0,0010) has {given} bytes, {header.rows} rows of {header.columns} "
            f"{'uncompressed' if native else 'compressed'} pixels have {right}; copy or export it again",
        )


def _format_problems(header: Header) -> list[str]:
    problems = []
    if header.samples_per_pixel != 1:
        problems.append(f"{header.samples_per_pixel} samples per pixel (0028,0002) instead of 1")
    if header.photometric_interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        problems.append("Photometric Interpretation (0028,0004) is neither MONOCHROME1 nor MONOCHROME2")
    if header.bits_allocated != 16:
        problems.append(f"{header.bits_allocated} Bits Allocated (0028,0100) instead of 16")
    if not 1 <= header.bits_stored <= 16 or header.high_bit != header.bits_stored - 1:
        bits = f"{header.bits_stored} Bits Stored (0028,0101) with High Bit (0028,0102) {header.high_bit}"
        problems.append(f"{bits} make no 16-bit integer")
    if header.pixel_representation not in (0, 1):
        problems.append("Pixel Representation (0028,0103) is neither 0 nor 1")
    if not (header.rows and header.columns):
        problems.append(f"{header.rows} rows (0028,0010) and {header.columns} columns (0028,0011)")
    return problems


def check_rescale(header: Header) -> None:
    """Hounsfield units need a slope and an intercept that make sense.

    Raises:
        Refusal: ``MISSING_RESCALE``, ``BAD_RESCALE`` or ``NOT_HU``.
    """
    slope, intercept = header.rescale_slope, header.rescale_intercept
    if slope is None or intercept is None:
        missing = "Slope (0028,1053)" if slope is None else "Intercept (0028,1052)"
        raise Refusal("MISSING_RESCALE", f"{header.label} has no Rescale {missing}; export the original CT images")
    if not (MIN_SLOPE <= abs(slope) <= MAX_SLOPE and abs(intercept) <= MAX_INTERCEPT):  # NaN fails both
        raise Refusal(
            "BAD_RESCALE",
            f"{header.label}: Rescale Slope (0028,1053) {slope:g} and Intercept (0028,1052) {intercept:g} give no "
            "Hounsfield units; export the original CT images",
        )
    if header.has_modality_lut:
        raise Refusal(
            "BAD_RESCALE",
            f"{header.label} has a Modality LUT Sequence (0028,3000) beside slope and intercept, of which only one may "
            "be there; export the original CT images",
        )
    if not HOUNSFIELD.issuperset(header.rescale_type.split("\\")):
        raise Refusal("NOT_HU", f"{header.label}: Rescale Type (0028,1054) is not HU; leave this series out")


def read_hu(header: Header, out: Int16[np.ndarray, "h w"] | None = None) -> Int16[np.ndarray, "h w"]:
    """Read one slice: decoded, rescaled in float32, rounded once, clipped to int16.

    Args:
        out: where it is to lie, C-contiguous; what is not compressed is read to there and copied no more.

    Raises:
        Refusal: as :func:`check_pixel_format`, :func:`check_rescale` and :func:`read_stored`.
    """
    check_pixel_format(header)
    check_rescale(header)
    out = np.empty((header.rows, header.columns), np.int16) if out is None else out
    stored, padding = _read(header, out.view(np.uint16))
    _to_hu(stored, header, out)
    if padding is not None:
        out[padding] = AIR_HU
    return out


def _to_hu(stored: Integer[np.ndarray, "h w"], header: Header, out: Int16[np.ndarray, "h w"]) -> None:
    intercept = header.rescale_intercept or 0.0
    if header.rescale_slope == 1 and intercept.is_integer():  # nearly always, and then integers give the same
        low, high = int(stored.min()) + intercept, int(stored.max()) + intercept
        if INT16.min <= low and high <= INT16.max:
            np.add(stored.view(np.int16), np.int64(intercept).astype(np.int16), out=out)
            return
    hu = stored.astype(np.float32)
    hu *= np.float32(header.rescale_slope)
    hu += np.float32(intercept)
    np.rint(hu, out=hu)
    out[...] = np.clip(hu, INT16.min, INT16.max, out=hu)


def read_stored(header: Header, room: UInt16[np.ndarray, "h w"] | None = None) -> Integer[np.ndarray, "h w"]:
    """The stored values of one slice whose format was checked.

    Args:
        room: overwritten; what is not compressed is read to there, and may be returned as a view of it.

    Raises:
        Refusal: ``UNREADABLE``, ``TRUNCATED`` or ``DECODE_FAILED``.
    """
    return _read(header, room)[0]


def _read(
    header: Header, room: UInt16[np.ndarray, "h w"] | None
) -> tuple[Integer[np.ndarray, "h w"], Bool[np.ndarray, "h w"] | None]:
    """The stored values; where padding stands that takes more bits than are stored, if the header speaks of such."""
    try:
        if header.transfer_syntax in NATIVE:
            raw = _read_native(header, room)
            padding = _padding(raw, header)
            return _stored_bits(raw, header.bits_stored, header), padding
        frame = _read_frame(header)
    except OSError as error:
        raise Refusal("UNREADABLE", f"{header.label} cannot be read ({type(error).__name__})") from error
    try:
        decoded = decode_frame(frame, header.transfer_syntax, header.rows, header.columns)
        _check_sign(header, decoded)
    except Refusal as refusal:
        raise Refusal(refusal.reason, f"{header.label}: {refusal.detail}") from refusal
    count = decoded.precision
    if header.transfer_syntax not in LOSSY:  # lossy coders of 16 bits overshoot the bits stored, and mean it
        count = min(count, header.bits_stored)
    return _stored_bits(decoded.bits, count, header), _padding(decoded.bits, header)


def wide_padding(header: Header) -> Integer[np.ndarray, " n"] | None:
    """Pixel Padding Value (and Range Limit), ascending, where it takes more bits than are stored: by the lower bits
    alone it would pass for tissue."""
    if header.bits_stored == 16 or not header.pixel_padding_bits:
        return None
    words = np.array(header.pixel_padding_bits, np.uint16)
    if np.array_equal(_stored_bits(words, header.bits_stored, header).view(np.uint16), words):
        return None
    return np.sort(words.view(np.int16) if header.pixel_representation == 1 else words)


def _padding(raw: UInt16[np.ndarray, "h w"], header: Header) -> Bool[np.ndarray, "h w"] | None:
    padding = wide_padding(header)
    if padding is None:
        return None
    values = raw.view(padding.dtype)
    return (values >= padding[0]) & (values <= padding[-1])


def _open_pixels(header: Header) -> File:
    """The file as it was when its header was read, where the pixels begin."""
    if header.pixels is None:
        raise ValueError("the header has no pixels; check_pixel_format comes first")
    if header.transfer_syntax == uid.DeflatedExplicitVRLittleEndian:
        body = open_body(header.source)
        file, size = body.file, body.size
    else:
        file = open_source(header.source)
        size = file.seek(0, SEEK_END)
    if isinstance(header.source, Path) and size != header.size:
        file.close()
        raise Refusal("UNREADABLE", f"{header.label} has changed since its header was read; prepare it again")
    file.seek(header.pixels.offset)
    return file


def _read_native(header: Header, room: UInt16[np.ndarray, "h w"] | None) -> UInt16[np.ndarray, "h w"]:
    room = np.empty((header.rows, header.columns), np.uint16) if room is None else room
    with _open_pixels(header) as file:
        length = file.readinto(room.data.cast("B"))
    if length != room.nbytes:
        raise Refusal("TRUNCATED", f"{header.label} ends inside Pixel Data (7FE0,0010); copy it again")
    return room.view("<u2" if header.little_endian else ">u2").astype(np.uint16, copy=False)


def _stored_bits(raw: UInt16[np.ndarray, "h w"], count: int, header: Header) -> Integer[np.ndarray, "h w"]:
    """The lower bits alone: those above may hold anything, an overlay or the wrong sign."""
    spare = np.uint16(16 - count)
    if header.pixel_representation == 0:
        return raw & np.uint16((1 << count) - 1) if spare else raw
    return (raw << spare).view(np.int16) >> spare.astype(np.int16) if spare else raw.view(np.int16)


def _check_sign(header: Header, decoded: Decoded) -> None:
    """A code stream that contradicts the header in what the highest bit means can be read in two ways.

    Where both have as many bits, the header is right: files of old archives hold signed values coded as unsigned.
    """
    if decoded.signed and header.pixel_representation == 0:
        doubtful = decoded.bits.view(np.int16).min() < 0
    elif not decoded.signed and header.pixel_representation == 1 and decoded.precision < header.bits_stored:
        doubtful = decoded.bits.max() >> (decoded.precision - 1)
    else:
        doubtful = False
    if doubtful:
        given, said = ("signed" if signed else "unsigned" for signed in (decoded.signed, header.pixel_representation))
        raise Refusal(
            "DECODE_FAILED",
            f"the code stream has {given} values of {decoded.precision} bits, the header {said} ones of "
            f"{header.bits_stored} (0028,0101), (0028,0103); export it again",
        )


def _read_frame(header: Header) -> bytes:
    """The fragments of a frame: a file's own behind the offset table (DICOM PS3.5 A.4), or where the header says."""
    room = header.rows * header.columns * 2 * MAX_GROWTH + MAX_EXTRA_BYTES
    fragments = []
    with _open_pixels(header) as file:
        if header.pixels is not None and header.pixels.length is not None:
            file = BytesIO(file.read(min(header.pixels.length, room)) + SEQUENCE_DELIMITER)
            fragments.append(b"")
        while (tag := file.read(4)) == ITEM:
            length = int.from_bytes(file.read(4), "little")
            room -= length
            if room < 0:
                detail = f"Pixel Data (7FE0,0010) takes over {MAX_GROWTH} times the room of uncompressed pixels"
                raise Refusal("DECODE_FAILED", f"{header.label}: {detail}; copy or export it again")
            fragments.append(file.read(length))
    if tag != SEQUENCE_DELIMITER or len(fragments) < 2:
        raise Refusal(
            "DECODE_FAILED", f"{header.label}: Pixel Data (7FE0,0010) holds no frame; copy or export it again"
        )
    return b"".join(fragments[1:])
