"""A small CT world in which one slice cannot tell a lesion from a vessel, and nine can.

Every patient is drawn as a few **tubes** that run through the whole volume, slightly tilted and bent. Some of them,
picked at random, are lesions: of their tube only a piece 8 to 16 mm long exists, a superellipsoid that is wide in
plane and short and flat along z. The others are vessels and exist on every slice. Because all are drawn as tubes first,
their cross-sections agree in size, shape, contrast, edge and position, and only the extent along z tells them apart:
the nearer end of a lesion is at most 8 mm away from any of its slices, which nine slices at 2.5 mm show.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.special import expit

from mp3d.data.series import Volume
from mp3d.data.synthetic.dicom_files import write_ct_series, write_rtstruct

SLICE_SPACINGS_MM = (1.25, 2.0, 2.5, 3.0, 5.0)
NOMINAL_SIZE_PX = 128
"""Lengths in pixels below hold at this image size and scale with it."""
MIN_SIZE_PX = 64
DIAMETER_PX = (6.0, 18.0)
CONTRAST_HU = (60.0, 90.0)
EDGE_PX = 0.6
"""Scale of the logistic edge, whose middle is the outline."""
LESION_LENGTH_MM = (8.0, 16.0)
TIP = 0.6
"""A lesion ends where its diameter is this share of the largest: no slice shows a tip that nobody would outline."""
TIP_AT = (1 - TIP**4) ** 0.25
"""Where that is, as a share of the superellipsoid's half length."""
GAP_PX = 3.0
"""Least distance between two tubes, and between a tube and what is no soft tissue."""


@dataclass(frozen=True)
class Spot:
    """A lesion or a vessel, as it was drawn.

    Attributes:
        centre_mm: LPS; of a vessel, its place in the middle of the volume.
        radii_mm: largest semi-axes in plane (major, minor), and half the length along z.
        slices: first slice it is on, and the one after the last, counted in ascending z.
    """

    centre_mm: tuple[float, float, float]
    radii_mm: tuple[float, float, float]
    slices: tuple[int, int]


@dataclass(frozen=True)
class PatientTruth:
    """``spacing_mm`` is (z, y, x)."""

    patient: str
    spacing_mm: tuple[float, float, float]
    lesions: tuple[Spot, ...]
    vessels: tuple[Spot, ...]


@dataclass(frozen=True)
class WorldTruth:
    patients: tuple[PatientTruth, ...]


@dataclass(frozen=True)
class DrawnCT:
    """A patient before it is written: lesion masks are ``(n, d, h, w)``, those of the vessels likewise."""

    volume: Volume
    lesions: tuple[Spot, ...]
    vessels: tuple[Spot, ...]
    lesion_masks: Bool[np.ndarray, "n d h w"]
    vessel_masks: Bool[np.ndarray, "m d h w"]


@dataclass(frozen=True)
class Tube:
    """A path through all slices with a cross-section that is an ellipse with a slight three-fold wobble."""

    path_px: Float[np.ndarray, "d 2"]
    """Centre (x, y) on every slice."""
    radius_px: Float[np.ndarray, " d"]
    """Semi-major axis on every slice."""
    axis_ratio: float
    angle: float
    wobble: float
    wobble_phase: float
    contrast_hu: float

    def depth_px(self, size_px: int) -> Float[np.ndarray, "d h w"]:
        """Approximate distance of every pixel centre from the edge, positive inside."""
        y, x = np.mgrid[:size_px, :size_px].astype(np.float32)
        dx = x - self.path_px[:, 0, None, None].astype(np.float32)
        dy = y - self.path_px[:, 1, None, None].astype(np.float32)
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        along, across = cos * dx + sin * dy, (cos * dy - sin * dx) / np.float32(self.axis_ratio)
        theta = np.arctan2(across, along)
        edge = self.radius_px[:, None, None].astype(np.float32) * (
            1 + self.wobble * np.cos(3 * theta + self.wobble_phase)
        )
        return edge - np.hypot(along, across)

    def clearance_px(self, other: "Tube") -> float:
        """Least distance from another tube over all slices."""
        apart = np.linalg.norm(self.path_px - other.path_px, axis=1)
        return float((apart - self.radius_px - other.radius_px).min())


def write_ct_world(
    folder: Path, *, num_patients: int, seed: int, size_px: int = 128, num_slices: int = 24
) -> WorldTruth:
    """Write ``<patient>/CT/*.dcm`` and ``<patient>/RS.dcm``, the contours of the lesions; same seed, same bytes.

    Files are numbered from head to feet, as scanners do, so their order is not the order of ascending z. Each patient
    has a slice spacing of its own, one of ``SLICE_SPACINGS_MM``.

    Raises:
        ValueError: too few slices for a lesion to begin and end between the first and the last, or too few pixels.
    """
    patients = []
    for index in range(num_patients):
        name = f"SYN-{index + 1:04d}"
        drawn = draw_ct(np.random.default_rng([seed, index]), size_px=size_px, num_slices=num_slices)
        uid_seed = f"{seed}/{size_px}/{num_slices}/{name}"
        slices = write_ct_series(folder / name / "CT", drawn.volume, f"{name}-{seed}", uid_seed)
        write_rtstruct(folder / name / "RS.dcm", drawn.lesion_masks, drawn.volume, slices, uid_seed)
        patients.append(PatientTruth(name, drawn.volume.spacing_mm, drawn.lesions, drawn.vessels))
    return WorldTruth(tuple(patients))


def draw_ct(rng: np.random.Generator, *, size_px: int, num_slices: int) -> DrawnCT:
    """Draw one patient; see :func:`write_ct_world`."""
    if size_px < MIN_SIZE_PX:
        raise ValueError(f"size_px is {size_px}; below {MIN_SIZE_PX} the smallest lesions fall between the pixels")
    spacings = [spacing for spacing in SLICE_SPACINGS_MM if (num_slices - 3) * spacing > LESION_LENGTH_MM[1]]
    if not spacings:
        raise ValueError(f"num_slices is {num_slices}; a lesion needs at least 7 to begin and end inside the volume")
    slice_spacing = float(rng.choice(spacings))
    pixel_spacing = round(float(rng.uniform(2, 3)) * NOMINAL_SIZE_PX / size_px, 3)
    z_mm = np.arange(num_slices) * slice_spacing
    affine = np.diag([pixel_spacing, pixel_spacing, slice_spacing, 1])
    affine[:2, 3] = (rng.uniform(-0.55, -0.45, 2) * size_px * pixel_spacing).round(2)
    affine[2, 3] = round(rng.uniform(-900, -100), 2)

    hu, tissue = _draw_body(rng, z_mm, size_px)
    num_lesions, tubes = _draw_tubes(rng, z_mm, np.asarray(distance_transform_edt(tissue)))
    spots, masks = [], []
    for index, tube in enumerate(tubes):
        piece = _lesion_piece(rng, z_mm) if index < num_lesions else _vessel_piece(rng, z_mm)
        depth_px = replace(tube, radius_px=tube.radius_px * piece.thickness).depth_px(size_px)
        depth_px[piece.thickness == 0] = -np.inf
        hu += tube.contrast_hu * expit(depth_px / (EDGE_PX * size_px / NOMINAL_SIZE_PX))
        x, y = (np.interp(piece.centre_mm, z_mm, tube.path_px[:, axis]) for axis in (0, 1))
        x_mm, y_mm, z_lps_mm, _ = (affine @ [x, y, piece.centre_mm / slice_spacing, 1]).tolist()
        major_mm = float((tube.radius_px * piece.thickness).max()) * pixel_spacing
        mask = depth_px > 0
        on = np.flatnonzero(mask.any((1, 2)))
        spots.append(
            Spot(
                centre_mm=(x_mm, y_mm, z_lps_mm),
                radii_mm=(major_mm, major_mm * tube.axis_ratio, piece.length_mm / 2),
                slices=(int(on[0]), int(on[-1]) + 1),
            )
        )
        masks.append(mask)
    hu += _noise(rng, hu.shape, rng.uniform(12, 20), 0.7)
    return DrawnCT(
        volume=Volume(np.clip(hu.round(), -1024, 3071).astype(np.int16), affine),
        lesions=tuple(spots[:num_lesions]),
        vessels=tuple(spots[num_lesions:]),
        lesion_masks=np.stack(masks[:num_lesions]),
        vessel_masks=np.stack(masks[num_lesions:]),
    )


@dataclass(frozen=True)
class _Piece:
    """What of a tube exists: ``thickness`` is a factor on its radius on every slice, 0 where there is nothing."""

    centre_mm: float
    length_mm: float
    thickness: Float[np.ndarray, " d"]


def _lesion_piece(rng: np.random.Generator, z_mm: np.ndarray) -> _Piece:
    """A superellipsoid of exponent 4 along z that begins after the first slice and ends before the last."""
    length = float(rng.uniform(*LESION_LENGTH_MM))
    centre = float(rng.uniform(z_mm[1] + length / 2, z_mm[-2] - length / 2))
    place = np.abs(z_mm - centre) / (length / 2)
    thickness = np.where(place <= 1, (1 - np.minimum(place * TIP_AT, 1) ** 4) ** 0.25, 0)
    return _Piece(centre, length, thickness)


def _vessel_piece(rng: np.random.Generator, z_mm: np.ndarray) -> _Piece:
    """The whole tube, as thick as a lesion is at one place drawn from its length: as thick as lesions are outlined."""
    thickness = np.full(len(z_mm), (1 - rng.uniform(0, TIP_AT) ** 4) ** 0.25)
    return _Piece(float(z_mm[-1]) / 2, float(z_mm[-1]), thickness)


def _draw_tubes(rng: np.random.Generator, z_mm: np.ndarray, room_px: np.ndarray) -> tuple[int, list[Tube]]:
    """1 to 3 lesions, the first of the list, and 2 to 4 vessels; all keep clear of each other.

    All are placed by the same rule before anybody knows which is which. ``room_px`` is the distance of every pixel
    ``(h, w)`` from what is no soft tissue.
    """
    size_px = len(room_px)
    gap_px = GAP_PX * size_px / NOMINAL_SIZE_PX
    while True:
        num_lesions, num_vessels = int(rng.integers(1, 4)), int(rng.integers(2, 5))
        tubes: list[Tube] = []
        for _ in range(400):
            tube = _draw_tube(rng, z_mm, size_px)
            columns, rows = tube.path_px.round().astype(int).T
            inside = np.all((columns >= 0) & (columns < size_px) & (rows >= 0) & (rows < size_px))
            if not inside or np.any(room_px[rows, columns] < tube.radius_px + gap_px):
                continue
            if all(tube.clearance_px(other) > gap_px for other in tubes):
                tubes.append(tube)
            if len(tubes) == num_lesions + num_vessels:
                # Late ones had to be small to fit: who is a lesion must not follow the order of placing.
                return num_lesions, [tubes[index] for index in rng.permutation(len(tubes))]


def _draw_tube(rng: np.random.Generator, z_mm: np.ndarray, size_px: int) -> Tube:
    scale = size_px / NOMINAL_SIZE_PX
    from_middle_mm = z_mm - z_mm[-1] / 2
    heading, slope_px_per_mm = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.1) * scale
    bend_px = rng.uniform(0, 2, 2) * scale
    bend_phase, bend_length_mm = rng.uniform(0, 2 * np.pi, 2), rng.uniform(40, 90, 2)
    path = rng.uniform(0, size_px, 2) + from_middle_mm[:, None] * slope_px_per_mm * [np.cos(heading), np.sin(heading)]
    path += bend_px * np.sin(2 * np.pi * from_middle_mm[:, None] / bend_length_mm + bend_phase)
    swell = 1 + 0.06 * np.sin(2 * np.pi * z_mm / rng.uniform(20, 60) + rng.uniform(0, 2 * np.pi))
    return Tube(
        path_px=path,
        radius_px=rng.uniform(*DIAMETER_PX) / 2 * scale * swell,
        axis_ratio=float(rng.uniform(0.75, 1)),
        angle=float(rng.uniform(0, np.pi)),
        wobble=float(rng.uniform(0, 0.08)),
        wobble_phase=float(rng.uniform(0, 2 * np.pi)),
        contrast_hu=float(rng.uniform(*CONTRAST_HU)),
    )


def _draw_body(rng: np.random.Generator, z_mm: np.ndarray, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """HU ``(d, h, w)`` of a trunk on a couch; and where soft tissue is on every slice, bool ``(h, w)``."""
    y, x = (np.mgrid[:size_px, :size_px].astype(np.float32) + 0.5) / size_px
    z = z_mm[:, None, None].astype(np.float32)

    def inside(cx: float, cy: float, rx: float | np.ndarray, ry: float | np.ndarray) -> np.ndarray:
        """0..1 over an ellipse with an edge of about a pixel; lengths are shares of the image."""
        level = np.hypot((x - cx) / rx, (y - cy) / ry)
        return np.clip((1 - level) * np.minimum(rx, ry) * size_px + 0.5, 0, 1)

    cx, cy = 0.5 + rng.uniform(-0.02, 0.02), 0.48 + rng.uniform(-0.02, 0.02)
    grow = 1 + 0.03 * np.sin(2 * np.pi * z / rng.uniform(80, 160) + rng.uniform(0, 2 * np.pi))
    rx, ry = rng.uniform(0.41, 0.44) * grow, rng.uniform(0.31, 0.35) * grow
    fat = rng.uniform(0.025, 0.05)
    muscle = inside(cx, cy, rx - fat, ry - fat)
    hu = -1000 + inside(cx, cy, rx, ry) * (1000 - 100) + muscle * (100 + 40)
    for _ in range(int(rng.integers(2, 5))):
        reach_mm = rng.uniform(60, 150)
        section = np.sqrt(np.clip(1 - ((z - rng.uniform(0, z_mm[-1])) / reach_mm) ** 2, 0.05, 1))
        where = cx + rng.uniform(-0.2, 0.2), cy + rng.uniform(-0.15, 0.1)
        organ = inside(*where, rng.uniform(0.12, 0.2) * section, rng.uniform(0.1, 0.17) * section)
        hu += organ * muscle * rng.uniform(-20, 25)
    spine = cx, cy + rng.uniform(0.19, 0.21)
    hu += inside(*spine, 0.065, 0.055) * 330 - inside(*spine, 0.05, 0.04) * 180
    hu += inside(spine[0], spine[1] + 0.075, 0.012, 0.045) * 300
    couch = np.abs(y - 0.9 + 0.25 * (x - 0.5) ** 2) < 0.008
    hu[:, couch] += 650
    hu += _noise(rng, hu.shape, 4, 5 * size_px / NOMINAL_SIZE_PX) * muscle
    bone = inside(*spine, 0.075, 0.065) + inside(spine[0], spine[1] + 0.075, 0.02, 0.055)
    return hu, np.all(muscle == 1, axis=0) & (bone == 0)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], std: float, smooth_px: float) -> np.ndarray:
    """Gaussian noise, smoothed within each slice and scaled back to ``std``."""
    noise = gaussian_filter(rng.standard_normal(shape, np.float32), (0, smooth_px, smooth_px))
    return noise * np.float32(std / noise.std())
