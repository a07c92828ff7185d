"""Trained models in use: judged on shards, or asked about series without labels."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mp3d.config.base import Config, Fraction


class TrackingConfig(Config):
    """Weights & Biases; a run never depends on it."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where an API key is present, else offline."""
    project: str = "mp3d"
    group: str | None = None
    pictures: NonNegativeInt = 0
    """Validation slices with boxes, sent after every epoch of training. They show patients: 0 sends none."""


class GeometryPolicy(Config):
    """What happens to a DICOM series that is no regular orthogonal stack, but could be made one."""

    tilt: Literal["refuse", "shear"] = "refuse"
    """A stack that a tilted gantry sheared: refuse it, or shift its rows back."""
    uneven: Literal["refuse", "resample"] = "refuse"
    """Uneven slice spacing: refuse it, or interpolate an even one where no gap is too wide for it."""


class EvaluateConfig(Config):
    """Metrics of a checkpoint, or of the predictions that one made, on one split of prepared shards."""

    out: str
    """Folder for metrics.json, predictions.parquet, report.html and the figures as PNG."""
    checkpoint: str | None = None
    """Checkpoint (or run) to judge."""
    shards: str | None = None
    """Folder that ``jobs/prepare.py`` wrote; beside ``predictions`` only for the report's pictures."""
    predictions: str | None = None
    """A predictions.parquet to judge in place of a checkpoint; the split is the one that it is of."""
    compare: str | None = None
    """The predictions.parquet of another model on the same slices or cases: both side by side, with a paired test."""
    split: str = "test"
    slices: Literal["key", "all"] = "key"
    """Of a detector. key: annotated slices, each in its own clip; all: every slice of the searched series, whose boxes
    are linked into 3D lesions and judged as such too.
    """
    ablations: bool = False
    """Also judge the same network without training, and fed its key slice nine times (no z context)."""
    streamed: bool = False
    """Also judge it streamed over whole series, and keep beside the checkpoint what that costs on the split
    ``choose_on``, against whole series in the clips of the training: where it is at most half a point of mean
    sensitivity, on ten patients or more, a detector trained on slabs is streamed from then on.
    """
    choose_on: str = "val"
    """Split on which a detector's operating points are chosen and kept beside the checkpoint, whenever it is judged
    with key slices; none are chosen where the data have no such split. They are used by ``predict`` and ``serve``. On
    the same split it is measured what streaming costs.
    """
    replicates: Annotated[int, Field(ge=100)] = 1000
    """Of the bootstrap over patients, behind every interval and test."""
    seed: NonNegativeInt = 0
    """Of the bootstrap."""
    tracking: TrackingConfig = TrackingConfig()
    max_clips: PositiveInt | None = None
    """Evenly spread over the split; None: every annotated slice, series or picture."""
    threshold: Literal["val", "authors"] = "val"
    """Where the threshold of a two-class classifier comes from: the one that is best on the validation split; or, as in
    the authors' code, the tenth that is best on the judged split itself.
    """
    largest_component: bool = False
    """Of a segmenter's answer for a series only the largest connected part of each class is judged."""
    batch_size: PositiveInt = 4
    runner: Literal["ray", "local"] = "ray"
    """ray: Ray Data over ``num_workers`` processes; local: this process."""
    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveFloat = 1.0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.checkpoint is None) == (self.predictions is None):
            raise ValueError("give either checkpoint or predictions: what is to be judged")
        if self.checkpoint is not None and self.shards is None:
            raise ValueError("a checkpoint is judged on data: give shards")
        if self.slices == "all" and (self.ablations or self.streamed):
            raise ValueError("ablations and streamed are for key slices; leave slices as it is")
        if self.predictions is not None and (self.ablations or self.streamed):
            raise ValueError("ablations and streamed need the checkpoint itself, not its predictions")
        return self


class PredictConfig(Config):
    """Findings in CT series without labels."""

    checkpoint: str
    """Checkpoint (or run) of a detector."""
    input: str
    """A folder, searched through all subfolders, of DICOM files and of NIfTI, NRRD or MetaImage volumes; or one such
    file.
    """
    out: str
    """Folder for findings.json, findings.csv and the pictures."""
    volumes: str = "*"
    """Which NIfTI, NRRD and MetaImage files of the folder are meant, by a pattern of their names: masks may lie beside
    them.
    """
    score_threshold: Fraction | None = None
    """Boxes below it are not reported; None: the operating point."""
    fps_per_image: PositiveFloat = 1.0
    """Which operating point of the checkpoint: false positives per image of the validation split."""
    mode: Literal["auto", "window", "slab", "stream"] = "auto"
    """How a series is read (``mp3d/predict.py``)."""
    link_overlap: Fraction = 0.5
    """Share of the smaller of two boxes on neighbouring slices from which on they are of one lesion
    (``mp3d/lesions.py``).
    """
    max_pictures: NonNegativeInt = 50
    """Lesions of a series that get a picture, the best first."""
    tilt: Literal["refuse", "shear"] = "refuse"
    """See :class:`GeometryPolicy`."""
    uneven: Literal["refuse", "resample"] = "refuse"
    allowed_rejects: NonNegativeInt = 0
    """Refused files and series up to which the exit code is 0; beyond it, 5."""
    runner: Literal["ray", "local"] = "ray"
    """ray: Ray Data, series by series, over ``num_workers`` processes; local: this process."""
    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveFloat = 1.0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"

    @property
    def geometry(self) -> GeometryPolicy:
        return GeometryPolicy(tilt=self.tilt, uneven=self.uneven)
