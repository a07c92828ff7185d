"""Display windows as radiologists choose them: by the kind of lesion where it is known, else by what is around it."""

from typing import NamedTuple

import numpy as np

from mp3d.report.html import signed


class Window(NamedTuple):
    """A display window, its bounds in HU."""

    name: str
    low: int
    high: int

    @property
    def in_words(self) -> str:
        return f"{self.name} window {signed(self.low)} to {signed(self.high)} HU"


SOFT_TISSUE = Window("soft tissue", -160, 240)
MEDIASTINUM = Window("mediastinum", -125, 225)
LIVER = Window("liver", -40, 160)
LUNG = Window("lung", -1350, 150)
BONE = Window("bone", -450, 1050)
BY_KIND = {
    "lung": LUNG,
    "bone": BONE,
    "liver": LIVER,
    "mediastinum": MEDIASTINUM,
}
"""Of DeepLesion's coarse types; the others lie in soft tissue."""
LUNG_BELOW_HU = -400
"""Between aerated lung (about -850 HU) and soft tissue (about 40 HU)."""
OUTSIDE_HU = -950
"""Up to which it is the air of the room, or padding, and tells nothing of the organ."""
MAX_MARGIN_PX = 24.0
BONE_ABOVE_HU = 250
"""Above contrast in vessels, below cortical bone."""


def display_window(image: np.ndarray, box: np.ndarray, kind: str = "") -> Window:
    """The window of a lesion's kind. Where none is known: lung if the median around the box is air-like, bone if half
    of the box is as dense as bone, soft tissue elsewhere.

    What is around is the box enlarged by half its size (4 to 24 pixels) on every side, without the box itself and the
    room around the patient.

    Args:
        image: HU.
        box: xyxy in pixels.
        kind: as data sets say it; "" is not known.
    """
    if kind:
        return BY_KIND.get(kind, SOFT_TISSUE)
    height, width = image.shape
    x1, y1, x2, y2 = box
    margin = float(np.clip(0.5 * max(x2 - x1, y2 - y1), 4.0, MAX_MARGIN_PX))
    around = np.zeros(image.shape, dtype=bool)
    around[_pixels(y1 - margin, y2 + margin, height), _pixels(x1 - margin, x2 + margin, width)] = True
    inside = image[_pixels(y1, y2, height), _pixels(x1, x2, width)]
    around[_pixels(y1, y2, height), _pixels(x1, x2, width)] = False
    surroundings = image[around & (image > OUTSIDE_HU)]
    if surroundings.size and np.median(surroundings) < LUNG_BELOW_HU:
        return LUNG
    return BONE if inside.size and np.median(inside) > BONE_ABOVE_HU else SOFT_TISSUE


def _pixels(start: float, stop: float, size: int) -> slice:
    return slice(int(np.clip(np.floor(start), 0, size)), int(np.clip(np.ceil(stop), 0, size)))
