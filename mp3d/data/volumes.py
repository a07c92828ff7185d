"""Folders of volumes with masks, in NIfTI, NRRD or MetaImage and in any orientation.

Axes are permuted and flipped, never resampled, until columns run most nearly to the patient's left (+x), rows to
posterior (+y) and slices to superior (+z), as in an axial DICOM series. An oblique rest stays in the affine.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from mp3d.data.files import walk
from mp3d.data.geometry import MIN_SLICES, check_pixel_spacing, check_slice_spacing
from mp3d.data.masks import truths_from_mask
from mp3d.data.series import CTSeries, Truth, Volume
from mp3d.data.source import Item, Source
from mp3d.data.stored_volume import AxialVolume, to_axial
from mp3d.data.volume_file import is_volume_file, read_volume_file
from mp3d.errors import ConfigError, DataError, Refusal

GRID_TOLERANCE_MM = 1e-2
"""Corners of image and mask may lie this far apart."""
MAX_CLASSES = 255
"""The stored mask has a byte per pixel."""
MIN_RANGE_HU = 10
"""From air to water there are 1000 HU; windowed or normalised values lie within 0 to 1 or a few standard deviations."""
READER = "volumes/2"
_INT16 = np.iinfo(np.int16)


def read_volumes(
    root: Path,
    image: str = "CT_image.nii.gz",
    mask: str | None = "CT_mask.nii.gz",
    class_names: tuple[str, ...] = ("lesion",),
    patient_level: int | None = None,
    dataset: str = "volumes",
) -> Source:
    """CT volumes in NIfTI, NRRD or MetaImage, one folder each, with a mask beside the image.

    The format is told by the end of the name: .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd. A folder's name stands for the
    patient; where folders differ on several levels, as in ``<patient>/<study>/``, ``patient_level`` says which. A
    volume with a mask was searched: slices without a label hold nothing.

    Args:
        root: folder, searched through all subfolders; links are followed.
        image: file name of the image, ``*`` and ``?`` allowed; must match once in a folder.
        mask: file name of the mask; None: there are none, and nobody looked.
        class_names: what the values 1, 2, ... of the mask stand for.
        patient_level: which folder below the root names the patient, 1 being the topmost; left out: the only level on
            which folders differ.
        dataset: name of the data set.

    Raises:
        ConfigError: no file name, more classes than a byte holds, or no folder at ``patient_level``; or it is left out
            and folders differ on several levels.
        DataError: the root is no folder, or no file in it has the name of an image.
    """
    if not image:
        raise ConfigError("image is empty; give the file name of the images, such as CT_image.nii.gz or *.nrrd")
    if not 1 <= len(class_names) <= MAX_CLASSES:
        raise ConfigError(f"{len(class_names)} class names; 1 to {MAX_CLASSES} are possible")
    root = root.absolute()
    folders: dict[Path, list[Path]] = {}
    for path in walk(root):
        if is_volume_file(path):
            folders.setdefault(path.parent, []).append(path)
    pairs: list[tuple[Path, Path | None]] = []
    refused: list[tuple[str, Refusal]] = []
    for paths in folders.values():
        images = [path for path in paths if path.match(image)]
        masks = [path for path in paths if mask and path.match(mask) and path not in images]
        for path in images:
            if mask and (len(images), len(masks)) != (1, 1):
                detail = f"{len(images)} images and {len(masks)} masks in this folder; there must be one of each"
                refusal = Refusal("MISSING_MASK", f"{detail}, or read the images without masks")
                refused.append((path.relative_to(root).as_posix(), refusal))
                continue
            pairs.append((path, masks[0] if masks else None))
    if not pairs and not refused:
        detail = f"no NIfTI, NRRD or MetaImage file in {root} has a name like {image!r}"
        raise DataError(f"{detail}; name the images with --image, and the masks (now {mask!r}) with --mask")
    level = find_patient_level(patient_level, [path.relative_to(root).parent.parts for path, _ in pairs])
    items: list[Item] = []
    for path, mask_path in pairs:
        key = path.relative_to(root)
        patient = path.parent.name if level is None else key.parts[level - 1]
        study = path.parent.name if level is None else key.parent.as_posix()
        load = partial(load_pair, path, mask_path, patient, study, key.as_posix(), len(class_names))
        items.append(Item(key=key.as_posix(), patient=patient, split=None, load=load))
    return Source(
        dataset=dataset,
        reader=READER,
        class_names=class_names,
        items=tuple(items),
        refused=tuple(refused),
        options={"image": image, "mask": mask, "patient_level": patient_level},
    )


def find_patient_level(level: int | None, folders: Sequence[tuple[str, ...]]) -> int | None:
    """Which folder below the root names the patient, 1 being the topmost; None: that of the image.

    Args:
        level: the one that was asked for; None: none was.
        folders: of each image, from the root to its own.

    Returns:
        ``level``; else, where images lie deeper than one folder, the only level on which folders differ.

    Raises:
        ConfigError: there is no folder at ``level`` above every image; or it is None, and folders differ on several.
    """
    depths = {len(path) for path in folders} or {0}
    lowest, deepest = min(depths), max(depths)
    many = f"{lowest} to {deepest}" if lowest < deepest else f"{deepest}"
    place = f"{many} folder{'' if many == '1' else 's'} below the root"
    if level is None and deepest > 1:
        differ = [at for at in range(lowest) if len({path[at] for path in folders}) > 1]
        if lowest < deepest or len(differ) > 1:
            rule = "say which of these folders names the patient"
            raise ConfigError(f"the images lie {place}; {rule} with --patient-level, 1 being the topmost")
        return differ[0] + 1 if differ else None
    if level is not None and not 1 <= level <= lowest:
        rule = f"it must be 1 to {lowest}" if lowest else "leave it out: the folder of the image names the patient"
        raise ConfigError(f"patient_level is {level}, and the images lie {place}; {rule}")
    return level


def load_pair(image: Path, mask: Path | None, patient: str, study: str, key: str, num_classes: int) -> CTSeries:
    """Read one volume and its mask.

    Raises:
        Refusal: as :func:`load_image` and :func:`load_mask`.
    """
    volume, warnings = load_image(image)
    truths = tuple(Truth() for _ in volume.hu)
    if mask is not None:
        truths = truths_from_mask(load_mask(mask, volume, num_classes))
    return CTSeries(patient, study, key, volume, truths, warnings=warnings)


def load_image(path: Path) -> tuple[Volume, tuple[str, ...]]:
    """A CT volume in HU; warning codes.

    Raises:
        Refusal: as :func:`~mp3d.data.volume_file.read_volume_file`, ``UNKNOWN_ORIENTATION``, or as :func:`to_hu`.
    """
    return to_hu(to_axial(read_volume_file(path, "the image"), "the image"))


def load_mask(path: Path, volume: Volume, num_classes: int) -> UInt8[np.ndarray, "d h w"]:
    """The mask of a volume, in its axis order.

    Raises:
        Refusal: as :func:`~mp3d.data.volume_file.read_volume_file`, ``UNKNOWN_ORIENTATION``, ``MASK_MISMATCH`` or
            ``BAD_LABELS``.
    """
    image = to_axial(read_volume_file(path, "the mask"), "the mask")
    check_mask_shape(image.stored.shape, volume.hu.shape)
    off = distance_mm(image.affine, volume.affine, volume.hu.shape)
    if off > GRID_TOLERANCE_MM:
        raise Refusal("MASK_MISMATCH", f"mask and image lie up to {off:.2f} mm apart; resample the mask onto the image")
    return to_labels(image, num_classes)


def to_hu(image: AxialVolume) -> tuple[Volume, tuple[str, ...]]:
    """The values rounded and clipped to int16; warning codes.

    Raises:
        Refusal: ``BAD_SPACING``, ``TOO_FEW_SLICES``, ``BAD_IMAGE`` or ``NOT_HU``.
    """
    volume = Volume(hu=np.empty(image.stored.shape, np.int16), affine=image.affine)
    z_spacing, *in_plane = volume.spacing_mm
    check_pixel_spacing(in_plane, "the image")
    check_slice_spacing(z_spacing)
    if len(volume.hu) < MIN_SLICES:
        count = "1 slice" if len(volume.hu) == 1 else f"{len(volume.hu)} slices"
        raise Refusal("TOO_FEW_SLICES", f"the image has {count}, at least {MIN_SLICES} are needed")
    low, high = np.inf, -np.inf
    for z, hu in enumerate(volume.hu):
        values = image.plane(z)
        if not np.isfinite(values).all():
            detail = f"slice {z + 1} of {len(volume.hu)} holds values that are not finite"
            raise Refusal("BAD_IMAGE", f"{detail}; write the HU of air, -1000, where there is no data")
        hu[...] = np.clip(np.rint(values), _INT16.min, _INT16.max)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    whole_numbers = image.stored.dtype.kind in "iu" and image.slope.is_integer()
    if not whole_numbers and high - low < MIN_RANGE_HU:  # rounded they would be a few grey values
        detail = f"the values are fractions from {low:g} to {high:g}, so windowed or normalised"
        raise Refusal("NOT_HU", f"{detail}; write the image in HU, where air is -1000 and water 0")
    return volume, ("HU_CLIPPED",) if low < _INT16.min or high > _INT16.max else ()


def to_labels(image: AxialVolume, num_classes: int) -> UInt8[np.ndarray, "d h w"]:
    """The values as labels 0 to ``num_classes``.

    Raises:
        Refusal: ``BAD_LABELS``.
    """
    labels = np.empty(image.stored.shape, np.uint8)
    for z, plane in enumerate(labels):
        values = image.plane(z)
        strange = np.setdiff1d(values, np.arange(num_classes + 1))
        if len(strange):
            if num_classes == 1 and (value := only_value(image)):
                raise Refusal("BAD_LABELS", f"the mask holds {value:g} for its one class; write 1 instead of {value:g}")
            known = "its one class is 1" if num_classes == 1 else f"its {num_classes} classes are 1 to {num_classes}"
            detail = f"the mask holds {strange[0]:g}, but {known}"
            raise Refusal("BAD_LABELS", f"{detail}; name its classes, or clear the mask")
        plane[...] = values
    return labels


def only_value(mask: AxialVolume) -> float | None:
    """The finite value that all voxels have but those of 0; None: there are several, or none."""
    found: set[float] = set()
    for z in range(len(mask.stored)):
        found.update(np.unique(mask.plane(z)).tolist())
        if len(found - {0}) > 1:
            return None
    (value,) = found - {0} or {0.0}
    return value if value and math.isfinite(value) else None


def distance_mm(a: Float[np.ndarray, "4 4"], b: Float[np.ndarray, "4 4"], shape: tuple[int, ...]) -> float:
    """How far the corners of two grids of one shape (z, y, x) lie apart, at most, along an axis of the patient."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * shape[::-1]
    shift = a - b
    return float(np.abs(corners @ shift[:3, :3].T + shift[:3, 3]).max())


def check_mask_shape(mask: tuple[int, ...], image: tuple[int, ...]) -> None:
    """Refuse a mask of another shape, both (z, y, x).

    Raises:
        Refusal: ``MASK_MISMATCH``.
    """
    if mask != image:
        detail = f"the mask has {mask} voxels, the image {image} (z, y, x)"
        raise Refusal("MASK_MISMATCH", f"{detail}; resample the mask onto the image")
