"""Every typed configuration. Imports pydantic only, so that parsing takes 0.1 s on a machine without torch.

One object travels the whole way: built by a recipe, overridden on the command line, sent as a dict through Ray Train,
as dotted keys through Ray Tune, stored in the checkpoint, read back by ``evaluate`` and ``serve``; it is validated
again at each door. Configs hold plain data. Field names carry their unit; the default is the main paper's setting
unless the docstring says otherwise.
"""

from math import prod
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mp3d.config.base import Config, Fraction
from mp3d.config.clips import AugmentConfig, ClipConfig
from mp3d.config.heads import UNKNOWN as UNKNOWN
from mp3d.config.heads import ClassificationHead, DetectionHead, SegmentationHead
from mp3d.config.judging import EvaluateConfig as EvaluateConfig
from mp3d.config.judging import GeometryPolicy, TrackingConfig
from mp3d.config.judging import PredictConfig as PredictConfig

BackboneName = Literal[
    "mp3d18", "mp3d18ba", "mp3d34ba", "mp3d63", "mp3d131",
    "p3d18", "p3d18ba", "p3d34ba", "p3d63", "p3d131",
    "resnet3d18", "resnet3d18_v1c", "resnet3d34", "resnet3d34_v1c", "resnet3d50", "resnet3d50_v1c",
    "resnet2d18", "resnet2d34", "resnet2d50",
]  # fmt: skip
"""MP3D keeps z; P3D pools it away; 3D ResNets have a 7 x 7 x 7 stem or V1c's; 2D ones read 3 slices as colours."""


class StrideConfig(Config):
    """Where a 3D ResNet halves its features; the defaults are those of pre-training and detection.

    The authors' nodule classifier is isotropic; their liver network also has stem 1; their nodule segmentation
    (``ResNet3DNoStemStride``) also has no pool, and stages (1, 2, 1, 2).
    """

    stem: Literal[1, 2] = 2
    """Of the stem's first convolution."""
    pool: Literal["3x3x3", "1x3x3", "none"] = "3x3x3"
    """The stem's max pool, of stride 2; 1x3x3 keeps slices apart, as inflated 2D networks have it (I3D)."""
    stages: tuple[Literal[1, 2], Literal[1, 2], Literal[1, 2], Literal[1, 2]] = (1, 2, 2, 2)
    """Of the first block of each stage."""
    isotropic: bool = False
    """Strides hold along z too (``depth_stride=True``); else z is kept."""

    @property
    def of_outputs(self) -> tuple[int, ...]:
        """Strides in the plane, from the input to the end of each stage."""
        behind_stem = self.stem * (1 if self.pool == "none" else 2)
        return tuple(behind_stem * prod(self.stages[: stage + 1]) for stage in range(len(self.stages)))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.isotropic and self.pool == "1x3x3":
            raise ValueError("isotropic strides halve z in the pool too; take pool 3x3x3 or none")
        return self


class ModelConfig(Config):
    """A backbone, and what sits on it."""

    backbone: BackboneName = "mp3d63"
    width: PositiveFloat = 1.0
    """Factor on every channel count of the backbone; 0.25 trains on a laptop."""
    norm: Literal["slice_gn", "gn3d", "bn", "frozen_bn"] = "slice_gn"
    """Group norm with statistics per slice (ours), over the whole clip (the published one), batch norm, or batch norm
    held fixed.
    """
    z_padding: Literal["zeros", "replicate"] = "zeros"
    """What the backbone's convolutions find beyond the ends of a clip: zeros (published), or its first and last slice
    once more (ours), which says less of where a clip ends, so that slabs and streams have more findings in common. For
    backbones that keep z.
    """
    strides: StrideConfig = StrideConfig()
    """Of a 3D ResNet; in MP3D only the pool can be chosen."""
    to_2d: Literal["group", "dense", "centre"] | None = None
    """How the slices around a key slice become one map: a weight per channel and slice (the group transform), a full
    convolution over them, or the key slice alone. None: group where a backbone keeps z, else centre, the only choice.
    """
    transform_taps: PositiveInt | None = None
    """How many of the slices around a key slice the transform weights, an odd number; the others are seen through the
    convolutions along z alone, so that the ends of a slab say less. None: all of a window (published).
    """
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] = -1
    """-1 trains everything, 0 freezes the stem, k also stages 1..k (the authors' counting)."""
    head: Annotated[DetectionHead | ClassificationHead | SegmentationHead, Field(discriminator="kind")] = (
        DetectionHead()
    )

    @property
    def keeps_z(self) -> bool:
        """Every slice has features of its own, to the end."""
        return not self.backbone.startswith(("p3d", "resnet2d")) and not self.strides.isotropic

    @model_validator(mode="after")
    def _check(self) -> Self:
        chosen = self.strides.model_copy(update={"pool": "3x3x3"}) != StrideConfig()
        if chosen and not self.backbone.startswith("resnet3d"):
            raise ValueError(f"{self.backbone} has the strides of its paper; choose strides for a resnet3d only")
        if self.strides.pool != "3x3x3" and self.backbone.startswith(("p3d", "resnet2d")):
            raise ValueError(f"{self.backbone} has a pool of its own; leave strides.pool alone")
        if self.head.kind == "detection" and (self.strides.isotropic or self.strides.of_outputs != (4, 8, 16, 32)):
            raise ValueError("a detector needs strides of 4, 8, 16, 32 and every slice; leave strides alone")
        if self.head.kind == "segmentation" and self.backbone.startswith(("p3d", "resnet2d")):
            raise ValueError(f"{self.backbone} has no features along z; a segmenter needs an mp3d or a resnet3d")
        if self.z_padding == "replicate" and not self.keeps_z:
            raise ValueError(f"z_padding replicate is for networks that keep z, not {self.backbone} here; take zeros")
        if self.to_2d in ("group", "dense") and not self.keeps_z:
            raise ValueError(f"{self.backbone} leaves no slices to weight; leave to_2d unset, or centre")
        if self.transform_taps is not None and self.head.kind != "detection":
            raise ValueError(f"a {self.head.kind} head has no transform; set transform_taps to None")
        if self.transform_taps is not None and (self.to_2d == "centre" or not self.keeps_z):
            raise ValueError(
                "the key slice alone is taken here, so there is nothing to weight; set transform_taps to None"
            )
        if self.transform_taps is not None and self.transform_taps % 2 == 0:
            raise ValueError(f"transform_taps is {self.transform_taps}; it must be odd, the key slice in its middle")
        return self


class OptimConfig(Config):
    """Optimiser and schedule; the defaults are the authors' for DeepLesion."""

    algorithm: Literal["sgd", "adam", "adamw"] = "sgd"
    """adam adds the weight decay to the gradient, adamw to the step."""
    lr: PositiveFloat = 0.02
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 1e-4
    schedule: Literal["step", "cosine", "poly", "constant"] = "step"
    """poly: from ``lr`` to ``min_lr`` as the remaining share of the steps to the power 0.9."""
    lr_batch: PositiveInt | None = None
    """Clips a step that ``lr`` and ``min_lr`` are meant for: with another global batch, as with another number of
    workers, they are scaled in proportion for sgd, by the square root for adam and adamw. None: taken as they stand.
    """
    min_lr: NonNegativeFloat = 0.0
    """Where ``poly`` and ``cosine`` end."""
    milestones: tuple[PositiveInt, ...] = (16, 22)
    """Epochs after which ``step`` multiplies the learning rate by ``gamma``."""
    gamma: PositiveFloat = 0.1
    warmup_steps: NonNegativeInt = 500
    """Linear warm-up from a third of the learning rate."""
    clip_grad_norm: PositiveFloat | None = 35.0


class LoopConfig(Config):
    """How long and on what grain; everything here but ``allowed_skips`` changes the trained weights."""

    epochs: PositiveInt = 24
    batch_size: PositiveInt = 2
    """Clips per worker and step."""
    steps_per_epoch: PositiveInt | None = None
    """None: every training clip once."""
    num_workers: PositiveInt = 1
    """Training processes; the global batch is ``batch_size * accumulate * num_workers``."""
    accumulate: PositiveInt = 1
    """Batches per worker whose gradients make one step."""
    min_workers: PositiveInt | None = None
    """Elastic: Ray Train goes on with as few as this where nodes are lost, and with more again where they come back.
    With fewer workers an epoch has more steps, of a learning rate smaller in proportion: about the same samples and the
    same progress, but not the same bits as an unbroken run. None: always ``num_workers``.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device computes in it, else fp32."""
    compile: bool = False
    """Have torch.compile make kernels of the backbone, the feature pyramid and the head of the proposals: minutes at
    the start and for every size of ``augment.image_sizes``, faster steps afterwards.
    """
    negatives: NonNegativeFloat = 0.0
    """Slices without a lesion drawn per slice with one, from series that were searched completely."""
    balance: Literal["none", "patients", "classes"] = "none"
    """none: every training sample once a pass; patients: every patient equally often, however many key slices he has,
    with negatives too; classes: every class of a classifier equally often. A pass is as long in any case.
    """
    max_validation_clips: PositiveInt | None = None
    """Evenly spread over the validation split; None: all."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of a moving average of weights and buffers, which is judged and saved in their place; None: no average."""
    patience: PositiveInt | None = None
    """Epochs without a better score after which the run stops; None: it never does."""
    allowed_skips: NonNegativeInt = 0
    """Steps of the whole run that may be left out because a loss or gradient is not finite. The next one stops the run,
    which may be resumed with more; the folder ``nonfinite`` names the slices of each.
    """
    sync_batch_norm: bool = False
    """Statistics of ``bn`` over the batches of all workers (the authors' segmentation recipes); else each has its own.
    """
    seed: NonNegativeInt = 0

    @property
    def step_clips(self) -> int:
        """Clips of one step of one worker."""
        return self.batch_size * self.accumulate

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is {self.min_workers}, above num_workers, which is {self.num_workers}")
        return self


class LaunchConfig(Config):
    """Where it runs; nothing here changes the trained weights, so it may differ when a run is resumed."""

    runner: Literal["ray", "local"] = "ray"
    """ray: Ray Train workers; local: this process, without Ray (one worker)."""
    storage_path: str = "runs"
    """Folder of all runs; with several nodes, one that all of them mount."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU per worker where the cluster has one now; say gpu where an autoscaler starts from none."""
    cpus_per_worker: PositiveFloat = 1.0
    loader_workers: NonNegativeInt = 0
    """Processes that read and decode clips beside each training process."""
    cache_dir: str | None = None
    """Folder on each node's own disk, where CT series are kept decoded once they were read; None: no cache."""
    cache_gb: PositiveFloat = 100.0
    """Most that the cache may hold; a series of 300 slices of 512 x 512 takes 0.16."""
    ingest: Literal["pyarrow", "ray_data"] = "pyarrow"
    """Who reads clips: each training process and its ``loader_workers``; or Ray Data tasks on the CPUs of the whole
    cluster (ray), in the same order to the same batches.
    """
    keep_checkpoints: PositiveInt = 2
    """Best checkpoints kept; the latest is always kept."""
    max_failures: NonNegativeInt = 2
    """Restarts of the worker group after a lost worker (ray)."""
    resize_interval_s: PositiveFloat = 60.0
    """How often an elastic run looks for more workers (``loop.min_workers``)."""
    wait_for_resources_s: NonNegativeFloat = 0.0
    """How long to wait for missing CPUs or GPUs (an autoscaler) before giving up."""


class TrainConfig(Config):
    """One training run, complete."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
    """The run's identity inside ``launch.storage_path``: the same name resumes it."""
    shards: str
    """Folder that ``jobs/prepare.py`` wrote."""
    init_from: str | None = None
    """Checkpoint (or run) whose backbone weights start this run."""
    clip: ClipConfig = ClipConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
    launch: LaunchConfig = LaunchConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        block, kind, augment = self.clip.block, self.model.head.kind, self.augment
        if block is not None and kind == "detection":
            raise ValueError("a detector reads whole slices; leave clip.block unset")
        if block is not None and augment.image_sizes:
            raise ValueError("a block is not resized; set augment.image_sizes to () and use augment.zoom")
        if block is None and (augment.shift_px, augment.quarter_turns) != ((0, 0), False):
            raise ValueError("augment.shift_px and quarter_turns are for blocks; set clip.block")
        if block is None and kind == "segmentation" and self.clip.slice_spacing_mm is not None:
            raise ValueError("of a CT a segmenter reads blocks; set clip.block to centre or anywhere")
        if self.loop.balance == "classes" and kind != "classification":
            raise ValueError(f"loop.balance classes is for a classifier; balance a {kind} head by patients")
        if augment.quarter_turns and self.clip.num_slices != self.clip.image_size:
            raise ValueError("augment.quarter_turns needs equal sides: set clip.num_slices to clip.image_size")
        if augment.crop_scale is not None and self.clip.slice_spacing_mm is not None:
            raise ValueError("augment.crop_scale is for colour pictures; of a CT augment.zoom shows a part")
        if self.clip.square_pictures and kind == "detection":
            raise ValueError("a detector is judged on whole pictures; leave clip.square_pictures unset")
        if self.clip.square_pictures and augment.crop_scale is None:
            raise ValueError("clip.square_pictures needs augment.crop_scale: which part is cut out in training")
        return self

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed: everything but where it runs, who watches, and how many steps may
        fail.
        """
        return self.model_dump(mode="json", exclude={"launch": True, "tracking": True, "loop": {"allowed_skips"}})


class ServeConfig(Config):
    """The endpoint. Model and clip are not here: the checkpoint knows them."""

    checkpoint: str
    """Checkpoint (or run) to serve."""
    mode: Literal["auto", "window", "slab", "stream"] = "auto"
    """How a series is read (``mp3d/predict.py``); auto: as the checkpoint was trained, streamed where its evaluation
    allows it.
    """
    compile: bool = False
    """Have torch.compile make kernels first, in minutes; see ``LoopConfig``. In mode stream the backbone has none."""
    phases: PositiveInt = 1
    """Times that a series is read, each time on a grid shifted by an equal part of its 2.5 mm. 1 answers for every 2.5
    mm; 3 for every slice of 1 mm.
    """
    score_threshold: Fraction | None = None
    """Findings below it are not reported; None: the operating point, or 0.3 where the checkpoint has none."""
    fps_per_image: PositiveFloat = 1.0
    """Which operating point of the checkpoint: false positives per image of the validation split."""
    max_findings: PositiveInt = 200
    num_replicas: PositiveInt = 1
    cpus_per_replica: PositiveFloat = 1.0
    gpus_per_replica: NonNegativeFloat = 0.0
    max_upload_mb: PositiveInt = 1024
    """Largest request body."""
    max_unpacked_mb: PositiveInt = 2048
    """Largest sum of the files in the zip, and of the volume that they decode to."""
    max_slices: PositiveInt = 2000
    """Most files in the zip."""
    tilt: Literal["refuse", "shear"] = "refuse"
    """See :class:`GeometryPolicy`."""
    uneven: Literal["refuse", "resample"] = "refuse"

    @property
    def geometry(self) -> GeometryPolicy:
        return GeometryPolicy(tilt=self.tilt, uneven=self.uneven)


class SweepConfig(Config):
    """A search by Ray Tune over one recipe; ASHA stops what is worse."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
    """The sweep's folder inside ``base.launch.storage_path``: the same name resumes it."""
    base: TrainConfig
    num_trials: PositiveInt = 8
    lr: tuple[PositiveFloat, PositiveFloat] = (1e-3, 1e-1)
    """Bounds of the learning rate, drawn evenly on a log scale."""
    anchor_ratios: tuple[tuple[PositiveFloat, ...], ...] = ((0.5, 1.0, 2.0), (0.7, 1.0, 1.4), (1.0,))
    """Sets of ratios to choose from; a fit starts from them."""
    anchors: tuple[Literal["given", "fit"], ...] = ("given", "fit")
    """Whether sizes and ratios are taken as they are, or fitted to the training boxes."""
    frozen_stages: tuple[Annotated[int, Field(ge=-1, le=4)], ...] = (-1, 0, 1)
    grace_epochs: PositiveInt = 1
    """Epochs that every trial may run before it can be stopped."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of the trials that reach a rung, one in so many goes on."""
    max_concurrent: NonNegativeInt = 0
    """Trials at a time; 0: as many as the cluster's CPUs and GPUs carry."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lr[0] >= self.lr[1]:
            raise ValueError(f"lr is {self.lr}; the lower bound comes first")
        if self.base.model.head.kind != "detection":
            raise ValueError(
                f"a sweep tunes a detector; the base recipe {self.base.name!r} has a {self.base.model.head.kind} head"
            )
        if self.base.loop.num_workers != 1:
            raise ValueError(
                f"a trial is one process; base.loop.num_workers is {self.base.loop.num_workers}, set it to 1"
            )
        return self
