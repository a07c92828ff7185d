"""A checkpoint and a series make a mask.

    series ─► grid of the clip's spacing ─► overlapping blocks ─► mean of their probabilities ─► class of every voxel

Blocks lie half a block apart, as those of the network's training did anywhere. Only the part of the sums that a block
reaches is kept, so memory beside the series and its mask does not grow with the number of slices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int16, UInt8
from scipy import ndimage
from torch import Tensor

from mp3d.checkpoint import Checkpoint, open_checkpoint
from mp3d.config import ClipConfig
from mp3d.data.blocks import axis_steps, resample_plane
from mp3d.data.clips import resample_z
from mp3d.data.regrid import AIR_HU
from mp3d.device import DeviceName, autocast, pick_device, ready_for_inference
from mp3d.errors import CheckpointError
from mp3d.models import ClipSegmenter, build_model
from mp3d.sample import Clip

BLOCKS_AT_ONCE = 4


@dataclass(frozen=True)
class Axis:
    """How blocks cover one axis of a series.

    Attributes:
        positions: of the grid, in (fractional) source indices; those of the padding lie beyond the series.
        starts: first grid index of each block.
        nearest: for each source index the grid index nearest to it.
    """

    positions: Float[np.ndarray, "g"]
    starts: tuple[int, ...]
    nearest: np.ndarray


def cover(num_source: int, step: float, count: int) -> Axis:
    """A grid over one axis, anchored at its first voxel, and blocks of ``count`` voxels half a block apart.

    A grid that is shorter than a block is padded on both sides.

    Args:
        step: source voxels per grid voxel.
    """
    length = int(np.floor((num_source - 1) / step + 1e-6)) + 1
    before = max(count - length, 0) // 2
    positions = (np.arange(max(length, count)) - before) * step
    last = len(positions) - count
    starts = sorted({*range(0, last, max(count // 2, 1)), last})
    nearest = np.minimum(np.floor(np.arange(num_source) / step + 0.5).astype(np.intp), length - 1) + before
    return Axis(positions, tuple(starts), nearest)


@dataclass(frozen=True, eq=False)
class VolumeSegmenter:
    """A segmenter of blocks, ready on its device, in evaluation mode."""

    model: ClipSegmenter
    clip: ClipConfig
    device: torch.device
    autocast_dtype: torch.dtype | None = None

    @classmethod
    def open(cls, checkpoint: Checkpoint | str | Path, device: DeviceName = "auto") -> Self:
        """Load a checkpoint, or the best one of a run.

        Raises:
            CheckpointError: none there, damaged, of another version, or of a model that does not segment CT.
            ResourceError: no such device.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        config = checkpoint.config
        model = build_model(config.model, config.clip)
        if not isinstance(model, ClipSegmenter) or config.clip.block is None:
            raise CheckpointError(
                f"{checkpoint.path} holds a {config.model.head.kind} model that reads no blocks; "
                "give the checkpoint of a segmenter of CT"
            )
        place = pick_device(device)
        model.load_state_dict(checkpoint.model_state())
        return cls(model, config.clip, place, ready_for_inference(model, config.clip, config.loop.precision, place))

    def segment(
        self, hu: Int16[np.ndarray, "d h w"], spacing_mm: tuple[float, float, float]
    ) -> UInt8[np.ndarray, "d h w"]:
        """The class of every voxel, 0 the background; ties go to the lower class.

        Args:
            spacing_mm: z, y, x.
        """
        counts = (self.clip.num_slices, self.clip.image_size, self.clip.image_size)
        steps = axis_steps(self.clip, spacing_mm)
        z, y, x = (cover(*axis) for axis in zip(hu.shape, steps, counts, strict=True))
        classes = np.empty(hu.shape, np.uint8)
        wanted = np.ix_(y.nearest, x.nearest)
        done = 0
        for plane in self._planes(hu, z, y, x):
            while done < len(z.nearest) and z.nearest[done] == plane[0]:
                classes[done] = plane[1][wanted]
                done += 1
        return classes

    def _planes(
        self, hu: Int16[np.ndarray, "d h w"], z: Axis, y: Axis, x: Axis
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "r c"]]]:
        """Classes of the slices of the grid, in order and each once."""
        depth, size = self.clip.num_slices, self.clip.image_size
        shape = (self.model.head.num_classes + 1, depth, len(y.positions), len(x.positions))
        sums = torch.zeros(shape, device=self.device)
        tiles = list(product(y.starts, x.starts))
        for start, following in zip(z.starts, [*z.starts[1:], len(z.positions)], strict=True):
            slab = self._slab(hu, z.positions[start : start + depth], y, x)
            for first in range(0, len(tiles), BLOCKS_AT_ONCE):
                some = tiles[first : first + BLOCKS_AT_ONCE]
                blocks = [slab[:, top : top + size, left : left + size] for top, left in some]
                for (top, left), probabilities in zip(some, self._probabilities(blocks), strict=True):
                    sums[:, :, top : top + size, left : left + size] += probabilities
            finished = following - start
            # every sum of a voxel has as many terms for one class as for another, so the mean has the same maximum
            classes = sums[:, :finished].argmax(0).to(torch.uint8).cpu().numpy()
            yield from ((start + index, plane) for index, plane in enumerate(classes))
            sums = torch.cat([sums[:, finished:], torch.zeros_like(sums[:, :finished])], dim=1)

    def _slab(
        self, hu: Int16[np.ndarray, "d h w"], positions: Float[np.ndarray, "n"], y: Axis, x: Axis
    ) -> Int16[Tensor, "n r c"]:
        """Slices of the grid in whole, with air beyond the series."""
        inside = np.clip(positions, 0, len(hu) - 1)
        first, last = int(np.floor(inside.min())), int(np.ceil(inside.max()))
        slices = resample_plane(hu[first : last + 1], y.positions, x.positions)
        slab = resample_z(slices, inside - first)
        for axis, (at, available) in enumerate(zip((positions, y.positions, x.positions), hu.shape, strict=True)):
            beyond = (at < -0.5) | (at > available - 0.5)
            slab[(slice(None),) * axis + (beyond,)] = AIR_HU
        return torch.from_numpy(slab).to(self.device)

    def _probabilities(self, blocks: list[Int16[Tensor, "d h w"]]) -> list[Float[Tensor, "c d h w"]]:
        keys = tuple(range(self.clip.num_slices))
        with torch.inference_mode(), autocast(self.device, self.autocast_dtype):
            predictions = self.model([Clip(block, keys) for block in blocks])
        maps = torch.stack([prediction["mask_logits"] for prediction in predictions])
        return list(maps.softmax(1).unflatten(0, (len(blocks), -1)).transpose(1, 2))


def largest_components(classes: UInt8[np.ndarray, "d h w"]) -> UInt8[np.ndarray, "d h w"]:
    """Of each class only its largest part, whose voxels touch by a face, an edge or a corner (the authors' rule for the
    liver); the rest becomes background.
    """
    kept = np.zeros_like(classes)
    for each in np.unique(classes[classes > 0]).tolist():
        parts, number = ndimage.label(classes == each, structure=np.ones((3, 3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
        sizes = np.bincount(parts.ravel(), minlength=number + 1)
        kept[parts == 1 + int(sizes[1:].argmax())] = each
    return kept
