"""Tiny prepared data sets and configurations, so that a whole training run takes a second."""

from functools import partial
from pathlib import Path

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
from mp3d.data.source import Item, Source
from mp3d.data.synthetic.plain import BRIGHT_HU as BRIGHT_HU
from mp3d.data.synthetic.plain import ball_series, blob_series, picture_batch, shaded_batch

ID_KEY = b"tests" * 5


def ct_shards(out: Path, patients: int = 8, id_key: bytes = ID_KEY) -> Path:
    """Half of the patients in train, the rest in val and test."""
    splits = {index: "train" if index % 2 == 0 else ("val" if index % 4 == 1 else "test") for index in range(patients)}
    items = [Item(f"p{i}", f"patient {i}", split, partial(blob_series, i)) for i, split in splits.items()]
    prepare(Source("blobs", "tiny/1", ("lesion",), tuple(items)), out, id_key=id_key, runner="local")
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
