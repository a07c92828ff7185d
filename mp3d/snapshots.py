"""A few pictures of what a model answers, beside what is true: for the eyes of whoever follows a run.

Key slices of the validation split, evenly spread over it and the same in every epoch: true boxes and masks green,
answers orange, and for a class both in the caption. No name, hash or path is in them; the pixels are the patients'.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import nn

from mp3d.config import ClipConfig
from mp3d.data.batches import ClipDataset, Place, collate
from mp3d.evaluation import predict_clips
from mp3d.sample import Clip, Prediction, Target

TRUE_COLOUR, FOUND_COLOUR = (60, 220, 90), (255, 150, 30)
MIN_SCORE, MAX_BOXES = 0.3, 10
SIDE_PX = 384
"""Smaller slices are enlarged, so that thin frames can be seen."""


@dataclass(frozen=True)
class Snapshot:
    image: UInt8[np.ndarray, "h w 3"]
    caption: str


def take_snapshots(
    model: nn.Module, dataset: ClipDataset, count: int, device: torch.device, dtype: torch.dtype | None = None
) -> list[Snapshot]:
    """One for each of ``count`` samples; the model is left in evaluation mode."""
    taken = []
    for sample in sorted({int(i) for i in np.linspace(0, len(dataset) - 1, count)}):
        part = dataset[Place(sample, sample)]
        answers = list(predict_clips(model, [collate([part])], device, dtype))
        clip, middle = part[0], len(answers) // 2  # of a block the middle slice
        prediction, target, _ = answers[middle]
        taken.append(draw(clip, clip.key_slices[middle], prediction, target, dataset.clip))
    return taken


def draw(clip: Clip, key_slice: int, prediction: Prediction, target: Target, config: ClipConfig) -> Snapshot:
    """A key slice with what is true of it and what was answered."""
    pixels = _visible(clip, key_slice, config)
    for mask, colour in (
        (target.get("mask"), TRUE_COLOUR),
        (prediction["mask_logits"].argmax(0) if "mask_logits" in prediction else None, FOUND_COLOUR),
    ):
        if mask is not None:
            pixels[_outline(np.asarray(mask) == 1)] = colour
    scale = max(1, SIDE_PX // max(pixels.shape[:2]))
    image = Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST)
    captions = []
    if "boxes" in target and "boxes" in prediction:
        scores = prediction["scores"]
        shown = prediction["boxes"][scores >= MIN_SCORE][:MAX_BOXES]
        _frame(image, target["boxes"].tolist(), TRUE_COLOUR, scale)
        _frame(image, shown.tolist(), FOUND_COLOUR, scale)
        best = f", best score {float(scores.max()):.2f}" if len(scores) else ""
        captions.append(f"{len(target['boxes'])} true, {len(shown)} found at {MIN_SCORE}{best}")
    if "label" in target and "logits" in prediction:
        captions.append(f"class {int(target['label'])}, answered {int(prediction['logits'].argmax())}")
    return Snapshot(np.asarray(image), "; ".join(captions))


def _visible(clip: Clip, key_slice: int, config: ClipConfig) -> np.ndarray:
    if clip.slices.dtype == torch.uint8:
        return np.ascontiguousarray(clip.slices.permute(1, 2, 0).numpy())
    low, high = config.window_hu
    grey = (clip.slices[key_slice].numpy().astype(np.float32) - low) / (high - low)
    return np.repeat((np.clip(grey, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Marked pixels with a neighbour that is not."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def _frame(image: Image.Image, boxes: Iterable[list[float]], colour: tuple[int, int, int], scale: int) -> None:
    pen = ImageDraw.Draw(image)
    for x1, y1, x2, y2 in boxes:
        pen.rectangle(
            [x1 * scale, y1 * scale, x2 * scale - 1, y2 * scale - 1], outline=colour, width=max(1, scale // 2)
        )
