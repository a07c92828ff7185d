"""Named, complete configurations. A recipe is a function; a variant is a recipe with fields changed on the command
line.

Recipes named ``..._paper`` keep the published choices: windows of nine slices, 3D group norm, the authors' anchors and
schedule. Figures of the papers are called that; nothing else is claimed.
"""

from collections.abc import Callable

from mp3d.config import (
    AugmentConfig,
    ClassificationHead,
    ClipConfig,
    DetectionHead,
    LaunchConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

SYNTHETIC_WORLD = "data/synthetic"
"""Where the synthetic recipes look for their shards; jobs make them there if they are missing."""
PICTURE_CLIP = ClipConfig(num_slices=3, slice_spacing_mm=None, mean=114.495, std=57.63, image_size=224)
"""The planes of a colour picture as three slices (VDT; normalisation of the authors' configs)."""
SMALL_HEAD = DetectionHead(
    fpn_channels=64,
    box_features=128,
    # several sizes on the finest level: lesions of a small picture measure a few of its cells
    anchor_sizes_px=((6, 9, 13), (16, 20, 24), (32, 36, 40), (48, 56, 64), (80, 96, 112)),
    anchor_ratios=(1.0,),
    rpn_positive_iou=0.6,
    rpn_samples=64,
    rpn_pre_nms=(400, 200),
    rpn_post_nms=(200, 100),
    box_samples=64,
    score_threshold=0.01,
)
SMALL_TUMOUR_SIZES_PX = ((12, 16, 20), (24, 32, 40), (48, 56, 64), (72, 84, 96), (112, 128, 144))


def synthetic_pretrain() -> TrainConfig:
    """Pre-train a small MP3D on made colour pictures: the demo's first training, about a minute on two cores.

    python jobs/pretrain.py synthetic_pretrain
    """
    return TrainConfig(
        name="synthetic_pretrain",
        shards=f"{SYNTHETIC_WORLD}/pictures",
        clip=PICTURE_CLIP.override({"image_size": 64}),
        augment=AugmentConfig(z_flip=0, image_sizes=(), shuffle_planes=True),
        model=ModelConfig(backbone="mp3d18ba", width=0.25, head=ClassificationHead(num_classes=8)),
        optim=OptimConfig(
            algorithm="adamw", lr=2e-3, weight_decay=0.01, schedule="cosine", warmup_steps=20, clip_grad_norm=5
        ),
        loop=LoopConfig(epochs=4, batch_size=32, steps_per_epoch=100, max_validation_clips=256),
        launch=LaunchConfig(cpus_per_worker=2),
    )


def synthetic_finetune() -> TrainConfig:
    """Train a small lesion detector on the made CT world: the demo's detector, about three minutes on two cores.

    python jobs/finetune.py synthetic_finetune --init-from runs/synthetic_pretrain
    """
    return TrainConfig(
        name="synthetic_finetune",
        shards=f"{SYNTHETIC_WORLD}/ct",
        clip=ClipConfig(image_size=128),
        augment=AugmentConfig(image_sizes=()),
        model=ModelConfig(backbone="mp3d18ba", width=0.25, head=SMALL_HEAD),
        optim=OptimConfig(
            algorithm="adamw", lr=2e-3, weight_decay=0.01, schedule="cosine", warmup_steps=20, clip_grad_norm=10
        ),
        loop=LoopConfig(epochs=6, batch_size=4, steps_per_epoch=100, max_validation_clips=64),
        launch=LaunchConfig(cpus_per_worker=2),
    )


def small_pretrain() -> TrainConfig:
    """Pre-train a small MP3D on a folder of real pictures of 20 classes, e.g. a piece of Tiny-ImageNet; minutes on two
    cores.

    python jobs/pretrain.py small_pretrain --shards data/pictures
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
    """
    return synthetic_finetune().override(
        {
            "name": "small_finetune",
            "shards": "data/ct",
            "clip.image_size": 160,
            "augment.image_sizes": (128, 160, 192),
            "model.head.anchor_sizes_px": SMALL_TUMOUR_SIZES_PX,
            "model.head.anchor_ratios": (0.7, 1.0, 1.4),
            "loop.negatives": 0.25,
            "loop.epochs": 6,
        }
    )


def vdt_imagenet_r3d18_paper() -> TrainConfig:
    """VDT: ResNet3D-18 on ImageNet, planes shuffled (CSPR
    ``resnet18_3d_BN_b32x8_coslr_labelsmoothing_channelshuffle.py``).

    python jobs/pretrain.py vdt_imagenet_r3d18_paper --shards /data/imagenet
    The authors' file name says top-1 73.07, about a week on eight Titan Xp.
    """
    return TrainConfig(
        name="vdt_imagenet_r3d18_paper",
        shards="data/imagenet",
        clip=PICTURE_CLIP,
        augment=AugmentConfig(z_flip=0, image_sizes=(), shuffle_planes=True, crop_scale=(0.08, 1.0)),
        model=ModelConfig(backbone="resnet3d18", norm="bn", head=ClassificationHead(num_classes=1000)),
        optim=OptimConfig(lr=0.1, schedule="cosine", warmup_steps=0, clip_grad_norm=None),
        loop=LoopConfig(epochs=100, batch_size=32, num_workers=8),
        launch=LaunchConfig(accelerator="gpu", loader_workers=8, cpus_per_worker=8),
    )


def vdt_imagenet_v1c_paper() -> TrainConfig:
    """VDT with the stem of three 3 x 3 x 3 convolutions, all of whose weights learn at depth 3 (ResNet3DV1c-18).

    python jobs/pretrain.py vdt_imagenet_v1c_paper --shards /data/imagenet
    """
    return vdt_imagenet_r3d18_paper().override({"name": "vdt_imagenet_v1c_paper", "model.backbone": "resnet3d18_v1c"})


def vdt_imagenet_mp3d63() -> TrainConfig:
    """VDT by classification for MP3D-63, whose published weights were pre-trained on COCO boxes instead.

    python jobs/pretrain.py vdt_imagenet_mp3d63 --shards /data/imagenet
    """
    return vdt_imagenet_r3d18_paper().override(
        {"name": "vdt_imagenet_mp3d63", "model.backbone": "mp3d63", "model.norm": "slice_gn"}
    )


def deeplesion_mp3d63_paper() -> TrainConfig:
    """MP3D-63 on DeepLesion (MP3D ``mp3d_groupconv.py``): sixteen clips a step on eight GPUs, 24 epochs, z and
    horizontal flips.

    python jobs/finetune.py deeplesion_mp3d63_paper --shards /data/deeplesion --init-from /runs/vdt_imagenet_mp3d63
    """
    return TrainConfig(
        name="deeplesion_mp3d63_paper",
        shards="data/deeplesion",
        clip=ClipConfig(interpolation="authors"),
        model=ModelConfig(norm="gn3d"),
        loop=LoopConfig(epochs=24, batch_size=2, num_workers=8),
        launch=LaunchConfig(accelerator="gpu", loader_workers=4, cpus_per_worker=4),
    )


def deeplesion_mp3d63() -> TrainConfig:
    """MP3D-63 on DeepLesion with group norm per slice and exact z interpolation.

    python jobs/finetune.py deeplesion_mp3d63 --shards /data/deeplesion --init-from /runs/vdt_imagenet_mp3d63
    """
    return deeplesion_mp3d63_paper().override(
        {"name": "deeplesion_mp3d63", "model.norm": "slice_gn", "clip.interpolation": "exact"}
    )


def deeplesion_mp3d18ba() -> TrainConfig:
    """MP3D-18ba on DeepLesion, about half the cost of MP3D-63.

    python jobs/finetune.py deeplesion_mp3d18ba --shards /data/deeplesion
    """
    return deeplesion_mp3d63().override({"name": "deeplesion_mp3d18ba", "model.backbone": "mp3d18ba"})


Recipe = Callable[[], TrainConfig]
PRETRAIN: tuple[Recipe, ...] = (
    synthetic_pretrain,
    small_pretrain,
    vdt_imagenet_r3d18_paper,
    vdt_imagenet_v1c_paper,
    vdt_imagenet_mp3d63,
)
FINETUNE: tuple[Recipe, ...] = (
    synthetic_finetune,
    small_finetune,
    deeplesion_mp3d63_paper,
    deeplesion_mp3d63,
    deeplesion_mp3d18ba,
)
