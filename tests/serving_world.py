"""What the tests of predicting and serving share: two detectors, one of them a checkpoint, and a made CT series."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from mp3d.checkpoint import save_checkpoint
from mp3d.config import ClassificationHead, ClipConfig, DetectionHead, LoopConfig, ModelConfig, TrainConfig
from mp3d.data.series import Volume
from mp3d.data.synthetic.dicom_files import write_ct_series
from mp3d.models import build_model
from mp3d.sample import Clip, Prediction

TINY_HEAD = DetectionHead(fpn_channels=8, box_features=16, max_detections=5, rpn_post_nms=(50, 20))


class BrightBoxes:
    """ "Detects" everything above 0 HU on the key slice as one box, with its peak as score (1 from 1000 HU on)."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, clips: list[Clip]) -> list[Prediction]:
        self.batches.append(len(clips))
        return [self.on_slice(clip.slices[key]) for clip in clips for key in clip.key_slices]

    def on_slice(self, hu: torch.Tensor) -> Prediction:
        bright = (hu > 0).nonzero()
        if not len(bright):
            return {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        (top, left), (bottom, right) = bright.amin(0), bright.amax(0) + 1
        box = torch.stack([left, top, right, bottom]).float()
        return {
            "boxes": box[None],
            "scores": hu.max()[None].clamp(max=1000) / 1000,
            "labels": torch.ones(1, dtype=torch.int64),
        }


def tiny_config(head: DetectionHead | ClassificationHead = TINY_HEAD) -> TrainConfig:
    return TrainConfig(
        name="tiny",
        shards="none",
        clip=ClipConfig(image_size=64),
        model=ModelConfig(backbone="resnet3d18", width=0.05, head=head),
        loop=LoopConfig(precision="fp32"),
    )


def save_tiny(folder: Path, config: TrainConfig) -> torch.nn.Module:
    """Save a randomly initialised model as a checkpoint; returns it, in evaluation mode."""
    torch.manual_seed(3)
    model = build_model(config.model, config.clip).eval()
    folder.mkdir(parents=True)
    save_checkpoint(folder, config=config, model_state=model.state_dict(), epoch=1, score=0.5, metrics={})
    return model


def write_series(folder: Path, *, name: str = "DOE-JANE", num_slices: int = 6, modality: str = "CT") -> Volume:
    """Write a series whose voxel (column 9, row 5, slice 3) is the only one above 0 HU, and return it."""
    affine = np.diag([0.8, 0.9, 2.5, 1.0])
    affine[:3, 3] = [-30.5, 12.25, -100]
    volume = Volume(np.full((num_slices, 32, 40), -1000, np.int16), affine)
    volume.hu[3, 5, 9] = 800
    write_ct_series(folder, volume, name, uid_seed=f"serving/{name}", modality=modality)
    return volume


def zip_of(*folders: Path) -> bytes:
    """The files of folders, under their own names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for folder in folders:
            for path in sorted(folder.iterdir()):
                archive.write(path, f"{folder.name}/{path.name}")
    return buffer.getvalue()
