"""The compressed bytes of one frame to stored values: one codec of imagecodecs per transfer syntax.

The bytes are untrusted. Before anything is decoded, the size inside the code stream must be the header's, and the end
marker must be there: decoders fill up a stream that was cut, without a word. imagecodecs is imported where it is used,
so that uncompressed images do without it.
"""

import struct
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8, UInt16
from pydicom import uid

from mp3d.errors import Refusal

JPEG_EXTENDED = frozenset({uid.JPEGExtended12Bit})
JPEG_LOSSLESS = frozenset({uid.JPEGLossless, uid.JPEGLosslessSV1})
JPEG_LS = frozenset({uid.JPEGLSLossless, uid.JPEGLSNearLossless})
JPEG_2000 = frozenset({uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K})
LOSSY = JPEG_EXTENDED | {uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K}
COMPRESSED = JPEG_EXTENDED | JPEG_LOSSLESS | JPEG_LS | JPEG_2000 | {uid.RLELossless}

MAX_TILES = 1024
"""Of a JPEG 2000 frame; decoders reserve kilobytes for each tile that a few bytes claim."""
MAX_PADDING = 12
"""Bytes behind the end marker; one makes the length even, and some writers add more."""

SOI, SOS, DHT, DRI, EOI = b"\xff\xd8", 0xDA, 0xC4, 0xDD, b"\xff\xd9"
BASELINE, EXTENDED, LOSSLESS, JPEG_LS_FRAME = 0xC0, 0xC1, 0xC3, 0xF7
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC} | {JPEG_LS_FRAME}
"""Markers of JPEG (ITU-T T.81 B.1.1.3) and JPEG-LS (T.87 C.1.1); those of frame headers name the coding process."""
SOC_SIZ = b"\xff\x4f\xff\x51"
"""How a JPEG 2000 code stream begins (T.800 A.4.1, A.5.1)."""


class Decoded(NamedTuple):
    """The stored values of a frame as bits; the lower ``precision`` of the 16 count."""

    bits: UInt16[np.ndarray, "h w"]
    precision: int
    signed: bool = False
    """Whether the code stream says that they are signed, as JPEG 2000 alone can."""


def decode_frame(frame: bytes, transfer_syntax: str, rows: int, columns: int) -> Decoded:
    """Decode one frame of one sample per pixel; what its bytes claim must be ``rows`` and ``columns``.

    Raises:
        Refusal: ``DECODE_FAILED``, without the name of the slice.
    """
    try:
        if transfer_syntax == uid.RLELossless:
            return Decoded(_decode_rle(frame, rows * columns).reshape(rows, columns), 16)
        if transfer_syntax in JPEG_2000:
            return _decode_jpeg_2000(frame, rows, columns)
        if transfer_syntax in JPEG_LS:
            return _decode_jpeg_ls(frame, rows, columns)
        if transfer_syntax in JPEG_LOSSLESS:
            return _decode_jpeg_lossless(frame, rows, columns)
        return _decode_jpeg_extended(frame, rows, columns)
    except Refusal:
        raise
    except Exception as error:  # a decoder raises whatever broken bytes drive it into
        raise _refusal(f"the compressed pixels are damaged ({type(error).__name__})") from error


def _decode_rle(frame: bytes, count: int) -> UInt16[np.ndarray, " n"]:
    """A run-length coded frame of 16 bits (DICOM PS3.5 G): all high bytes, then all low bytes."""
    num_segments, *offsets = struct.unpack_from("<16I", frame)
    if num_segments != 2 or not 64 <= offsets[0] < offsets[1] < len(frame):
        raise _refusal(f"{num_segments} run-length segments do not hold 16-bit pixels")
    stored = np.empty((count, 2), np.uint8)
    for index, (start, stop) in enumerate(pairwise((*offsets[:2], len(frame)))):
        stored[:, 1 - index] = np.frombuffer(_unpack_bits(frame[start:stop], count), np.uint8)
    return stored.view("<u2")[:, 0]


def _unpack_bits(segment: bytes, count: int) -> bytes:
    """Exactly ``count`` bytes; what decodes to more or fewer is damaged. Zeros may follow: two decode to one."""
    from imagecodecs import packbits_decode

    padding = len(segment) - len(segment.rstrip(b"\0"))
    values = bytes(packbits_decode(segment, out=count + padding // 2))
    if len(values) < count or any(values[count:]):
        raise _refusal(f"a run-length segment decodes to another number of bytes than {count}")
    return values[:count]


def _decode_jpeg_2000(frame: bytes, rows: int, columns: int) -> Decoded:
    """JPEG 2000 and its high-throughput variant; by OpenJPEG, whatever the variant."""
    from imagecodecs import jpeg2k_decode

    begin = max(frame.find(SOC_SIZ, 0, 1024), 0)  # behind the boxes of a JP2 file, which some writers leave around it
    stream = _to_end_marker(frame[begin:], SOC_SIZ)
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = struct.unpack_from(">8I", stream, 8)
    samples, depth, x_step, y_step = struct.unpack_from(">H3B", stream, 40)
    precision = (depth & 0x7F) + 1
    _check_claim((bottom - top, right - left, samples, precision), rows, columns)
    num_tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if (x_step, y_step) != (1, 1) or not 1 <= num_tiles <= MAX_TILES:
        raise _refusal(f"{num_tiles} tiles of every {x_step} x {y_step} pixels, at most {MAX_TILES} of 1 x 1 are read")
    return _checked(jpeg2k_decode(stream), rows, columns, precision)


def _decode_jpeg_ls(frame: bytes, rows: int, columns: int) -> Decoded:
    from imagecodecs import jpegls_decode

    stream = _to_end_marker(frame, SOI)
    header = _jpeg_header(stream, {JPEG_LS_FRAME})
    _check_claim(header.claim, rows, columns)
    return _checked(jpegls_decode(stream), rows, columns, header.precision)


def _decode_jpeg_lossless(frame: bytes, rows: int, columns: int) -> Decoded:
    from imagecodecs import jpeg8_decode

    stream = _to_end_marker(frame, SOI)
    header = _jpeg_header(stream, {LOSSLESS})
    _check_claim(header.claim, rows, columns)
    decoded = _checked(jpeg8_decode(stream), rows, columns, header.precision)
    _check_coded_length(stream, header, decoded.bits)
    return decoded


def _decode_jpeg_extended(frame: bytes, rows: int, columns: int) -> Decoded:
    """Lossy, of up to 12 bits."""
    from imagecodecs import jpeg8_decode

    stream = _to_end_marker(frame, SOI)
    header = _jpeg_header(stream, {BASELINE, EXTENDED})
    _check_claim(header.claim, rows, columns)
    return _checked(jpeg8_decode(stream), rows, columns, header.precision)


class _JpegHeader(NamedTuple):
    """What a JPEG or JPEG-LS stream says before its scan."""

    precision: int
    rows: int
    columns: int
    samples: int
    segments: tuple[tuple[int, bytes], ...]
    """Marker and content of each, in order; the last is the scan header."""
    scan: int
    """Where the coded bytes begin."""

    @property
    def claim(self) -> tuple[int, int, int, int]:
        return self.rows, self.columns, self.samples, self.precision

    def contents(self, marker: int) -> list[bytes]:
        return [content for other, content in self.segments if other == marker]


def _jpeg_header(stream: bytes, processes: set[int]) -> _JpegHeader:
    segments: list[tuple[int, bytes]] = []
    at = len(SOI)
    while not segments or segments[-1][0] != SOS:
        ff, marker, length = struct.unpack_from(">BBH", stream, at)
        if ff != 0xFF or length < 2:
            raise _refusal("the code stream has no header")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        segments.append((marker, stream[at + 4 : at + 2 + length]))
        at += 2 + length
    frames = [(marker, content) for marker, content in segments if marker in FRAMES]
    if len(frames) != 1 or frames[0][0] not in processes:
        raise _refusal("the code stream is of another coding process than the transfer syntax (0002,0010)")
    precision, rows, columns, samples = struct.unpack_from(">BHHB", frames[0][1])
    return _JpegHeader(precision, rows, columns, samples, tuple(segments), at)


def _check_coded_length(stream: bytes, header: _JpegHeader, values: UInt16[np.ndarray, "h w"]) -> None:
    """Count the bits that the values take in lossless JPEG (T.81 H.1.2): as many as there are, or it is damaged.

    The decoder fills up what is missing and passes over what is left without a word.
    """
    _, _, tables, predictor, _, shift = header.contents(SOS)[0][:6]
    interval = sum(int.from_bytes(content) for content in header.contents(DRI)[-1:]) or values.size
    restarts = range(0, len(values), max(interval // values.shape[1], 1))
    unshifted = values >> np.uint16(shift & 15) if shift & 15 else values
    differences = _differences(unshifted, predictor, restarts, header.precision - (shift & 15))
    bits = _coded_bits(header, tables >> 4).take(differences, mode="clip")  # no value is clipped, only no check made
    coded = stream[header.scan : -len(EOI)].rstrip(b"\xff")
    raw = np.frombuffer(coded, np.uint8)
    num_stuffed = np.count_nonzero(raw[np.flatnonzero(raw[:-1] == 0xFF) + 1] == 0)
    given = len(coded) - num_stuffed - 2 * (len(restarts) - 1)
    ends = [*restarts[1:], len(values)]
    needed = sum(-(-int(bits[start:end].sum(dtype=np.uint32)) // 8) for start, end in zip(restarts, ends, strict=True))
    if given != needed:
        raise _refusal(f"the pixels take {needed} coded bytes, there are {given}")


def _differences(
    values: UInt16[np.ndarray, "h w"], predictor: int, restarts: range, precision: int
) -> UInt16[np.ndarray, "h w"]:
    """What lossless JPEG codes: values less their prediction, modulo 2^16 (T.81 H.1.2.1, table H.1)."""
    predicted = np.empty_like(values)
    predicted[1:, 0] = values[:-1, 0]
    if predictor == 1:
        predicted[:, 1:] = values[:, :-1]
    else:
        left, above, corner = values[1:, :-1], values[:-1, 1:], values[:-1, :-1]
        if predictor > 3:
            left, above, corner = (part.astype(np.int32) for part in (left, above, corner))
        predicted[1:, 1:] = {
            2: lambda: above,
            3: lambda: corner,
            4: lambda: left + above - corner,
            5: lambda: left + ((above - corner) >> 1),
            6: lambda: above + ((left - corner) >> 1),
            7: lambda: (left + above) >> 1,
        }[predictor]()
    for row in restarts:
        predicted[row, 0] = 1 << (precision - 1)
        predicted[row, 1:] = values[row, :-1]
    return values - predicted


def _coded_bits(header: _JpegHeader, destination: int) -> UInt8[np.ndarray, "65536"]:
    """Of each difference modulo 2^16, the bits of its Huffman code and of its magnitude (T.81 B.2.4.2, table H.2)."""
    bits = np.zeros(17, np.uint8)
    for content in header.contents(DHT):
        while content:
            lengths = np.repeat(np.arange(1, 17, dtype=np.uint8), list(content[1:17]))
            symbols = np.frombuffer(content[17 : 17 + len(lengths)], np.uint8)
            if content[0] == destination:
                bits[symbols] = lengths + symbols % 16  # category 16 has no magnitude: it is one value
            content = content[17 + len(lengths) :]
    by_difference = np.empty(2**16, np.uint8)
    by_difference[0], by_difference[2**15] = bits[0], bits[16]
    for category in range(1, 16):
        low, high = 1 << (category - 1), 1 << category
        by_difference[low:high] = by_difference[2**16 - high + 1 : 2**16 - low + 1] = bits[category]
    return by_difference


def _to_end_marker(frame: bytes, begin: bytes) -> bytes:
    """The code stream without the bytes behind its end marker, which is the same in all JPEG families."""
    end = frame.rfind(EOI, -len(EOI) - MAX_PADDING)
    if not frame.startswith(begin) or end < 0:
        which = "end" if frame.startswith(begin) else "start"
        raise _refusal(f"the code stream has no {which} marker")
    return frame[: end + len(EOI)]


def _check_claim(claim: tuple[int, int, int, int], rows: int, columns: int) -> None:
    if claim[:3] != (rows, columns, 1) or not 1 <= claim[3] <= 16:
        raise _refusal(
            "the code stream has {} rows, {} columns, {} samples of {} bits; ".format(*claim)
            + f"the header says {rows}, {columns} and 1 of at most 16"
        )


def _checked(decoded: np.ndarray, rows: int, columns: int, precision: int) -> Decoded:
    if decoded.shape != (rows, columns) or decoded.dtype.itemsize > 2:
        raise _refusal(f"the code stream decodes to {decoded.shape} of {decoded.dtype} instead of ({rows}, {columns})")
    signed = decoded.dtype.kind == "i"
    bits = decoded.astype(np.int16 if signed else np.uint16, copy=False).view(np.uint16)
    return Decoded(bits, precision, signed)


def _refusal(detail: str) -> Refusal:
    return Refusal("DECODE_FAILED", f"{detail}; copy or export it again")
