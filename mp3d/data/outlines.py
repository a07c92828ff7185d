"""Outlines of objects in a picture, as COCO has them, to one mask of classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from mp3d.data.masks import fill_contours


@dataclass(frozen=True)
class Outline:
    """Where one object, or one region of many, is: polygons, or runs.

    Attributes:
        polygons: (x, y) points of each part, pixels; the centre of the first pixel is at (0.5, 0.5).
        runs: pixels outside and inside by turns, down the columns from left to right; they add up to the picture.
        size: (rows, columns) of the picture that the runs are of.
    """

    polygons: tuple[Float32[np.ndarray, "_ 2"], ...] = ()
    runs: Int32[np.ndarray, " _"] | None = None
    size: tuple[int, int] | None = None

    @property
    def area(self) -> float:
        """In pixels; of polygons that cross neither themselves nor each other."""
        if self.runs is not None:
            return float(self.runs[1::2].sum())
        turned = ((points.T, np.roll(points, -1, axis=0).T) for points in self.polygons)
        return sum(abs(float((x0 * y1 - x1 * y0).sum())) / 2 for (x0, y0), (x1, y1) in turned)

    def fill(self, rows: int, columns: int) -> Bool[np.ndarray, "h w"]:
        """Pixels whose centre lies inside; parts add up."""
        if self.runs is not None:
            inside = np.arange(len(self.runs)) % 2 == 1
            return np.repeat(inside, self.runs).reshape(columns, rows).T
        filled = np.zeros((rows, columns), bool)
        for polygon in self.polygons:
            filled |= fill_contours([polygon - 0.5], (rows, columns))
        return filled


@dataclass(frozen=True)
class Region:
    """An outline and its class, from 1 to 255."""

    label: int
    outline: Outline
    crowd: bool = False
    """A region of many objects."""


def class_mask(regions: Sequence[Region], rows: int, columns: int) -> UInt8[np.ndarray, "h w"]:
    """The class of every pixel, 0 where nothing is: small objects in front of large ones, crowds behind all."""
    mask = np.zeros((rows, columns), np.uint8)
    for region in sorted(regions, key=lambda region: (not region.crowd, -region.outline.area)):
        mask[region.outline.fill(rows, columns)] = region.label
    return mask
