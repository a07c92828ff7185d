"""Named, complete configurations. A recipe is a function; a variant is a recipe with fields changed on the command
line.

Recipes named ``..._paper`` keep the published choices: windows of nine slices, 3D group norm, the authors' anchors and
schedule. The other large detectors train on slabs with group norm per slice, so that a series can be inferred at once.
Figures of the papers are called that; nothing else is claimed.
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
    SegmentationHead,
    StrideConfig,
    TrainConfig,
)
from mp3d.recipes.pictures import (
    PICTURE_CLIP,
    vdt_coco_masks_r3d18,
    vdt_coco_mp3d18ba,
    vdt_coco_mp3d63,
    vdt_coco_r3d18,
    vdt_coco_r3d50,
    vdt_imagenet_mp3d63,
    vdt_imagenet_r3d18,
    vdt_imagenet_r3d18_paper,
    vdt_imagenet_r3d50_paper,
    vdt_imagenet_v1c_paper,
)
from mp3d.recipes.volumes import (
    lidc_classification,
    lidc_classification_paper,
    lidc_segmentation,
    lidc_segmentation_paper,
    lits_liver,
    lits_liver_paper,
)

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
HALF_OCTAVE_SIZES_PX = ((16.0, 22.6), (32.0, 45.3), (64.0, 90.5), (128.0, 181.0), (256.0, 362.0))
"""Two sizes an octave from 16 pixels on, where the authors have one: of DeepLesion's boxes 99 % meet a centred anchor
at IoU 0.7 instead of 51 %.
"""
OF_A_2D_NETWORK = {"model.norm": "frozen_bn"}
"""Its batch norms keep their statistics."""
SMALL_VOLUMES = {
    "model.width": 0.125,
    "model.norm": "slice_gn",
    "optim.lr": 2e-3,
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
        loop=LoopConfig(epochs=6, batch_size=2, steps_per_epoch=100, max_validation_clips=64),
        launch=LaunchConfig(cpus_per_worker=2),
    )


def synthetic_segmentation() -> TrainConfig:
    """Segment the lesions of the made CT world with a small 3D network, about four minutes on two cores.

    python jobs/finetune.py synthetic_segmentation
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


def small_pretrain_boxes() -> TrainConfig:
    """Pre-train a small MP3D on boxes in real pictures, e.g. of Tiny-ImageNet (``--boxes``); minutes on two cores.

    python jobs/pretrain.py small_pretrain_boxes --shards data/boxes
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
    """
    return small_pretrain().override(
        {
            "name": "small_pretrain_masks",
            "shards": "data/masks",
            "clip.image_size": 96,
            "model.backbone": "resnet3d18",
            "model.head": SegmentationHead(num_classes=80),
            "loop.batch_size": 4,
            "loop.steps_per_epoch": 60,
        }
    )


def small_classification() -> TrainConfig:
    """Classify the cubes around a few dozen real nodules; minutes on two cores.

    python jobs/finetune.py small_classification --shards data/nodules
    """
    return lidc_classification().override({"name": "small_classification", "shards": "data/nodules", **SMALL_VOLUMES})


def small_segmentation() -> TrainConfig:
    """Segment the nodules in a few dozen real cubes; minutes on two cores.

    python jobs/finetune.py small_segmentation --shards data/nodules
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
    """MP3D-63 on DeepLesion: slabs, group norm per slice, fitted anchors of two sizes a level, exact z interpolation;
    300 proposals a slice in evaluation (published: 1000).

    A step costs about twice the paper's.

    python jobs/finetune.py deeplesion_mp3d63 --shards /data/deeplesion --init-from /runs/vdt_imagenet_mp3d63
    """
    return deeplesion_mp3d63_paper().override(
        {
            "name": "deeplesion_mp3d63",
            "model.norm": "slice_gn",
            "model.head.anchors": "fit",
            "model.head.anchor_sizes_px": HALF_OCTAVE_SIZES_PX,
            "model.head.rpn_post_nms": (1000, 300),
            "clip.interpolation": "exact",
            "clip.num_key_slices": 9,
        }
    )


def deeplesion_mp3d18ba() -> TrainConfig:
    """MP3D-18ba on DeepLesion, about half the cost of MP3D-63.

    python jobs/finetune.py deeplesion_mp3d18ba --shards /data/deeplesion
    """
    return deeplesion_mp3d63().override({"name": "deeplesion_mp3d18ba", "model.backbone": "mp3d18ba"})


def deeplesion_p3d18ba_paper() -> TrainConfig:
    """VDT on DeepLesion as its authors released it, with the backbone that pools z away (CSPR
    ``faster_rcnn_p3d18ba_3dpfn9_as16_minms512_lesion_zflip_freeze0_fp16_optrange_fromcoco_2x.py``).

    python jobs/finetune.py deeplesion_p3d18ba_paper --shards /data/deeplesion --init-from /runs/mp3d18ba_coco
    """
    return deeplesion_mp3d63_paper().override(
        {
            "name": "deeplesion_p3d18ba_paper",
            "model.backbone": "p3d18ba",
            "augment.image_sizes": (384, 448, 512, 576, 640),
            # MMDetection 1's: twice the proposals in training, and its RoIAlign
            "model.head.rpn_post_nms": (2000, 1000),
            "model.head.roi_samples": 2,
            "model.head.roi_aligned": False,
        }
    )


def deeplesion_r3d18() -> TrainConfig:
    """The VDT paper's ResNet3D-18 on DeepLesion, its features of the nine slices weighted by a group transform.

    python jobs/finetune.py deeplesion_r3d18 --shards /data/deeplesion --init-from /runs/vdt_imagenet_r3d18
    """
    return deeplesion_mp3d63().override({"name": "deeplesion_r3d18", "model.backbone": "resnet3d18"})


def deeplesion_r3d50() -> TrainConfig:
    """The VDT paper's ResNet3D-50 on DeepLesion, as ResNet3D-18.

    python jobs/finetune.py deeplesion_r3d50 --shards /data/deeplesion --init-from /runs/vdt_coco_r3d50
    """
    return deeplesion_mp3d63().override({"name": "deeplesion_r3d50", "model.backbone": "resnet3d50"})


def deeplesion_i3d18() -> TrainConfig:
    """For comparison: ResNet3D-18 on DeepLesion from a 2D network whose kernels were repeated along z (I3D).

    python -m mp3d.convert resnet18-f37072fd.pth --out /runs/i3d18 --inflate mean
    python jobs/finetune.py deeplesion_i3d18 --shards /data/deeplesion --init-from /runs/i3d18
    """
    return deeplesion_r3d18().override({"name": "deeplesion_i3d18", **OF_A_2D_NETWORK})


def deeplesion_acs18() -> TrainConfig:
    """For comparison: ResNet3D-18 on DeepLesion from a 2D network whose kernels lie in the three planes (ACS).

    All weights of the 3D kernels are trained, where ACSConv keeps those beside the planes at nothing.

    python -m mp3d.convert resnet18-f37072fd.pth --out /runs/acs18 --inflate acs
    python jobs/finetune.py deeplesion_acs18 --shards /data/deeplesion --init-from /runs/acs18
    """
    return deeplesion_r3d18().override({"name": "deeplesion_acs18", **OF_A_2D_NETWORK})


def deeplesion_resnet2d50() -> TrainConfig:
    """For comparison: a 2D ResNet-50 on DeepLesion that reads three slices as colours (the 2.5D way).

    python -m mp3d.convert resnet50-0676ba61.pth --out /runs/resnet2d50 --backbone resnet2d50
    python jobs/finetune.py deeplesion_resnet2d50 --shards /data/deeplesion --init-from /runs/resnet2d50
    """
    return deeplesion_mp3d63_paper().override(
        {
            "name": "deeplesion_resnet2d50",
            "clip.num_slices": 3,
            "clip.interpolation": "exact",
            "model.head.anchors": "fit",
            "model.head.anchor_sizes_px": HALF_OCTAVE_SIZES_PX,
            "model.backbone": "resnet2d50",
            "model.norm": "frozen_bn",
        }
    )


Recipe = Callable[[], TrainConfig]
PRETRAIN: tuple[Recipe, ...] = (
    synthetic_pretrain,
    small_pretrain,
    small_pretrain_boxes,
    small_pretrain_masks,
    vdt_imagenet_r3d18_paper,
    vdt_imagenet_r3d50_paper,
    vdt_imagenet_v1c_paper,
    vdt_imagenet_r3d18,
    vdt_imagenet_mp3d63,
    vdt_coco_r3d18,
    vdt_coco_r3d50,
    vdt_coco_mp3d18ba,
    vdt_coco_mp3d63,
    vdt_coco_masks_r3d18,
)
FINETUNE: tuple[Recipe, ...] = (
    synthetic_finetune,
    synthetic_segmentation,
    small_finetune,
    small_classification,
    small_segmentation,
    deeplesion_mp3d63_paper,
    deeplesion_mp3d63,
    deeplesion_mp3d18ba,
    deeplesion_p3d18ba_paper,
    deeplesion_r3d18,
    deeplesion_r3d50,
    deeplesion_i3d18,
    deeplesion_acs18,
    deeplesion_resnet2d50,
    lidc_classification_paper,
    lidc_classification,
    lidc_segmentation_paper,
    lidc_segmentation,
    lits_liver_paper,
    lits_liver,
)
