"""Tiny made data straight from memory, one kind for each head: what a network must learn is there in plain sight.

For smoke tests of recipes and for the tests; the demo's world, which is harder, is written to files in true formats
(:mod:`mp3d.data.synthetic`).
"""

from io import BytesIO

import numpy as np
from PIL import Image

from mp3d.data.series import CTSeries, Picture, Truth, Volume
from mp3d.data.source import PictureBatch

BRIGHT_HU = 900


def blob_series(index: int, *, size: int = 32, num_slices: int = 11, spacing_mm: float = 2.5) -> CTSeries:
    """Noise with one bright box on three slices; the other slices were searched and hold nothing."""
    rng = np.random.default_rng(index)
    hu = rng.normal(0, 20, (num_slices, size, size)).astype(np.int16)
    truths = [Truth(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)) for _ in range(num_slices)]
    x, y = rng.integers(2, size - 12, 2)
    for z in range(4, 7):
        hu[z, y : y + 9, x : x + 8] += BRIGHT_HU
        truths[z] = Truth(np.array([[x, y, x + 8, y + 9]], np.float32), np.ones(1, np.int64))
    volume = Volume(hu, np.diag([0.8, 0.8, spacing_mm, 1.0]))
    return CTSeries(f"patient {index}", f"study {index}", f"series {index}", volume, tuple(truths))


def ball_series(index: int, *, label: int | None = None, size: int = 26, num_slices: int = 14) -> CTSeries:
    """Noise with a bright ball that a mask marks as class 1, small if of label 0; 2 mm slices, 1 mm pixels."""
    rng = np.random.default_rng([index, 7])
    hu = rng.normal(0, 20, (num_slices, size, size)).astype(np.int16)
    centre = np.array([num_slices, size, size]) / 2 + rng.uniform(-2, 2, 3)
    z, y, x = np.ogrid[:num_slices, :size, :size]
    radius = np.sqrt(((z - centre[0]) * 2) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)
    ball = radius <= rng.uniform(6, 8) / (2 if label == 0 else 1)
    hu[ball] += BRIGHT_HU
    truths = tuple(Truth(mask=plane.astype(np.uint8)) for plane in ball)
    volume = Volume(hu, np.diag([1.0, 1.0, 2.0, 1.0]))
    return CTSeries(f"patient {index}", f"study {index}", f"series {index}", volume, truths, image_label=label)


def shaded_batch(split: str, count: int) -> PictureBatch:
    """Dark pictures with a bright rectangle, in a box and marked by a mask as class 1."""
    pictures = []
    for index in range(count):
        rng = np.random.default_rng([index, len(split), 3])
        mask = np.zeros((24, 32), np.uint8)
        y, x = rng.integers(0, 12, 2)
        mask[y : y + 10, x : x + 16] = 1
        boxes, labels = np.array([[x, y, x + 16, y + 10]], np.float32), np.ones(1, np.int64)
        pixels = (rng.integers(0, 60, (24, 32, 3)) + 150 * mask[..., None]).astype(np.uint8)
        pictures.append(Picture(f"{split}/{index}", _jpeg(pixels), 24, 32, truth=Truth(boxes, labels, mask=mask)))
    return PictureBatch(tuple(pictures))


def picture_batch(split: str, count: int) -> PictureBatch:
    """Dark and bright pictures, labels 0 and 1."""
    pictures = []
    for index in range(count):
        label = index % 2
        rng = np.random.default_rng([index, len(split)])
        pixels = (rng.integers(0, 60, (24, 24, 3)) + 150 * label).astype(np.uint8)
        path = _jpeg(pixels)
        pictures.append(Picture(f"{split}/{index}", path, 24, 24, image_label=label))
    return PictureBatch(tuple(pictures))


def _jpeg(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()
