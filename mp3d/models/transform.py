"""A model's first part: stored clips become one normalised batch, on their device; the same in training and serving.

Window to 0..255, subtract the mean, divide by the standard deviation, resize in the plane (authors'
``image_io_3DCE.py``, ``transforms.py``).
Differs from the paper: the longer side becomes ``image_size``, the other in proportion; the authors make a square.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from mp3d.config import ClipConfig
from mp3d.sample import Clip, Prediction, Target

PAD_MULTIPLE = 32
"""Stride of the last 3D stage: padded rows and columns of whole slices are a multiple of it; blocks are not padded."""


@dataclass(frozen=True)
class ClipBatch:
    """What a 3D backbone reads.

    Attributes:
        tensors: normalised, float32, padded on the right and at the bottom with the value of air.
        key_slices: of each clip.
        given_sizes: ``(h, w)`` of each clip as it was given.
        image_sizes: ``(h, w)`` of each clip after resizing, before padding.
    """

    tensors: Float[Tensor, "n 1 d h w"]
    key_slices: list[tuple[int, ...]]
    given_sizes: list[tuple[int, int]]
    image_sizes: list[tuple[int, int]]

    def per_key_slice(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Sizes of the clips, repeated for each of their key slices."""
        return [size for size, keys in zip(sizes, self.key_slices, strict=True) for _ in keys]


class ClipTransform(nn.Module):
    """Windows, normalises, resizes and pads clips; scales boxes with them and back."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, clips: Sequence[Clip], targets: Sequence[Target] | None = None, image_size: int | None = None
    ) -> tuple[ClipBatch, list[Target] | None]:
        """
        Args:
            targets: one per key slice; their boxes are scaled with the clip, everything else stays as it is.
            image_size: pixels of the longer side; None takes the config's.

        Raises:
            ValueError: no clip, clips of different depth, or not one target per key slice.
            TypeError: slices that are neither int16 nor uint8.
        """
        if not clips:
            raise ValueError("the batch has no clip; give at least one")
        depths = [clip.slices.shape[0] for clip in clips]
        if len(set(depths)) > 1:
            raise ValueError(f"the clips of a batch have {depths} slices; they must all have the same number")
        resized = [self._resize(self._normalise(clip.slices), image_size or self.config.image_size) for clip in clips]
        batch = ClipBatch(
            tensors=self._pad(resized),
            key_slices=[tuple(clip.key_slices) for clip in clips],
            given_sizes=[(clip.slices.shape[1], clip.slices.shape[2]) for clip in clips],
            image_sizes=[(slices.shape[1], slices.shape[2]) for slices in resized],
        )
        if targets is None:
            return batch, None
        num_key_slices = sum(len(keys) for keys in batch.key_slices)
        if len(targets) != num_key_slices:
            raise ValueError(
                f"{len(targets)} targets for {num_key_slices} key slices; give one for each, in clip order"
            )
        scaled = []
        for target, given, size in zip(targets, *self._sizes(batch), strict=True):
            target = target.copy()
            if "boxes" in target:
                target["boxes"] = _scale(target["boxes"], given, size)
            scaled.append(target)
        return batch, scaled

    def postprocess(self, predictions: Sequence[Prediction], batch: ClipBatch) -> list[Prediction]:
        """Boxes, one prediction per key slice, scaled back to pixels of the given clips and clipped to them."""
        results = []
        for prediction, given, size in zip(predictions, *self._sizes(batch), strict=True):
            prediction = prediction.copy()
            if "boxes" in prediction:
                prediction["boxes"] = clip_boxes_to_image(_scale(prediction["boxes"], size, given), given)
            results.append(prediction)
        return results

    @staticmethod
    def _sizes(batch: ClipBatch) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        return batch.per_key_slice(batch.given_sizes), batch.per_key_slice(batch.image_sizes)

    def _normalise(self, slices: Tensor) -> Float[Tensor, "d h w"]:
        if slices.dtype == torch.int16:
            low, high = self.config.window_hu
            values = ((slices.float() - low) * (255 / (high - low))).clamp_(0, 255)
        elif slices.dtype == torch.uint8:
            values = slices.float()
        else:
            raise TypeError(f"slices are {slices.dtype}; give int16 Hounsfield units or uint8 colour planes")
        return values.sub_(self.config.mean).div_(self.config.std)

    @staticmethod
    def _resize(slices: Float[Tensor, "d h w"], image_size: int) -> Float[Tensor, "d h2 w2"]:
        height, width = slices.shape[1:]
        scale = image_size / max(height, width)
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        if size == (height, width):
            return slices
        return F.interpolate(slices[None], size=size, mode="bilinear", align_corners=False)[0]

    def _pad(self, clips: Sequence[Float[Tensor, "d _ _"]]) -> Float[Tensor, "n 1 d h w"]:
        multiple = PAD_MULTIPLE if self.config.block is None else 1
        height = -(-max(clip.shape[1] for clip in clips) // multiple) * multiple
        width = -(-max(clip.shape[2] for clip in clips) // multiple) * multiple
        air = (0 - self.config.mean) / self.config.std
        batch = clips[0].new_full((len(clips), 1, clips[0].shape[0], height, width), air)
        for index, clip in enumerate(clips):
            batch[index, 0, :, : clip.shape[1], : clip.shape[2]] = clip
        return batch


def _scale(boxes: Float[Tensor, "b 4"], source: tuple[int, int], destination: tuple[int, int]) -> Float[Tensor, "b 4"]:
    """Boxes of a picture of ``(h, w)`` source in one of ``(h, w)`` destination."""
    if source == destination:
        return boxes
    y, x = (new / old for new, old in zip(destination, source, strict=True))
    return boxes * boxes.new_tensor([x, y, x, y])
