"""The pictures of an evaluation report, as PNG bytes."""

from collections.abc import Mapping
from io import BytesIO
from itertools import cycle
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mp3d.evaluation import KeySliceResult
from mp3d.metrics.froc import FrocResult

CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; line styles and markers differ as well."""
CURVE_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
TRUE_COLOUR = "#3BE07A"
FOUND_COLOUR = "#FFA023"
INK = "#1f2933"
LABEL = {
    "textcoords": "offset points",
    "fontsize": 11,
    "bbox": {"boxstyle": "square,pad=0.15", "facecolor": "black", "alpha": 0.65, "linewidth": 0},
}
LOWEST_FPS = 0.125
"""Left end of the false positive axis, which is logarithmic and cannot show 0."""


class Window(NamedTuple):
    """A display window, its bounds in HU."""

    name: str
    low: int
    high: int


SOFT_TISSUE = Window("soft tissue", -160, 240)
LUNG = Window("lung", -1350, 150)
LUNG_BELOW_HU = -400
"""Between aerated lung (about -850 HU) and soft tissue (about 40 HU)."""


def display_window(image: np.ndarray, box: np.ndarray) -> Window:
    """Lung where the median of what surrounds the box is air-like, soft tissue elsewhere.

    The surroundings are the box enlarged by half its size (at least 4 pixels) on every side, without the box itself.
    """
    height, width = image.shape
    x1, y1, x2, y2 = box
    margin = max(4.0, 0.5 * max(x2 - x1, y2 - y1))
    around = np.zeros(image.shape, dtype=bool)
    around[_pixels(y1 - margin, y2 + margin, height), _pixels(x1 - margin, x2 + margin, width)] = True
    around[_pixels(y1, y2, height), _pixels(x1, x2, width)] = False
    return LUNG if around.any() and np.median(image[around]) < LUNG_BELOW_HU else SOFT_TISSUE


def draw_key_slice(
    image: np.ndarray, result: KeySliceResult, focus: np.ndarray, threshold: float, window: Window
) -> bytes:
    """The whole key slice, and beside it the surroundings of the focus with scores and a scale bar.

    True boxes are green and solid, detections from ``threshold`` on orange and dashed.
    """
    figure = Figure(figsize=(8, 4), dpi=100, facecolor="black")
    _, row_mm, column_mm = result.spacing_mm
    whole, close = (figure.add_axes((left, 0, 0.5, 1)) for left in (0, 0.5))
    for axes in (whole, close):
        axes.imshow(
            image,
            cmap="gray",
            vmin=window.low,
            vmax=window.high,
            aspect=row_mm / column_mm,
            interpolation="bilinear",
            extent=(0, image.shape[1], image.shape[0], 0),  # half-open pixel edges, as the boxes have
        )
        axes.set_axis_off()
        _draw_boxes(axes, result, threshold)

    x1, y1, x2, y2 = _close_up(focus, image.shape)
    whole.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=0.7, alpha=0.8))
    close.set(xlim=(x1, x2), ylim=(y2, y1))
    for box, score in _reported(result, threshold):
        if box[0] < x2 and box[2] > x1 and box[1] < y2 and box[3] > y1:
            corner = (max(box[0], x1), max(box[1], y1 + 0.07 * (y2 - y1)))
            close.annotate(f"{score:.2f}", corner, (2, 4), color=FOUND_COLOUR, **LABEL)
    _draw_scale_bar(close, (x1, y1, x2, y2), column_mm)
    return png_bytes(figure)


def draw_froc(curves: Mapping[str, FrocResult]) -> bytes:
    """All curves in one axes; points are marked where the protocol reads them, hollow beyond a curve's end."""
    figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    ticks = sorted({LOWEST_FPS, 0.25} | {fps for curve in curves.values() for fps in curve.protocol.fps_per_image})
    for index, curve in enumerate(curves.values()):
        colour = CURVE_COLOURS[index % len(CURVE_COLOURS)]
        line, marker = CURVE_STYLES[index % len(CURVE_STYLES)]
        x, y = _visible(curve, ticks[-1])
        axes.plot(x, y, line, color=colour, linewidth=1.8)
        end = curve.last_fps_per_image
        if end < ticks[-1] and len(y):
            axes.plot([max(end, LOWEST_FPS), ticks[-1]], [y[-1]] * 2, color=colour, linewidth=0.8, alpha=0.6)
        for fps, sensitivity in curve.sensitivity_at.items():
            axes.plot(fps, sensitivity, marker, color=colour, markersize=6, fillstyle="full" if fps <= end else "none")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=(LOWEST_FPS, ticks[-1] * 1.08), ylim=(0, 1.02), yticks=np.linspace(0, 1, 6))
    axes.set_xlabel("False positives per image", color=INK)
    axes.set_ylabel("Sensitivity", color=INK)
    style_axes(axes)
    _label_ends(axes, curves)
    return png_bytes(figure)


def _label_ends(axes: Axes, curves: Mapping[str, FrocResult]) -> None:
    """Each curve's name at its right end, moved up where it would cover the one below."""
    heights = {name: curve.sensitivity_at[curve.protocol.fps_per_image[-1]] for name, curve in curves.items()}
    colours = dict(zip(curves, cycle(CURVE_COLOURS)))
    lowest_free = 0.0
    for name in sorted(curves, key=lambda name: heights[name]):
        text = fill(name, 24, max_lines=3)
        height = max(heights[name], lowest_free)
        axes.annotate(
            text, (1.015, height), xycoords=("axes fraction", "data"), color=colours[name], fontsize=10, va="center"
        )
        lowest_free = height + 0.06 * (1 + text.count("\n"))


def _visible(curve: FrocResult, last_tick: float) -> tuple[np.ndarray, np.ndarray]:
    """The curve from the left end of the axis to its own end, one point for each false positive count: its highest."""
    fps, sensitivity = curve.fps_per_image, curve.sensitivity
    if len(fps) == 0:
        return np.array([LOWEST_FPS, last_tick]), np.zeros(2)
    highest = np.flatnonzero(np.diff(fps, append=np.inf))
    fps, sensitivity = fps[highest], sensitivity[highest]
    inside = (fps > LOWEST_FPS) & (fps <= last_tick)
    start = np.interp(LOWEST_FPS, fps, sensitivity, left=0.0)
    return np.r_[LOWEST_FPS, fps[inside]], np.r_[start, sensitivity[inside]]


def _draw_boxes(axes: Axes, result: KeySliceResult, threshold: float) -> None:
    for x1, y1, x2, y2 in result.true_boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=TRUE_COLOUR, linewidth=1.6))
    for (x1, y1, x2, y2), _ in _reported(result, threshold):
        axes.add_patch(
            Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=FOUND_COLOUR, linewidth=1.6, linestyle=(0, (4, 2))
            )
        )


def _reported(result: KeySliceResult, threshold: float) -> list[tuple[np.ndarray, float]]:
    return [(box, float(score)) for box, score in zip(result.boxes, result.scores, strict=True) if score >= threshold]


def _close_up(focus: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """A square around the focus, three times its longer side and at least 64 pixels, moved inside the image."""
    x1, y1, x2, y2 = (float(each) for each in focus)
    side = min(max(3 * max(x2 - x1, y2 - y1), 64.0), *shape)
    left = float(np.clip((x1 + x2 - side) / 2, 0, shape[1] - side))
    top = float(np.clip((y1 + y2 - side) / 2, 0, shape[0] - side))
    return left, top, left + side, top + side


def _draw_scale_bar(axes: Axes, view: tuple[float, float, float, float], column_mm: float) -> None:
    x1, y1, x2, y2 = view
    quarter_mm = (x2 - x1) * column_mm / 4
    length_mm = max((length for length in (1, 2, 5, 10, 20, 50, 100) if length <= quarter_mm), default=1)
    left, bottom = x1 + 0.05 * (x2 - x1), y2 - 0.06 * (y2 - y1)
    axes.add_patch(
        Rectangle((left, bottom), length_mm / column_mm, 0.01 * (y2 - y1), facecolor="white", edgecolor="black", lw=0.5)
    )
    axes.annotate(f"{length_mm} mm", (left, bottom), (2, 6), color="white", **LABEL)


def _pixels(start: float, stop: float, size: int) -> slice:
    return slice(int(np.clip(np.floor(start), 0, size)), int(np.clip(np.ceil(stop), 0, size)))


def style_axes(axes: Axes) -> None:
    """A light grid, no frame, no tick marks."""
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(colors=INK, length=0, pad=6)


def png_bytes(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
