"""LiTS (Bilic et al., Medical Image Analysis 2023): ``volume-N.nii`` with ``segmentation-N.nii``, liver 1 and tumour 2.

Its voxels are right and its headers are not always:

- Orientations differ from case to case; volumes are turned by their header (kaiko-ai/eva issue 658).
- Volumes 28 to 47 have an identity affine, which would make every voxel a cube of 1 mm (PatrickChrist/LITS-CHALLENGE
  issue 14); an origin beside it makes it no better. There the segmentation's header counts, or a given spacing; where
  both are identities, nobody knows, unless they agree on an origin: then both were resampled.
- Image and segmentation disagree on directions or origin, although voxel lies on voxel (MIC-DKFZ/nnUNet issue 850).
  Where their grids do not coincide by their own headers, the image's counts for both. Two sound spacings that differ
  are refused: one of them is wrong.

Cases 28 to 44 and 46 to 48 are those of 3D-IRCADb-01 (assassint2017/MICCAI-LITS2017 issue 33), and the liver task of
the Medical Segmentation Decathlon is LiTS: together they would leak between splits.
"""

import csv
import math
import re
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeGuard

import numpy as np
from jaxtyping import Float

from mp3d.data.files import walk
from mp3d.data.masks import truths_from_mask
from mp3d.data.series import CTSeries, Truth
from mp3d.data.source import Item, Source
from mp3d.data.stored_volume import AxialVolume, StoredVolume, to_axial
from mp3d.data.volume_file import read_volume_file
from mp3d.data.volumes import GRID_TOLERANCE_MM, check_mask_shape, distance_mm, to_hu, to_labels
from mp3d.errors import DataError, Refusal

READER = "lits/2"
VDT_VAL = frozenset({0, 17, 29, 34, 58, 72, 73, 75, 85, 87, 103, 110, 113})
VDT_TEST = frozenset({2, 19, 20, 26, 42, 52, 65, 77, 86, 88, 99, 112, 127})
"""The VDT authors' split (CSPR, ``LiTS_liver`` configs) of LiTS' training set, the only one with published truth."""
IRCADB_CASES = frozenset({*range(28, 45), *range(46, 49)})
SPACING_TOLERANCE = 0.01
"""Two spacings are the same up to this share."""
_FILE = re.compile(r"(test-)?(volume|segmentation)-(\d{1,4})\.nii(\.gz)?")
_IDENTITY_TOLERANCE = 1e-6

Classes = Literal["liver_tumour", "tumour", "liver"]
_CLASSES: dict[Classes, tuple[tuple[str, ...], tuple[int, int, int], tuple[int, ...]]] = {
    "liver_tumour": (("liver", "tumour"), (0, 1, 2), (2,)),
    "tumour": (("tumour",), (0, 0, 1), (1,)),
    "liver": (("liver",), (0, 1, 1), ()),
}
"""Names, the label that each of 0, 1 and 2 becomes, and the labels that are boxed."""
SpacingMM = tuple[float, float, float]


def read_lits(
    root: Path,
    classes: Classes = "liver_tumour",
    split: Literal["vdt", "drawn"] = "vdt",
    spacings: Path | None = None,
) -> Source:
    """LiTS: abdominal CT in NIfTI pairs, liver 1 and tumour 2, boxes of the tumours.

    Box of a tumour: an 8-connected piece of at least 4 pixels on a slice; pieces of one 26-connected component of the
    volume have the same instance. Every slice was searched: a case without tumours is a true negative.

    Args:
        root: folder with ``volume-N.nii`` and ``segmentation-N.nii`` (or ``.nii.gz``), in any subfolders.
        classes: liver and tumour, with boxes for tumours only; tumour alone, as a detector of one class takes it; or
            liver with the tumours in it, as the VDT paper segments it, without boxes.
        split: that of the VDT authors; or drawn by case.
        spacings: table (CSV) with the columns ``case,x,y,z`` in mm, for cases whose headers do not say it, such as
            those of 3D-IRCADb-01, whose own files do.

    Raises:
        DataError: no volume there, or a table that cannot be read.
    """
    root = root.absolute()
    given = read_spacings(spacings) if spacings else {}
    volumes: dict[int, list[Path]] = {}
    segmentations: dict[int, list[Path]] = {}
    counts: Counter[str] = Counter()
    for path in walk(root):
        if match := _FILE.fullmatch(path.name):
            of_kind = volumes if match[2] == "volume" else segmentations
            if match[1]:
                counts["files of the challenge's test set, whose truth is not published, not used"] += 1
            else:
                of_kind.setdefault(int(match[3]), []).append(path)
    if not volumes:
        raise DataError(
            f"{root} holds no volume-N.nii or volume-N.nii.gz; give the folder of the LiTS training batches"
        )
    counts["segmentations without their volume, not used"] += len(segmentations.keys() - volumes.keys())
    counts["cases are in 3D-IRCADb-01 too (28 to 44, 46 to 48): do not use both"] += len(volumes.keys() & IRCADB_CASES)
    items: list[Item] = []
    refused: list[tuple[str, Refusal]] = []
    for case in sorted(volumes):
        key, found = f"volume-{case}", (len(volumes[case]), len(segmentations.get(case, [])))
        if found != (1, 1):
            detail = f"{found[0]} volumes and {found[1]} segmentations of this number; there must be one of each"
            refused.append((key, Refusal("MISSING_MASK", detail)))
            continue
        load = partial(load_case, volumes[case][0], segmentations[case][0], case, classes, given.get(case))
        items.append(Item(key, f"lits-{case}", _vdt_split(case) if split == "vdt" else None, load))
    return Source(
        dataset="lits",
        reader=READER,
        class_names=_CLASSES[classes][0],
        items=tuple(items),
        refused=tuple(refused),
        options={
            "classes": classes,
            "split": split,
            "spacings_sha256": sha256(spacings.read_bytes()).hexdigest() if spacings else None,
        },
        notes=tuple(f"{count} {what}" for what, count in sorted(counts.items()) if count),
    )


def load_case(volume: Path, segmentation: Path, case: int, classes: Classes, spacing_mm: SpacingMM | None) -> CTSeries:
    """Read one case.

    Args:
        spacing_mm: along x, y, z of the file; None: the headers say it.

    Raises:
        Refusal: as :func:`~mp3d.data.volume_file.read_volume_file`, :func:`lay_mask`,
            :func:`~mp3d.data.volumes.to_hu` and :func:`~mp3d.data.volumes.to_labels`.
    """
    image, mask = read_volume_file(volume, "the image"), read_volume_file(segmentation, "the mask")
    axial_image, axial_mask, warnings = lay_mask(image, mask, spacing_mm)
    hu, more = to_hu(axial_image)
    published = to_labels(axial_mask, num_classes=2)
    _, becomes, boxed = _CLASSES[classes]
    labels = np.array(becomes, np.uint8)[published]
    truths = truths_from_mask(labels, boxed) if boxed else tuple(Truth(mask=plane) for plane in labels)
    patient = f"lits-{case}"
    return CTSeries(patient, patient, f"volume-{case}", hu, truths, warnings=(*warnings, *more))


def lay_mask(
    image: StoredVolume, mask: StoredVolume, spacing_mm: SpacingMM | None
) -> tuple[AxialVolume, AxialVolume, tuple[str, ...]]:
    """Image and segmentation on one grid, by the rules above; warning codes.

    Raises:
        Refusal: ``MASK_MISMATCH`` or ``UNKNOWN_ORIENTATION``.
    """
    if spacing_mm is None and not (_is_identity(image.affine) or _is_identity(mask.affine)):
        ours, theirs = to_axial(image, "the image"), to_axial(mask, "the mask")
        same_shape = ours.stored.shape == theirs.stored.shape
        if same_shape and distance_mm(ours.affine, theirs.affine, ours.stored.shape) <= GRID_TOLERANCE_MM:
            return ours, theirs, ()
    check_mask_shape(mask.stored.shape[::-1], image.stored.shape[::-1])
    affine, warning = _affine_of_both(image.affine, mask.affine, spacing_mm)
    ours, theirs = (to_axial(volume._replace(affine=affine), "the image") for volume in (image, mask))
    return ours, theirs, (warning,)


def _affine_of_both(
    image: Float[np.ndarray, "4 4"] | None, mask: Float[np.ndarray, "4 4"] | None, spacing_mm: SpacingMM | None
) -> tuple[Float[np.ndarray, "4 4"], str]:
    if spacing_mm is not None:
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) if image is None else image.copy()
        affine[:3, :3] *= np.array(spacing_mm) / _spacing(affine)
        return affine, "AFFINE_REPAIRED"
    if _tells_spacing(image):
        if _tells_spacing(mask) and not np.allclose(_spacing(image), _spacing(mask), rtol=SPACING_TOLERANCE, atol=0):
            told = f"{np.round(_spacing(image), 3).tolist()} and {np.round(_spacing(mask), 3).tolist()}"
            detail = f"the spacing (x, y, z) of image and segmentation is {told} mm; one of them is wrong"
            raise Refusal("MASK_MISMATCH", f"{detail}; give the right one in a table (spacings)")
        return image, "MASK_HEADER_IGNORED"
    if _tells_spacing(mask):
        return mask, "AFFINE_REPAIRED"
    detail = "image and segmentation have an identity affine or none, so the spacing is not known"
    raise Refusal("UNKNOWN_ORIENTATION", f"{detail}; give it in a table (spacings)")


def read_spacings(path: Path) -> dict[int, SpacingMM]:
    """The table of spacings by case.

    Raises:
        DataError: it cannot be read, lacks a column, or has a row that is no spacing; the line is named.
    """
    try:
        rows = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    spacings: dict[int, SpacingMM] = {}
    try:
        for row in rows:
            spacing = float(row["x"]), float(row["y"]), float(row["z"])
            if int(row["case"]) in spacings or not all(math.isfinite(value) and value > 0 for value in spacing):
                raise ValueError(f"{spacing} mm, or a case that stands twice")
            spacings[int(row["case"])] = spacing
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        detail = f"{path}, line {rows.line_num} is no case,x,y,z with spacings above 0 mm"
        raise DataError(f"{detail} ({error})") from error
    return spacings


def _vdt_split(case: int) -> str:
    return "val" if case in VDT_VAL else "test" if case in VDT_TEST else "train"


def _tells_spacing(affine: Float[np.ndarray, "4 4"] | None) -> TypeGuard[Float[np.ndarray, "4 4"]]:
    """Neither absent nor, but for signs and the origin, the identity, which no scanner writes."""
    return affine is not None and not _is_identity(affine[:3, :3])


def _is_identity(affine: Float[np.ndarray, "n n"] | None) -> bool:
    """Absent or, but for signs, the identity."""
    return affine is None or np.allclose(np.abs(affine), np.eye(len(affine)), rtol=0, atol=_IDENTITY_TOLERANCE)


def _spacing(affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, " 3"]:
    return np.linalg.norm(affine[:3, :3], axis=0)
