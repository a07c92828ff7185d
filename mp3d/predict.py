"""A checkpoint and a series make findings: the ``window`` mode, as published.

    series ─► z grid of the clip's spacing ─► a clip around every grid position ─► predictions on the nearest slice

A finding is always on a slice that the series really has. Where slices are thicker than the grid, several positions
answer for one slice; of their overlapping boxes the best is kept. Boxes on neighbouring slices are not joined: the
method finds lesions slice by slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import batched_nms

from mp3d.checkpoint import Checkpoint, open_checkpoint
from mp3d.config import ClipConfig, DetectionHead
from mp3d.data.clips import SeriesGrid, resample_z, series_grid
from mp3d.data.series import Volume
from mp3d.device import DeviceName, autocast, inference_dtype, pick_device
from mp3d.errors import CheckpointError
from mp3d.models import build_model
from mp3d.sample import Clip, Prediction

Point = tuple[float, float, float]
Model = Callable[[list[Clip]], list[Prediction]]
"""A detector in evaluation mode: one prediction per key slice, in pixels of the clip."""


@dataclass(frozen=True)
class Finding:
    """A lesion on one slice.

    Attributes:
        box_px: x1, y1, x2, y2 in pixels of the slice, half-open.
        slice_index: from 0, in ascending order along the slice normal.
        box_lps_mm: corners (x1, y1), (x2, y1), (x2, y2), (x1, y2) in patient coordinates, in the plane of the slice.
        diameter_mm: the longer side of the box.
        score: in [0, 1].
        label: lesion class, from 1.
    """

    box_px: tuple[float, float, float, float]
    slice_index: int
    box_lps_mm: tuple[Point, Point, Point, Point]
    centre_lps_mm: Point
    diameter_mm: float
    score: float
    label: int


@dataclass(frozen=True, eq=False)
class Predictor:
    """A detector, ready on its device.

    Attributes:
        model: called with clips on ``device``.
        clip: what the model reads.
        nms_iou: overlap above which only the best of several boxes of one class on one slice is kept.
        autocast_dtype: None computes in float32.
    """

    model: Model
    clip: ClipConfig
    nms_iou: float
    device: torch.device
    autocast_dtype: torch.dtype | None = None

    @classmethod
    def open(cls, checkpoint: Checkpoint | str | Path, device: DeviceName = "auto") -> Self:
        """Load a checkpoint, or the best one of a run.

        Raises:
            CheckpointError: none there, damaged, of another version, or of a model that detects nothing.
            ResourceError: no such device.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        head = detection_head(checkpoint)
        place = pick_device(device)
        model = build_model(checkpoint.config.model, checkpoint.config.clip)
        try:
            model.load_state_dict(checkpoint.model_state())
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights of {checkpoint.path} do not fit the model of its config; "
                f"another version of the program wrote it: {error}"
            ) from error
        model.to(place).eval()
        return cls(
            model,
            checkpoint.config.clip,
            head.box_nms_iou,
            place,
            inference_dtype(checkpoint.config.loop.precision, place),
        )

    def find_lesions(
        self,
        volume: Volume,
        score_threshold: float,
        batch_size: int = 4,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Finding]:
        """Findings with at least this score, best first. Memory beside the volume is that of one batch of clips.

        Args:
            progress: called after each batch with the number of clips done and of all clips; an exception that it
                raises ends the search.
        """
        grid = series_grid(len(volume.hu), volume.spacing_mm[0], self.clip)
        answers_for = torch.from_numpy(grid.nearest_source)
        kept = []
        for start in range(0, len(grid.positions), batch_size):
            stop = min(start + batch_size, len(grid.positions))
            predictions = self._predict(volume, grid, range(start, stop))
            kept += [
                _above(prediction, slice_index, score_threshold)
                for prediction, slice_index in zip(predictions, answers_for[start:stop], strict=True)
            ]
            if progress is not None:
                progress(stop, len(grid.positions))
        boxes, scores, labels, slices = (torch.cat(part) for part in zip(*kept, strict=True))
        # float64, because the groups are moved far apart, where float32 would lose hundredths of a pixel
        order = batched_nms(boxes.double(), scores.double(), labels * len(volume.hu) + slices, self.nms_iou)
        return [_finding(volume, boxes[i], int(slices[i]), float(scores[i]), int(labels[i])) for i in order.tolist()]

    def check(self) -> None:
        """Raises RuntimeError where the device no longer computes, such as a lost GPU."""
        torch.zeros(1, device=self.device).add(1).item()

    def _predict(self, volume: Volume, grid: SeriesGrid, indices: Sequence[int]) -> list[Prediction]:
        clips = []
        for index in indices:
            slices = torch.from_numpy(resample_z(volume.hu, grid.window(index, self.clip.num_slices)))
            clips.append(Clip(slices.to(self.device), (self.clip.num_slices // 2,)))
        with torch.inference_mode(), autocast(self.device, self.autocast_dtype):
            return self.model(clips)


def detection_head(checkpoint: Checkpoint) -> DetectionHead:
    """Raises: CheckpointError if the checkpoint's model is no detector."""
    head = checkpoint.config.model.head
    if not isinstance(head, DetectionHead):
        raise CheckpointError(
            f"{checkpoint.path} holds a {head.kind} model, which finds no lesions; "
            "give a checkpoint that jobs/finetune.py made"
        )
    return head


def _above(
    prediction: Prediction, slice_index: Tensor, score_threshold: float
) -> tuple[Float[Tensor, "b 4"], Float[Tensor, " b"], Tensor, Tensor]:
    """Boxes, scores, labels and slice of what reaches the threshold and has an area, on the CPU."""
    tensors = cast(dict[str, Tensor], prediction)
    boxes, scores, labels = (tensors[name].cpu() for name in ("boxes", "scores", "labels"))
    good = (scores >= score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[good].float(), scores[good].float(), labels[good], slice_index.expand(int(good.sum()))


def _finding(volume: Volume, box: Float[Tensor, "4"], slice_index: int, score: float, label: int) -> Finding:
    x1, y1, x2, y2 = box.tolist()
    _, y_spacing, x_spacing = volume.spacing_mm
    return Finding(
        box_px=(x1, y1, x2, y2),
        slice_index=slice_index,
        box_lps_mm=(
            edge_to_lps_mm(volume, x1, y1, slice_index),
            edge_to_lps_mm(volume, x2, y1, slice_index),
            edge_to_lps_mm(volume, x2, y2, slice_index),
            edge_to_lps_mm(volume, x1, y2, slice_index),
        ),
        centre_lps_mm=edge_to_lps_mm(volume, (x1 + x2) / 2, (y1 + y2) / 2, slice_index),
        diameter_mm=max((x2 - x1) * x_spacing, (y2 - y1) * y_spacing),
        score=score,
        label=label,
    )


def edge_to_lps_mm(volume: Volume, x: float, y: float, slice_index: int) -> Point:
    """Patient coordinates of a point on a slice, given as boxes are: column i reaches from x = i to i + 1."""
    x_mm, y_mm, z_mm, _ = volume.affine @ np.array([x - 0.5, y - 0.5, slice_index, 1.0])
    return float(x_mm), float(y_mm), float(z_mm)
