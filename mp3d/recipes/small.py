"""Recipes that train on two cores: on the made world of the demo, and on small pieces of real data sets."""

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
    TrainConfig,
)
from mp3d.recipes.pictures import PICTURE_CLIP
from mp3d.recipes.volumes import lidc_classification, lidc_segmentation

SYNTHETIC_WORLD = "data/synthetic"
"""Where the synthetic recipes look for their shards; jobs make them there if they are missing."""
SMALL_HEAD = DetectionHead(
    fpn_channels=64,
    box_features=128,
    # several sizes on the finest level: lesions of a small picture measure a few of its cells
    anchor_sizes_px=((6, 9, 13), (16, 20, 24), (32, 36, 40), (48, 56, 64), (80, 96, 112)),
    anchor_ratios=(1.0,),
    anchors="fit",
    rpn_positive_iou=0.6,
    # few steps on small pictures: every box gets an anchor, be it small or at the border, and a loss that still pulls
    # where a box is nearly right
    rpn_min_positive_iou=0.0,
    rpn_border_px=None,
    box_beta=1 / 9,
    rpn_samples=64,
    rpn_pre_nms=(400, 200),
    rpn_post_nms=(200, 100),
    box_samples=64,
    score_threshold=0.01,
)
SMALL_VOLUMES = {
    "model.width": 0.125,
    "model.norm": "slice_gn",
    "optim.lr": 2e-3,
    "optim.lr_batch": None,  # the rate is that of these small batches
    "loop.epochs": 6,
    "loop.batch_size": 4,
    "loop.steps_per_epoch": 40,
    "loop.num_workers": 1,
    "launch": LaunchConfig(cpus_per_worker=2),
}
"""What makes a recipe for nodules small."""
SMALL_TUMOUR_SIZES_PX = ((12, 16, 20), (24, 32, 40), (48, 56, 64), (72, 84, 96), (112, 128, 144))


def synthetic_pretrain() -> TrainConfig:
    """Pre-train a small MP3D on made colour pictures: the demo's first training, about a minute on two cores.

    python jobs/pretrain.py synthetic_pretrain
    Data: none: jobs make it.
    Cost: about a minute on two CPU cores.
    Expected: nothing; the data are made.
    Measured: nothing that is kept.
    """
    return TrainConfig(
        name="synthetic_pretrain",
        shards=f"{SYNTHETIC_WORLD}/pictures",
        clip=PICTURE_CLIP.override({"image_size": 64}),
        augment=AugmentConfig(z_flip=0, image_sizes=(), shuffle_planes=True),
        model=ModelConfig(
            backbone="mp3d18ba", width=0.25, z_padding="replicate", head=ClassificationHead(num_classes=8)
        ),
        optim=OptimConfig(
            algorithm="adamw", lr=2e-3, weight_decay=0.01, schedule="cosine", warmup_steps=20, clip_grad_norm=5
        ),
        loop=LoopConfig(epochs=4, batch_size=32, steps_per_epoch=100, max_validation_clips=256),
        launch=LaunchConfig(cpus_per_worker=2),
    )


def synthetic_finetune() -> TrainConfig:
    """Train a small lesion detector on the made CT world: the demo's detector, about seven minutes on two cores.

    python jobs/finetune.py synthetic_finetune --init-from runs/synthetic_pretrain
    Data: none: jobs make it.
    Cost: about seven minutes on two CPU cores.
    Expected: nothing; the data are made.
    Measured: mean sensitivity 1.000 at 0.5 to 4 false positives an image, in the demo (README).
    """
    return TrainConfig(
        name="synthetic_finetune",
        shards=f"{SYNTHETIC_WORLD}/ct",
        clip=ClipConfig(image_size=128, num_key_slices=9),
        augment=AugmentConfig(image_sizes=()),
        model=ModelConfig(backbone="mp3d18ba", width=0.25, z_padding="replicate", head=SMALL_HEAD),
        optim=OptimConfig(
            algorithm="adamw", lr=2e-3, weight_decay=0.01, schedule="cosine", warmup_steps=20, clip_grad_norm=10
        ),
        loop=LoopConfig(epochs=6, batch_size=2, steps_per_epoch=100, max_validation_clips=64),
        launch=LaunchConfig(cpus_per_worker=2),
    )


def synthetic_segmentation() -> TrainConfig:
    """Segment the lesions of the made CT world with a small 3D network, about four minutes on two cores.

    python jobs/finetune.py synthetic_segmentation
    Data: none: jobs make it.
    Cost: about four minutes on two CPU cores.
    Expected: nothing; the data are made.
    Measured: nothing that is kept.
    """
    return TrainConfig(
        name="synthetic_segmentation",
        shards=f"{SYNTHETIC_WORLD}/ct",
        clip=ClipConfig(num_slices=8, image_size=48, block="anywhere"),
        augment=AugmentConfig(image_sizes=(), shift_px=(1, 32)),
        model=ModelConfig(
            backbone="resnet3d18",
            width=0.125,
            strides=StrideConfig(stem=1),
            # lesions are a few voxels of a block, and many blocks show none
            head=SegmentationHead(dropout=0, cross_entropy_weight=0.3, dice_weight=1.0, dice_over="batch"),
        ),
        optim=OptimConfig(
            algorithm="adamw", lr=5e-3, weight_decay=0.01, schedule="cosine", warmup_steps=20, clip_grad_norm=10
        ),
        loop=LoopConfig(epochs=6, batch_size=4, steps_per_epoch=100, negatives=0.5, max_validation_clips=200),
        launch=LaunchConfig(cpus_per_worker=2),
    )


def small_pretrain() -> TrainConfig:
    """Pre-train a small MP3D on a folder of real pictures of 20 classes, e.g. a piece of Tiny-ImageNet; minutes on two
    cores.

    python jobs/pretrain.py small_pretrain --shards data/pictures
    Data: pictures in class folders.
    Cost: minutes on two CPU cores.
    Expected: no score is published of so small a network.
    Measured: nothing that is kept.
    """
    return synthetic_pretrain().override(
        {
            "name": "small_pretrain",
            "shards": "data/pictures",
            "model.head.num_classes": 20,
            "augment.crop_scale": (0.35, 1.0),
            "loop.epochs": 6,
            "loop.steps_per_epoch": 150,
        }
    )


def small_finetune() -> TrainConfig:
    """Train a small lesion detector on a few dozen real CT series, e.g. tumours of soft tissue; minutes on two cores.

    python jobs/finetune.py small_finetune --shards data/ct --init-from runs/small_pretrain
    Data: CT series with regions drawn, e.g. Soft-tissue-Sarcoma (The Cancer Imaging Archive).
    Cost: minutes on two CPU cores.
    Expected: no score is published of so small a network.
    Measured: mean sensitivity 0.593 at 0.5 to 4 false positives an image on 16 sarcoma patients in two folds, not
        pre-trained (benchmarks/results.md).
    """
    return synthetic_finetune().override(
        {
            "name": "small_finetune",
            "shards": "data/ct",
            "clip.image_size": 160,
            "augment.image_sizes": (128, 160, 192),
            "model.transform_taps": 3,  # slabs and streams then share 99 of 100 findings (benchmarks/results.md)
            "model.head.anchor_sizes_px": SMALL_TUMOUR_SIZES_PX,
            "model.head.anchor_ratios": (0.7, 1.0, 1.4),
            "loop.negatives": 0.25,
            "loop.epochs": 6,
        }
    )


def small_pretrain_boxes() -> TrainConfig:
    """Pre-train a small MP3D on boxes in real pictures, e.g. of Tiny-ImageNet (``--boxes``); minutes on two cores.

    python jobs/pretrain.py small_pretrain_boxes --shards data/boxes
    Data: pictures with a box each.
    Cost: minutes on two CPU cores.
    Expected: no score is published of so small a network.
    Measured: nothing that is kept.
    """
    return small_pretrain().override(
        {
            "name": "small_pretrain_boxes",
            "shards": "data/boxes",
            "clip.image_size": 96,
            "augment.crop_scale": None,
            "augment.image_sizes": (80, 96, 112),
            "model.head": SMALL_HEAD.override({"num_classes": 20, "anchors": "given"}),
            "loop.batch_size": 4,
            "loop.steps_per_epoch": 60,
        }
    )


def small_pretrain_masks() -> TrainConfig:
    """Pre-train a small 3D network on masks of real pictures, e.g. a piece of COCO (``--masks``); minutes on two cores.

    python jobs/pretrain.py small_pretrain_masks --shards data/masks
    Data: COCO, prepared with ``--masks True``.
    Cost: minutes on two CPU cores.
    Expected: no score is published of so small a network.
    Measured: nothing that is kept.
    """
    return small_pretrain().override(
        {
            "name": "small_pretrain_masks",
            "shards": "data/masks",
            "clip.image_size": 96,
            "model.backbone": "resnet3d18",
            "model.z_padding": "zeros",
            "model.head": SegmentationHead(num_classes=80),
            "loop.batch_size": 4,
            "loop.steps_per_epoch": 60,
        }
    )


def small_classification() -> TrainConfig:
    """Classify the cubes around a few dozen real nodules; minutes on two cores.

    python jobs/finetune.py small_classification --shards data/nodules
    Data: some of LIDC-IDRI, prepared with ``--task classification``.
    Cost: minutes on two CPU cores.
    Expected: no score is published of so small a network.
    Measured: nothing that is kept.
    """
    return lidc_classification().override({"name": "small_classification", "shards": "data/nodules", **SMALL_VOLUMES})


def small_segmentation() -> TrainConfig:
    """Segment the nodules in a few dozen real cubes; minutes on two cores.

    python jobs/finetune.py small_segmentation --shards data/nodules
    Data: some of LIDC-IDRI, prepared with ``--task segmentation``.
    Cost: minutes on two CPU cores.
    Expected: no score is published of so small a network.
    Measured: nothing that is kept.
    """
    return lidc_segmentation().override(
        {
            "name": "small_segmentation",
            "shards": "data/nodules",
            **SMALL_VOLUMES,
            "clip.num_slices": 24,
            "clip.image_size": 24,
            "clip.slice_spacing_mm": 2.0,
            "clip.pixel_spacing_mm": 2.0,
            "augment.shift_px": (2, 2),
        }
    )
