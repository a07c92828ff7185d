"""A checkpoint and a series make findings.

    series ─► z grid of the clip's spacing ─► predictions for every grid position ─► findings on the nearest slice

The network reads the grid in one of three ways, with the same weights:

- ``window``: a clip of nine slices around every position, as published; each slice is computed nine times;
- ``slab``: clips of 17 slices that answer for nine positions each, exactly as a network trained on slabs was trained;
- ``stream``: the whole series as one long clip, each slice once, in chunks (:mod:`mp3d.models.stream`). Padding and
  neighbours differ from the trained function far from the key slice only, which a network trained on windows never
  learnt to bear: ``auto`` streams only what was measured to lose nothing.

A finding is always on a slice that the series really has. Where slices are thicker than the grid, several positions
answer for one slice; of their overlapping boxes the best is kept. Boxes on neighbouring slices are not joined: the
method finds lesions slice by slice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, cast

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor
from torchvision.ops import batched_nms

from mp3d.checkpoint import Checkpoint, open_checkpoint
from mp3d.config import ClipConfig, DetectionHead
from mp3d.data.clips import SeriesGrid, phased_grids, resample_z
from mp3d.data.series import Volume
from mp3d.device import DeviceName, autocast, pick_device, ready_for_inference
from mp3d.errors import CheckpointError
from mp3d.models import LesionDetector, build_model
from mp3d.models.stream import check_streamable, stream_predictions
from mp3d.sample import Clip, Prediction

Point = tuple[float, float, float]
Model = Callable[[list[Clip]], list[Prediction]]
"""A detector in evaluation mode: one prediction per key slice, in pixels of the clip."""
SeriesMode = Literal["window", "slab", "stream"]

AT_ONCE: dict[SeriesMode, int] = {"window": 4, "slab": 9, "stream": 16}
"""Grid positions that go through the backbone at a time. With fewer than 16 slices in a batch, PyTorch takes another
path for the 1 x 1 convolutions of float32 on one thread, on some processors a slow one.
"""
AT_ONCE_ON_GPU: dict[SeriesMode, int] = {"window": 8, "slab": 27, "stream": 32}
"""There a small kernel takes as long to start as to run."""
DETECTED_AT_ONCE = 4
"""Grid positions of a stream whose boxes a CPU seeks at a time: more is no faster, and the features of a thousand
proposals take 50 MB. A GPU seeks those of a whole chunk.
"""
SLAB_KEY_SLICES = 9
"""Of a slab for a network that was trained on windows."""


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
        mode: how a series is read.
        phases: times that a series is read, on grids shifted against one another: slices thinner than the grid are
            passed over unless several grids take their turns.
    """

    model: Model
    clip: ClipConfig
    nms_iou: float
    device: torch.device
    autocast_dtype: torch.dtype | None = None
    mode: SeriesMode = "window"
    phases: int = 1

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint | str | Path,
        device: DeviceName = "auto",
        mode: SeriesMode | Literal["auto"] = "auto",
        compiled: bool = False,
        phases: int = 1,
    ) -> Self:
        """Load a checkpoint, or the best one of a run.

        Args:
            mode: ``auto`` is what the checkpoint was trained for or measured to bear (:func:`best_mode`).
            compiled: by ``torch.compile``, in minutes (:func:`mp3d.device.compile_layers`).

        Raises:
            CheckpointError: none there, damaged, of another version, or of a model that detects nothing.
            ConfigError: the model cannot be streamed.
            ResourceError: no such device.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        checkpoint.check_trained()
        head = detection_head(checkpoint)
        if mode == "auto":
            mode = best_mode(checkpoint)
        if mode == "stream":
            check_streamable(checkpoint.config.model)
        place = pick_device(device)
        model = build_model(checkpoint.config.model, checkpoint.config.clip)
        try:
            model.load_state_dict(checkpoint.model_state())
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights of {checkpoint.path} do not fit the model of its config; "
                f"another version of the program wrote it: {error}"
            ) from error
        clip, trained_in = checkpoint.config.clip, checkpoint.config.loop.precision
        dtype = ready_for_inference(model, clip, trained_in, place, compiled=compiled)
        return cls(model, clip, head.box_nms_iou, place, dtype, mode, phases)

    def find_lesions(
        self,
        volume: Volume,
        score_threshold: float,
        at_once: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Finding]:
        """Findings with at least this score, best first. Memory beside the volume does not grow with its slices.

        Args:
            at_once: grid positions computed at a time; None: what suits the mode.
            progress: called again and again with the number of grid positions done and of all; an exception that it
                raises ends the search.
        """
        grids = phased_grids(len(volume.hu), volume.spacing_mm[0], self.clip, self.phases)
        total = sum(len(grid.positions) for grid in grids)
        kept, done = [], 0
        for grid in grids:
            answers_for = iter(torch.from_numpy(grid.nearest_source))
            for predictions in self.answers(volume.hu, grid, at_once):
                kept += [_above(each, next(answers_for), score_threshold) for each in predictions]
                done += len(predictions)
                if progress is not None:
                    progress(done, total)
        boxes, scores, labels, slices = (torch.cat(part) for part in zip(*kept, strict=True))
        # float64, because the groups are moved far apart, where float32 would lose hundredths of a pixel
        order = batched_nms(boxes.double(), scores.double(), labels * len(volume.hu) + slices, self.nms_iou)
        return [_finding(volume, boxes[i], int(slices[i]), float(scores[i]), int(labels[i])) for i in order.tolist()]

    def check(self) -> None:
        """Raises RuntimeError where the device no longer computes, such as a lost GPU."""
        torch.zeros(1, device=self.device).add(1).item()

    def answers(
        self, hu: Int16[np.ndarray, "n h w"], grid: SeriesGrid, at_once: int | None = None
    ) -> Iterator[list[Prediction]]:
        """Predictions for the next grid positions, all in order and each once; ``at_once`` as in
        :meth:`find_lesions`.
        """
        at_once = at_once or (AT_ONCE if self.device.type == "cpu" else AT_ONCE_ON_GPU)[self.mode]
        match self.mode:
            case "window":
                answers = self._by_clips(hu, grid, 1, at_once)
            case "slab":
                trained = self.clip.num_key_slices
                answers = self._by_clips(hu, grid, trained if trained > 1 else SLAB_KEY_SLICES, at_once)
            case "stream":
                answers = self._streamed(hu, grid, at_once)
        while True:
            # Inference mode must not span the yield: it would leak into the caller's code between two answers.
            with torch.inference_mode(), autocast(self.device, self.autocast_dtype):
                predictions = next(answers, None)
            if predictions is None:
                return
            yield predictions

    def _by_clips(
        self, hu: Int16[np.ndarray, "n h w"], grid: SeriesGrid, keys_per_clip: int, at_once: int
    ) -> Iterator[list[Prediction]]:
        """With a clip for every few positions; the last one ends with the grid and answers for what is left."""
        total, radius = len(grid.positions), self.clip.num_slices // 2
        clips = []
        for first in range(0, total, keys_per_clip):
            start = max(min(first, total - keys_per_clip), 0)
            keys = range(first, min(first + keys_per_clip, total))
            slices = self._slices(hu, grid, start - radius, start + keys_per_clip + radius)
            clips.append(Clip(slices, tuple(key - start + radius for key in keys)))
            if len(clips) * keys_per_clip >= at_once or keys.stop == total:
                yield self.model(clips)
                clips = []

    def _streamed(self, hu: Int16[np.ndarray, "n h w"], grid: SeriesGrid, at_once: int) -> Iterator[list[Prediction]]:
        """As one clip, with as many slices beyond the ends as a window has."""
        if not isinstance(self.model, LesionDetector):
            raise TypeError(f"a {type(self.model).__name__} cannot be streamed; give a LesionDetector")
        radius = self.clip.num_slices // 2
        stop = len(grid.positions) + radius
        chunks = (self._slices(hu, grid, start, min(start + at_once, stop)) for start in range(-radius, stop, at_once))
        detected_at_once = DETECTED_AT_ONCE if self.device.type == "cpu" else at_once
        return stream_predictions(self.model, chunks, detected_at_once)

    def _slices(
        self, hu: Int16[np.ndarray, "n h w"], grid: SeriesGrid, start: int, stop: int
    ) -> Int16[Tensor, "d h w"]:
        positions = grid.stretch(start, stop)
        if self.device.type == "cpu":
            return torch.from_numpy(resample_z(hu, positions))
        first, last = int(positions.min()), int(np.ceil(positions.max()))
        return resampled_on_device(torch.from_numpy(hu[first : last + 1]).to(self.device), positions - first)


def resampled_on_device(slices: Int16[Tensor, "n h w"], positions: Float[np.ndarray, "d"]) -> Int16[Tensor, "d h w"]:
    """:func:`mp3d.data.clips.resample_z` where the slices lie, to the same bits."""
    lower = torch.from_numpy(np.floor(positions).astype(np.int64)).to(slices.device)
    upper = torch.from_numpy(np.ceil(positions).astype(np.int64)).to(slices.device)
    weights = torch.from_numpy((positions - np.floor(positions)).astype(np.float32)).to(slices.device)
    below = slices[lower].float()
    rise = slices[upper].float() - below
    return (rise * weights[:, None, None] + below).round().short()


def best_mode(checkpoint: Checkpoint) -> SeriesMode:
    """:func:`trained_mode`; for a network trained on slabs ``stream``, where its own evaluation says that this costs no
    accuracy (:meth:`mp3d.checkpoint.Checkpoint.may_be_streamed`).
    """
    mode = trained_mode(checkpoint.config.clip)
    return "stream" if mode == "slab" and checkpoint.may_be_streamed() else mode


def trained_mode(clip: ClipConfig) -> Literal["window", "slab"]:
    """The clips that a network was trained on."""
    return "window" if clip.num_key_slices == 1 else "slab"


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


def edge_to_lps_mm(volume: Volume, x: float, y: float, slice_index: float) -> Point:
    """Patient coordinates of a point on a slice, given as boxes are: column i reaches from x = i to i + 1."""
    x_mm, y_mm, z_mm, _ = volume.affine @ np.array([x - 0.5, y - 0.5, slice_index, 1.0])
    return float(x_mm), float(y_mm), float(z_mm)
