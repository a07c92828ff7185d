"""Small colour pictures whose class lies between their planes: for pre-training by planes as depth (VDT paper).

A class is a shape and a relation. Every plane shows two objects of that shape; they either stand at the same places in
all three planes, as a vessel on neighbouring slices does, or each has a place of its own, as a lesion that comes and
goes. One plane alone says nothing about the relation, nor does the number of objects, nor the order of the planes,
which VDT shuffles.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

OBJECTS_PER_PLANE = 2
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: 1 - np.hypot(x, y),
    "ring": lambda x, y: 0.3 - np.abs(np.hypot(x, y) - 0.85),
    "bar": lambda x, y: np.minimum(0.4 - np.abs(y), 1.25 - np.abs(x)),
    "cross": lambda x, y: np.maximum(
        np.minimum(0.3 - np.abs(y), 1.15 - np.abs(x)), np.minimum(0.3 - np.abs(x), 1.15 - np.abs(y))
    ),
}
"""Distance inside the edge (negative: outside) at object coordinates, whose unit is the radius."""
RELATIONS = ("same_place", "own_place")


def write_picture_world(folder: Path, *, num_per_class: int, seed: int, size_px: int = 64) -> tuple[str, ...]:
    """Write JPEGs to ``train/<class>/``, and a quarter as many to ``val/<class>/``; same seed, same bytes.

    Returns:
        The class names, sorted.
    """
    names = sorted(f"{shape}_{relation}" for shape in SHAPES for relation in RELATIONS)
    for split_index, (split, number) in enumerate({"train": num_per_class, "val": max(1, num_per_class // 4)}.items()):
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            shape, relation = name.split("_", 1)
            for index in range(number):
                rng = np.random.default_rng([seed, split_index, label, index])
                picture = Image.fromarray(draw_picture(rng, shape, relation, size_px))
                # No chroma subsampling: it would smear the planes into each other.
                picture.save(folder / split / name / f"{index:05d}.jpg", quality=92, subsampling=0)
    return tuple(names)


def draw_picture(rng: np.random.Generator, shape: str, relation: str, size_px: int) -> np.ndarray:
    """One picture, ``(h, w, 3)`` uint8."""
    radius = rng.uniform(0.06, 0.11) * size_px
    places = _places(rng, 3 * OBJECTS_PER_PLANE, size_px, 1.3 * radius).reshape(3, OBJECTS_PER_PLANE, 2)
    angles = rng.uniform(0, np.pi, (3, OBJECTS_PER_PLANE))
    if relation == "same_place":
        places[:], angles[:] = places[0], angles[0]
    background = _texture(rng, (1, size_px, size_px), 20) + _texture(rng, (3, size_px, size_px), 8)
    planes = rng.uniform(60, 130) + rng.uniform(-15, 15, (3, 1, 1)) + background
    y, x = np.mgrid[:size_px, :size_px].astype(np.float32)
    for plane in range(3):
        for number in range(OBJECTS_PER_PLANE):
            cx, cy = places[plane, number] + rng.uniform(-0.1, 0.1, 2) * radius
            angle = angles[plane, number]
            along = (np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)) / radius
            across = (np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)) / radius
            inside = np.clip(SHAPES[shape](along, across) * radius + 0.5, 0, 1)
            planes[plane] += inside * rng.uniform(60, 100)
    planes += rng.normal(0, 6, planes.shape)
    return np.clip(planes, 0, 255).round().astype(np.uint8).transpose(1, 2, 0)


def _places(rng: np.random.Generator, number: int, size_px: int, reach_px: float) -> np.ndarray:
    """Centres ``(number, 2)`` at least two reaches apart."""
    while True:
        places = rng.uniform(reach_px, size_px - reach_px, (number, 2))
        apart = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(number)
        if apart.min() > 2 * reach_px:
            return places


def _texture(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Clouds a few pixels to a quarter of the picture wide."""
    clouds = np.zeros(shape)
    for sigma in (2, shape[-1] / 12):
        clouds += gaussian_filter(rng.standard_normal(shape), (0, sigma, sigma)) * sigma
    return clouds * std / clouds.std()
