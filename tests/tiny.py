"""Tiny prepared data sets and configurations, so that a whole training run takes a second."""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mp3d.config import (
    AugmentConfig,
    ClassificationHead,
    ClipConfig,
    DetectionHead,
    LaunchConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    SegmentationHead,
    StrideConfig,
    TrackingConfig,
    TrainConfig,
)
from mp3d.data.prepare import prepare
from mp3d.data.series import CTSeries, Picture, Truth, Volume
from mp3d.data.source import Item, PictureBatch, Source

ID_KEY = b"tests" * 5
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
    """Dark pictures with a bright rectangle that a mask marks as class 1."""
    pictures = []
    for index in range(count):
        rng = np.random.default_rng([index, len(split), 3])
        mask = np.zeros((24, 32), np.uint8)
        y, x = rng.integers(0, 12, 2)
        mask[y : y + 10, x : x + 16] = 1
        pixels = (rng.integers(0, 60, (24, 32, 3)) + 150 * mask[..., None]).astype(np.uint8)
        pictures.append(Picture(f"{split}/{index}", _jpeg(pixels), 24, 32, truth=Truth(mask=mask)))
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
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def ct_shards(out: Path, patients: int = 8) -> Path:
    """Half of the patients in train, the rest in val and test."""
    splits = {index: "train" if index % 2 == 0 else ("val" if index % 4 == 1 else "test") for index in range(patients)}
    items = [Item(f"p{i}", f"patient {i}", split, partial(blob_series, i)) for i, split in splits.items()]
    prepare(Source("blobs", "tiny/1", ("lesion",), tuple(items)), out, id_key=ID_KEY, runner="local")
    return out


def picture_shards(out: Path) -> Path:
    items = [
        Item(split, split, split, partial(picture_batch, split, count)) for split, count in (("train", 24), ("val", 8))
    ]
    prepare(Source("shades", "tiny/1", ("dark", "bright"), tuple(items)), out, id_key=ID_KEY, runner="local")
    return out


def ball_shards(out: Path, *, classified: bool = False, per_split: int = 4) -> Path:
    """Series with masks; classified, half of them of either class."""
    items = [
        Item(
            f"{split}{i}", f"patient {split}{i}", split,
            partial(ball_series, number * 100 + i, label=i % 2 if classified else None),
        )
        for number, split in enumerate(("train", "val", "test"))
        for i in range(per_split)
    ]  # fmt: skip
    classes = ("small", "large") if classified else ("ball",)
    prepare(Source("balls", "tiny/1", classes, tuple(items)), out, id_key=ID_KEY, runner="local")
    return out


def masked_picture_shards(out: Path) -> Path:
    items = [
        Item(split, split, split, partial(shaded_batch, split, count)) for split, count in (("train", 24), ("val", 8))
    ]
    prepare(Source("rectangles", "tiny/1", ("rectangle",), tuple(items)), out, id_key=ID_KEY, runner="local")
    return out


def detector_config(shards: Path, storage: Path, name: str = "detector", **changes) -> TrainConfig:
    config = TrainConfig(
        name=name,
        shards=str(shards),
        clip=ClipConfig(image_size=32),
        augment=AugmentConfig(image_sizes=()),
        model=ModelConfig(
            backbone="mp3d18ba",
            width=0.125,
            head=DetectionHead(
                fpn_channels=16,
                box_features=32,
                anchor_sizes_px=((6, 9), (12, 16), (20, 24), (28, 32), (40, 48)),
                anchor_ratios=(1.0,),
                rpn_pre_nms=(50, 50),
                rpn_post_nms=(30, 20),
                rpn_samples=32,
                box_samples=32,
            ),
        ),
        optim=OptimConfig(algorithm="adamw", lr=3e-3, schedule="cosine", warmup_steps=2, clip_grad_norm=10),
        loop=LoopConfig(epochs=2, batch_size=2, steps_per_epoch=3, precision="fp32"),
        launch=LaunchConfig(runner="local", storage_path=str(storage)),
        tracking=TrackingConfig(mode="disabled"),
    )
    return config.override({path.replace("__", "."): value for path, value in changes.items()})


def classifier_config(shards: Path, storage: Path, name: str = "classifier", **changes) -> TrainConfig:
    config = detector_config(shards, storage, name).override(
        {
            "clip": {"num_slices": 3, "slice_spacing_mm": None, "image_size": 24},
            "augment": AugmentConfig(z_flip=0, image_sizes=(), shuffle_planes=True),
            "model.head": ClassificationHead(num_classes=2),
            "loop.batch_size": 8,
        }
    )
    return config.override({path.replace("__", "."): value for path, value in changes.items()})


def ball_config(shards: Path, storage: Path, head: SegmentationHead | ClassificationHead, **changes) -> TrainConfig:
    """Blocks of 12 slices of 2 mm and 24 x 24 pixels of 1 mm."""
    config = detector_config(shards, storage, head.kind).override(
        {
            "clip": {"num_slices": 12, "slice_spacing_mm": 2.0, "image_size": 24, "block": "centre"},
            "augment": AugmentConfig(image_sizes=(), shift_px=(1, 2)),
            "model.backbone": "resnet3d18",
            "model.strides": StrideConfig(stem=1, isotropic=True),
            "model.head": head,
            "loop.epochs": 3,
            "loop.steps_per_epoch": 8,
        }
    )
    return config.override({path.replace("__", "."): value for path, value in changes.items()})
