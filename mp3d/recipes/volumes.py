"""Nodules and livers (VDT paper; CSPR, ``LIDC_Cls_configs`` and ``medseg``): blocks of CT, classified or segmented.

Those named ``..._paper`` have the published network, schedule and grid; what their code does by mistake is mended, and
done again where a switch asks for it. Differs from them in any case: the warm-up rises where theirs is constant,
patients are the unit of splitting. The others start from group norm per slice, which does not mind small batches.
"""

from mp3d.config import (
    AugmentConfig,
    ClassificationHead,
    ClipConfig,
    LaunchConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    SegmentationHead,
    StrideConfig,
    TrainConfig,
)

NODULE_CLIP = ClipConfig(
    num_slices=48,
    image_size=48,
    slice_spacing_mm=1.0,
    pixel_spacing_mm=1.0,
    block="centre",
    # the voxels that the authors start from are 0..255 already, and their code does not say of which window
    window_hu=(-1024.0, 400.0),
)
"""A cube of 48 mm around a nodule."""
NODULE_AUGMENT = AugmentConfig(image_sizes=(), shift_px=(5, 5), quarter_turns=True, horizontal_flip=0.75, z_flip=0.0)
"""Turned about all axes, and mirrored on one of them in three cases of four."""
EIGHT_GPUS = LaunchConfig(accelerator="gpu", loader_workers=4, cpus_per_worker=4)


def lidc_classification_paper() -> TrainConfig:
    """Benign or malignant: ResNet3D-18 on the cubes around the nodules of LIDC-IDRI.

    The threshold comes from the validation split, theirs from the test split (``evaluate.py --threshold authors``).

    python jobs/prepare.py --out /data/classes lidc --root /data/LIDC-IDRI --task classification
    python jobs/finetune.py lidc_classification_paper --shards /data/classes --init-from /runs/vdt_imagenet_r3d18_paper
    Data: LIDC-IDRI, nodules rated benign or malignant (the authors': 1,323 for training).
    Cost: 1.4 PFLOP (seconds of an H200).
    Expected: no score is known.
    Measured: nothing at this size yet.
    """
    return TrainConfig(
        name="lidc_classification_paper",
        shards="data/classes",
        clip=NODULE_CLIP.override({"mean": 99.0, "std": 77.0}),
        augment=NODULE_AUGMENT,
        model=ModelConfig(
            backbone="resnet3d18",
            norm="bn",
            strides=StrideConfig(isotropic=True),
            head=ClassificationHead(num_classes=2, label_smoothing=0.0),
        ),
        optim=OptimConfig(
            algorithm="adam", lr=5e-4, lr_batch=128, milestones=(30, 60, 90), warmup_steps=50, clip_grad_norm=None
        ),
        loop=LoopConfig(epochs=100, batch_size=32, num_workers=4),
        launch=EIGHT_GPUS,
    )


def lidc_classification() -> TrainConfig:
    """Benign or malignant, with group norm per slice.

    python jobs/finetune.py lidc_classification --shards /data/classes --init-from /runs/vdt_imagenet_r3d18
    Data: as ``lidc_classification_paper``.
    Cost: 1.4 PFLOP (seconds of an H200).
    Expected: no score is known.
    Measured: nothing at this size yet.
    """
    return lidc_classification_paper().override({"name": "lidc_classification", "model.norm": "slice_gn"})


def lidc_segmentation_paper() -> TrainConfig:
    """Nodules of LIDC-IDRI: ResNet3D-18 without stride or pool in the stem, FCN decoder (``res18_3d_BN_fcn.py``).

    Their loss has its softmax over an image axis and ignores the configured weights (``--model.head.loss
    lidc_authors``).

    python jobs/prepare.py --out /data/nodules lidc --root /data/LIDC-IDRI --task segmentation
    python jobs/finetune.py lidc_segmentation_paper --shards /data/nodules --init-from /runs/vdt_imagenet_r3d18_paper
    Data: LIDC-IDRI, nodules with outlines (the authors': 2,142 for training).
    Cost: 1,118 PFLOP (1.0 h of an H200 at 40 % of its bf16 peak).
    Expected: no score is known.
    Measured: nothing at this size yet.
    """
    return TrainConfig(
        name="lidc_segmentation_paper",
        shards="data/nodules",
        clip=NODULE_CLIP,
        augment=NODULE_AUGMENT,
        model=ModelConfig(
            backbone="resnet3d18",
            norm="bn",
            strides=StrideConfig(stem=1, pool="none", stages=(1, 2, 1, 2), isotropic=True),
            head=SegmentationHead(
                decoder="fcn",
                channels=128,
                dropout=0.0,
                dice_weight=0.3,
                dice_smooth=1.0,
                dice_over="batch",
                dice_background=True,
            ),
        ),
        optim=OptimConfig(
            algorithm="adam", lr=1e-3, lr_batch=32, schedule="poly", min_lr=1e-6, warmup_steps=0, clip_grad_norm=None
        ),
        loop=LoopConfig(epochs=200, batch_size=4, num_workers=8, sync_batch_norm=True),
        launch=EIGHT_GPUS,
    )


def lidc_segmentation() -> TrainConfig:
    """Nodules of LIDC-IDRI, with group norm per slice.

    python jobs/finetune.py lidc_segmentation --shards /data/nodules --init-from /runs/vdt_imagenet_r3d18
    Data: as ``lidc_segmentation_paper``.
    Cost: 1,118 PFLOP (1.0 h of an H200 at 40 % of its bf16 peak).
    Expected: no score is known.
    Measured: nothing at this size yet.
    """
    return lidc_segmentation_paper().override({"name": "lidc_segmentation", "model.norm": "slice_gn"})


def lits_liver_paper() -> TrainConfig:
    """The liver in LiTS: ResNet3D-18 with a stride-1 stem and a U-Net decoder on blocks of 32 x 256 x 256.

    An epoch is ten of theirs: 66 steps of sixteen blocks; half as many blocks without liver as with. Fewer workers take
    66 steps too, and so read fewer blocks: raise loop.batch_size or loop.accumulate as much. The centre of a block lies
    within 128 pixels of the slice's in each direction; theirs anywhere in the slice, which is magnified first. Their
    Dice loss never falls below 1/3 (``--model.head.loss lits_authors``).

    python jobs/prepare.py --out /data/liver lits --root /data/LiTS --classes liver
    python jobs/finetune.py lits_liver_paper --shards /data/liver --init-from /runs/vdt_imagenet_r3d18_paper
    python jobs/evaluate.py --checkpoint RUN --shards /data/liver --out reports/liver --largest-component True
    Data: LiTS, 105 cases for training.
    Cost: 375 PFLOP (0.3 h of an H200 at 40 % of its bf16 peak).
    Expected: Dice 95.82 with ``--model.frozen-stages 1``, which freezes stem and stage 1 (published; that it is the
    liver's is unverified); no score is published of all stages trained, as here and in the released configs.
    Measured: nothing at this size yet.
    """
    return TrainConfig(
        name="lits_liver_paper",
        shards="data/liver",
        clip=ClipConfig(
            num_slices=32, image_size=256, slice_spacing_mm=1.0, block="anywhere", window_hu=(-200.0, 250.0)
        ),
        augment=AugmentConfig(image_sizes=(), shift_px=(0, 128), zoom=(0.8, 1.2)),
        model=ModelConfig(
            backbone="resnet3d18",
            norm="bn",
            strides=StrideConfig(stem=1, isotropic=True),
            head=SegmentationHead(),
        ),
        optim=OptimConfig(
            algorithm="adam", lr=1e-4, lr_batch=16, schedule="poly", min_lr=1e-6, warmup_steps=0, clip_grad_norm=None
        ),
        loop=LoopConfig(
            epochs=50,
            batch_size=2,
            steps_per_epoch=66,
            num_workers=8,
            sync_batch_norm=True,
            negatives=0.5,
            max_validation_clips=400,
        ),
        launch=EIGHT_GPUS,
    )


def lits_liver() -> TrainConfig:
    """The liver in LiTS, with group norm per slice; for fewer workers see ``lits_liver_paper``.

    python jobs/finetune.py lits_liver --shards /data/liver --init-from /runs/vdt_imagenet_r3d18
    Data: as ``lits_liver_paper``.
    Cost: 375 PFLOP (0.3 h of an H200 at 40 % of its bf16 peak).
    Expected: no score is published with this norm.
    Measured: nothing at this size yet.
    """
    return lits_liver_paper().override({"name": "lits_liver", "model.norm": "slice_gn"})
