"""An encoder of lossless JPEG, for all seven predictors, of which no library writes all with every option."""

import struct

import numpy as np
from jaxtyping import Integer


def lossless_jpeg(
    values: Integer[np.ndarray, "h w"], precision: int, predictor: int, shift: int, restart_rows: int
) -> bytes:
    """Lossless JPEG written down from ITU-T T.81 H.1.2, pixel by pixel; every category has a code of five bits."""
    rows, columns = values.shape
    v = (values >> shift).tolist()
    coded, bits = b"", ""
    for y in range(rows):
        first = y == 0 or (restart_rows > 0 and y % restart_rows == 0)
        if first and y:
            coded += _bytes(bits) + bytes([0xFF, 0xD0 + (y // restart_rows - 1) % 8])
            bits = ""
        for x in range(columns):
            if first:
                predicted = v[y][x - 1] if x else 1 << (precision - shift - 1)
            elif x == 0:
                predicted = v[y - 1][0]
            else:
                a, b, c = v[y][x - 1], v[y - 1][x], v[y - 1][x - 1]
                predicted = (a, b, c, a + b - c, a + ((b - c) >> 1), b + ((a - c) >> 1), (a + b) >> 1)[predictor - 1]
            difference = (v[y][x] - predicted + 32767) % 65536 - 32767
            category = abs(difference).bit_length()
            bits += f"{category:05b}"
            if 0 < category < 16:
                bits += f"{difference if difference > 0 else difference + (1 << category) - 1:0{category}b}"
    coded += _bytes(bits)
    return b"".join(
        (
            b"\xff\xd8",
            _segment(0xC3, struct.pack(">BHHB3B", precision, rows, columns, 1, 1, 0x11, 0)),
            _segment(0xC4, bytes([0, *[0] * 4, 17, *[0] * 11, *range(17)])),
            _segment(0xDD, struct.pack(">H", restart_rows * columns)) if restart_rows else b"",
            _segment(0xDA, bytes([1, 1, 0, predictor, 0, shift])),
            coded,
            b"\xff\xd9",
        )
    )


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _bytes(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    return int("1" + bits, 2).to_bytes(len(bits) // 8 + 1)[1:].replace(b"\xff", b"\xff\0")
