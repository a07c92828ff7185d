"""How well two masks agree: Dice by voxels, and the distance of their surfaces in millimetres."""

import numpy as np
from jaxtyping import Bool, Float, Int, Int64
from scipy.ndimage import binary_erosion, distance_transform_edt

from mp3d.config import UNKNOWN
from mp3d.errors import DataError

Counts = Int64[np.ndarray, "classes 3"]
"""Of each class of the foreground: voxels in both masks, in the predicted one, in the true one."""


def overlap_counts(predicted: Int[np.ndarray, "*s"], true: Int[np.ndarray, "*s"], num_classes: int) -> Counts:
    """Voxels of unknown truth are not counted.

    Args:
        num_classes: of the foreground, 1..num_classes.

    Raises:
        DataError: masks of different shape.
    """
    if predicted.shape != true.shape:
        raise DataError(f"the predicted mask is {predicted.shape}, the true one {true.shape}; they must be one grid")
    known = true != UNKNOWN
    predicted, true = predicted[known].astype(np.int64), true[known].astype(np.int64)
    both, ours, theirs = (
        np.bincount(classes, minlength=num_classes + 1)[1 : num_classes + 1]
        for classes in (predicted[predicted == true], predicted, true)
    )
    return np.stack([both, ours, theirs], axis=1)


def dice(counts: Int64[np.ndarray, "*c 3"]) -> Float[np.ndarray, "*c"]:
    """Twice what both have over the sum of both; NaN where neither has a voxel: there is nothing to agree on."""
    both, sizes = counts[..., 0], counts[..., 1] + counts[..., 2]
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), np.nan)


def hausdorff_95(
    predicted: Bool[np.ndarray, "d h w"], true: Bool[np.ndarray, "d h w"], spacing_mm: tuple[float, float, float]
) -> float:
    """The larger of the 95th percentiles of the distances from each surface to the other, in mm.

    A surface is the voxels of a mask that have a neighbour (of six) outside it, or lie at the rim of the volume.
    MONAI's ``compute_hausdorff_distance(percentile=95)`` does the same; medpy's ``hd95`` takes one percentile of all
    distances together.

    Args:
        spacing_mm: along the axes of the masks.

    Returns:
        NaN where one of the masks is empty.
    """
    if not predicted.any() or not true.any():
        return float("nan")
    part = _box_around(predicted | true)
    predicted, true = predicted[part], true[part]
    ours, theirs = (mask & np.logical_not(binary_erosion(mask)) for mask in (predicted, true))
    return max(_percentile_95(ours, theirs, spacing_mm), _percentile_95(theirs, ours, spacing_mm))


def _percentile_95(of: np.ndarray, to: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    """Of the distances from the voxels of one surface to the nearest ones of the other."""
    distances = np.asarray(distance_transform_edt(np.logical_not(to), sampling=spacing_mm))
    return float(np.percentile(distances[of], 95))


def _box_around(mask: Bool[np.ndarray, "d h w"]) -> tuple[slice, ...]:
    """What holds all of a mask: distances between surfaces inside it need nothing else."""
    axes = range(mask.ndim)
    ends = [np.flatnonzero(mask.any(axis=tuple(other for other in axes if other != axis)))[[0, -1]] for axis in axes]
    return tuple(slice(int(first), int(last) + 1) for first, last in ends)
