"""Pre-training on colour pictures whose planes stand for slices (VDT paper): by class, by boxes, by masks."""

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
    TrainConfig,
)

PICTURE_CLIP = ClipConfig(num_slices=3, slice_spacing_mm=None, mean=114.495, std=57.63, image_size=224)
"""The planes of a colour picture as three slices (VDT; normalisation of the authors' configs)."""
COCO_CLASSES = 80


def vdt_imagenet_r3d18_paper() -> TrainConfig:
    """VDT: ResNet3D-18 on ImageNet, planes shuffled (CSPR
    ``resnet18_3d_BN_b32x8_coslr_labelsmoothing_channelshuffle.py``).

    The loss is a mean over the batch; theirs is a sum (``--model.head.loss-over-batch sum``), which makes the learning
    rate 32 times what it says.

    python jobs/pretrain.py vdt_imagenet_r3d18_paper --shards /data/imagenet
    Data: ImageNet (ILSVRC 2012), 1.28 million pictures.
    Cost: 12,280 PFLOP (11 h of an H200 at 40 % of its bf16 peak); authors' log: about seven days of eight
    Titan Xp.
    Expected: top-1 73.07 (published, in the name of a released checkpoint).
    Measured: nothing at this size yet.
    """
    return TrainConfig(
        name="vdt_imagenet_r3d18_paper",
        shards="data/imagenet",
        clip=PICTURE_CLIP.override({"square_pictures": True}),
        augment=AugmentConfig(z_flip=0, image_sizes=(), shuffle_planes=True, crop_scale=(0.08, 1.0)),
        model=ModelConfig(backbone="resnet3d18", norm="bn", head=ClassificationHead(num_classes=1000)),
        optim=OptimConfig(lr=0.1, lr_batch=256, schedule="cosine", warmup_steps=0, clip_grad_norm=None),
        loop=LoopConfig(epochs=100, batch_size=32, num_workers=8),
        launch=LaunchConfig(accelerator="gpu", loader_workers=8, cpus_per_worker=8),
    )


def vdt_imagenet_r3d18() -> TrainConfig:
    """VDT: ResNet3D-18 on ImageNet with group norm per slice, to start networks that have it.

    python jobs/pretrain.py vdt_imagenet_r3d18 --shards /data/imagenet
    Data: as ``vdt_imagenet_r3d18_paper``.
    Cost: 12,280 PFLOP (11 h of an H200 at 40 % of its bf16 peak).
    Expected: no score is published with this norm; 73.07 with batch norm.
    Measured: nothing at this size yet.
    """
    return vdt_imagenet_r3d18_paper().override({"name": "vdt_imagenet_r3d18", "model.norm": "slice_gn"})


def vdt_imagenet_r3d50_paper() -> TrainConfig:
    """VDT: ResNet3D-50 on ImageNet, as ResNet3D-18.

    python jobs/pretrain.py vdt_imagenet_r3d50_paper --shards /data/imagenet
    Data: as ``vdt_imagenet_r3d18_paper``.
    Cost: 18,320 PFLOP (16 h of an H200 at 40 % of its bf16 peak).
    Expected: top-1 77.50 (published, in the name of a released checkpoint).
    Measured: nothing at this size yet.
    """
    return vdt_imagenet_r3d18_paper().override({"name": "vdt_imagenet_r3d50_paper", "model.backbone": "resnet3d50"})


def vdt_imagenet_v1c_paper() -> TrainConfig:
    """VDT with the stem of three 3 x 3 x 3 convolutions, all of whose weights learn at depth 3 (ResNet3DV1c-18).

    python jobs/pretrain.py vdt_imagenet_v1c_paper --shards /data/imagenet
    Data: as ``vdt_imagenet_r3d18_paper``.
    Cost: 14,070 PFLOP (12 h of an H200 at 40 % of its bf16 peak).
    Expected: no score is published.
    Measured: nothing at this size yet.
    """
    return vdt_imagenet_r3d18_paper().override({"name": "vdt_imagenet_v1c_paper", "model.backbone": "resnet3d18_v1c"})


def vdt_imagenet_mp3d63() -> TrainConfig:
    """VDT by classification for MP3D-63, whose published weights were pre-trained on COCO boxes instead.

    python jobs/pretrain.py vdt_imagenet_mp3d63 --shards /data/imagenet
    Data: as ``vdt_imagenet_r3d18_paper``.
    Cost: 10,130 PFLOP (9 h of an H200 at 40 % of its bf16 peak).
    Expected: no score is published.
    Measured: nothing at this size yet.
    """
    return vdt_imagenet_r3d18_paper().override(
        {
            "name": "vdt_imagenet_mp3d63",
            "model.backbone": "mp3d63",
            "model.norm": "slice_gn",
            "model.z_padding": "replicate",
        }
    )


def vdt_coco_mp3d63() -> TrainConfig:
    """VDT by boxes: MP3D-63 as a detector on COCO, horizontal flips, sides of 384 to 640 pixels.

    The authors released no recipe; learning rate, batch, epochs and head are those of theirs for DeepLesion, anchors
    those of MMDetection for COCO. That planes are shuffled is known of their recipe for ImageNet only.

    python jobs/pretrain.py vdt_coco_mp3d63 --shards /data/coco
    Data: COCO 2017, 118 thousand pictures.
    Cost: 1,768 PFLOP (1.6 h of an H200 at 40 % of its bf16 peak) at most: pictures are seldom square.
    Expected: mAP 36.5 (published, as P3D-63).
    Measured: nothing at this size yet.
    """
    return TrainConfig(
        name="vdt_coco_mp3d63",
        shards="data/coco",
        clip=PICTURE_CLIP.override({"image_size": 640}),
        augment=AugmentConfig(z_flip=0, image_sizes=(384, 448, 512, 576, 640), shuffle_planes=True),
        model=ModelConfig(
            z_padding="replicate",
            head=DetectionHead(
                num_classes=COCO_CLASSES, anchor_sizes_px=((32,), (64,), (128,), (256,), (512,)), score_threshold=0.001
            ),
        ),
        optim=OptimConfig(lr_batch=16),
        loop=LoopConfig(epochs=24, batch_size=2, num_workers=8),
        launch=LaunchConfig(accelerator="gpu", loader_workers=4, cpus_per_worker=4),
    )


def vdt_coco_mp3d18ba() -> TrainConfig:
    """VDT by boxes: MP3D-18ba, as MP3D-63.

    python jobs/pretrain.py vdt_coco_mp3d18ba --shards /data/coco
    Data: as ``vdt_coco_mp3d63``.
    Cost: 1,192 PFLOP (1.0 h of an H200 at 40 % of its bf16 peak) at most.
    Expected: mAP 34.3 (published, in the name of a released checkpoint).
    Measured: nothing at this size yet.
    """
    return vdt_coco_mp3d63().override({"name": "vdt_coco_mp3d18ba", "model.backbone": "mp3d18ba"})


def vdt_coco_r3d18() -> TrainConfig:
    """VDT by boxes: ResNet3D-18, as MP3D-63.

    python jobs/pretrain.py vdt_coco_r3d18 --shards /data/coco
    Data: as ``vdt_coco_mp3d63``.
    Cost: 1,990 PFLOP (1.7 h of an H200 at 40 % of its bf16 peak) at most.
    Expected: mAP 34.2 (published, in the paper and in the name of a released checkpoint).
    Measured: nothing at this size yet.
    """
    return vdt_coco_mp3d63().override({"name": "vdt_coco_r3d18", "model.backbone": "resnet3d18"})


def vdt_coco_r3d50() -> TrainConfig:
    """VDT by boxes: ResNet3D-50, as MP3D-63.

    python jobs/pretrain.py vdt_coco_r3d50 --shards /data/coco
    Data: as ``vdt_coco_mp3d63``.
    Cost: 2,716 PFLOP (2.4 h of an H200 at 40 % of its bf16 peak) at most.
    Expected: mAP 37.0 (published, in the paper and in the name of a released checkpoint).
    Measured: nothing at this size yet.
    """
    return vdt_coco_mp3d63().override({"name": "vdt_coco_r3d50", "model.backbone": "resnet3d50"})


def vdt_coco_masks_r3d18() -> TrainConfig:
    """VDT by masks: ResNet3D-18 with a U-Net decoder on the class masks of COCO (or of PASCAL VOC: 255 is unknown).

    Nothing of it is published but that it was done.

    python jobs/pretrain.py vdt_coco_masks_r3d18 --shards /data/coco_masks
    Data: COCO 2017 with ``--masks True``, or PASCAL VOC.
    Cost: 3,184 PFLOP (3 h of an H200 at 40 % of its bf16 peak) at most.
    Expected: no score is published.
    Measured: nothing at this size yet.
    """
    return TrainConfig(
        name="vdt_coco_masks_r3d18",
        shards="data/coco_masks",
        clip=PICTURE_CLIP.override({"image_size": 512}),
        augment=AugmentConfig(z_flip=0, image_sizes=(384, 448, 512), shuffle_planes=True, crop_scale=(0.25, 1.0)),
        model=ModelConfig(
            backbone="resnet3d18", head=SegmentationHead(num_classes=COCO_CLASSES, channels=64, dice_weight=0.0)
        ),
        optim=OptimConfig(lr_batch=16, schedule="poly", min_lr=1e-4),
        loop=LoopConfig(epochs=24, batch_size=2, num_workers=8, max_validation_clips=1000),
        launch=LaunchConfig(accelerator="gpu", loader_workers=4, cpus_per_worker=4),
    )
