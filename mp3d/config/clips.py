"""What the network reads: how stored slices become clips, and how training changes them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mp3d.config.base import Config, Fraction


class ClipConfig(Config):
    """How stored slices become what the network reads (MP3D port, ``image_io_3DCE.py``)."""

    num_slices: PositiveInt = 9
    """Slices that a key slice is judged by, odd; it is the middle one. 3 for colour pictures (their planes). Of a block
    all its slices, be they even.
    """
    num_key_slices: PositiveInt = 1
    """Neighbouring slices of a clip any of which may be a key slice. 1: windows, as published; 9: slabs of 17 slices.
    A detector trained on slabs can be run over a whole series at once.
    """
    slice_spacing_mm: PositiveFloat | None = 2.5
    """Spacing of the clip along z. None: the planes of a colour picture; of a block, slices as they are stored."""
    interpolation: Literal["exact", "authors"] = "exact"
    """Where neighbours lie that fall between stored slices: at their own place; or where the authors' loader puts them,
    which reuses the first neighbour's weights for all and is off by up to 1.5 mm (0 at 1, 2.5 and 5 mm spacing).
    """
    window_hu: tuple[float, float] = (-1024.0, 1050.0)
    """Hounsfield range mapped linearly to 0..255 and clipped; unused for colour pictures."""
    mean: float = 123.675
    """Subtracted from 0..255."""
    std: PositiveFloat = 58.395
    """Divides after the mean is subtracted."""
    image_size: PositiveInt = 512
    """Pixels of the longer side after resizing, in evaluation and serving; a multiple of 32 wastes no padding."""
    block: Literal["centre", "anywhere"] | None = None
    """A clip is a block of a series, ``num_slices`` x ``image_size`` x ``image_size``, instead of whole slices: the one
    in the middle of each stored series, as of the cubes around nodules; or any, as of an organ. Beyond the series is
    air.
    """
    square_pictures: bool = False
    """Colour pictures are cut square, as ImageNet's: in training by ``augment.crop_scale``; in evaluation the middle
    of ``image_size``, of a shorter side of 8/7 of it (224 of 256). Else they stay whole.
    """
    pixel_spacing_mm: PositiveFloat | None = None
    """Spacing of a block's rows and columns; None takes the pixels as they are stored."""

    @property
    def depth(self) -> int:
        """Slices of a clip: ``num_slices`` around each of its possible key slices."""
        return self.num_slices + self.num_key_slices - 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.block is None and self.num_slices % 2 == 0:
            raise ValueError(f"num_slices is {self.num_slices}; it must be odd so that there is a middle slice")
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"window_hu is {self.window_hu}; the lower bound comes first")
        if self.block is not None and (self.num_key_slices > 1 or self.interpolation != "exact"):
            raise ValueError("a block has no window slid over it; set num_key_slices to 1 and interpolation to exact")
        if self.square_pictures and self.slice_spacing_mm is not None:
            raise ValueError("square_pictures is for colour pictures, which have no slice_spacing_mm")
        if self.block is None and self.pixel_spacing_mm is not None:
            raise ValueError("whole slices are brought to image_size; pixel_spacing_mm is for blocks")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "none": {
        "horizontal_flip": 0.0, "z_flip": 0.0, "rotation_deg": 0.0, "zoom": (1.0, 1.0), "contrast": (1.0, 1.0),
        "brightness": 0.0, "noise": 0.0,
    },
    "flips": {
        "horizontal_flip": 0.5, "z_flip": 0.5, "rotation_deg": 0.0, "zoom": (1.0, 1.0), "contrast": (1.0, 1.0),
        "brightness": 0.0, "noise": 0.0,
    },
    "light": {
        "horizontal_flip": 0.5, "z_flip": 0.5, "rotation_deg": 5.0, "zoom": (0.9, 1.1), "contrast": (0.95, 1.05),
        "brightness": 0.02, "noise": 0.0,
    },
    "strong": {
        "horizontal_flip": 0.5, "z_flip": 0.5, "rotation_deg": 15.0, "zoom": (0.75, 1.33), "contrast": (0.85, 1.15),
        "brightness": 0.05, "noise": 0.01,
    },
}  # fmt: skip
"""``flips`` is the authors'. Nodules and organs that turn into each other under a mirror or a rotation stay what they
are; a detector of them is to know them so.
"""


class AugmentConfig(Config):
    """Random changes of a training clip; all zero switches them off."""

    SETS = {"preset": frozenset(PRESETS["none"])}
    preset: Literal["none", "flips", "light", "strong"] | None = None
    """Sets flips, rotation_deg, zoom, contrast, brightness and noise at once, but those that are given with it; what it
    set is what the configuration then holds.
    """
    horizontal_flip: Fraction = 0.5
    """Probability of mirroring left and right."""
    z_flip: Fraction = 0.5
    """Probability of reversing the slice order."""
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in the plane, either way; boxes follow as those of the ellipses that fill them."""
    zoom: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Bounds of a random magnification in the plane, at a random place. Every box stays in the picture, whole."""
    contrast: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Bounds of a random factor on all values, about the middle of ``clip.window_hu`` (of 0..255 in pictures)."""
    brightness: Fraction = 0.0
    """Largest shift of all values, as a share of the window."""
    noise: Fraction = 0.0
    """Standard deviation of noise added to every pixel, as a share of the window."""
    image_sizes: tuple[PositiveInt, ...] = (448, 512, 576)
    """Pixels of the longer side, one drawn for each batch; empty: always ``clip.image_size``."""
    shuffle_planes: bool = False
    """Colour pictures: a fresh random order of the three planes for every picture (VDT, ``RandomChannelShuffle``)."""
    crop_scale: tuple[Fraction, Fraction] | None = None
    """Colour pictures: area of the random resized crop as a share of the picture; None: no crop. Boxes are cut with it,
    and left out where less than 0.3 of one remains.
    """
    shift_px: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """Blocks: how far the centre is moved at most, along z and in the plane, in voxels of the block."""
    quarter_turns: bool = False
    """Blocks of equal sides: a random quarter turn, none to three, around each axis."""

    @model_validator(mode="before")
    @classmethod
    def _set(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") not in PRESETS:
            return given
        return PRESETS[given["preset"]] | {name: value for name, value in given.items() if name != "preset"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("zoom", "contrast"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is {(low, high)}; the lower bound comes first")
        return self
