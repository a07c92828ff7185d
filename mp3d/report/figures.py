"""The pictures of a detector's report, as PNG bytes."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from textwrap import fill
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mp3d.data.series import Volume
from mp3d.evaluation import KeySliceResult
from mp3d.evaluation.detection import Stratum
from mp3d.findings import Lesion
from mp3d.metrics.bootstrap import Interval
from mp3d.metrics.calibration import Calibration
from mp3d.metrics.froc import FrocResult
from mp3d.report.orientation import EdgeLetters, edge_letters
from mp3d.report.windows import Window, display_window

CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; line styles and markers differ as well."""
CURVE_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
TRUE_COLOUR = "#3BE07A"
FOUND_COLOUR = "#FFA023"
OTHER_COLOUR = "#56B4E9"
"""Of what is on the same slice, but not what a picture is of."""
CAPTION_INCHES = 0.3
INK = "#1f2933"
LABEL = {
    "textcoords": "offset points",
    "fontsize": 11,
    "bbox": {"boxstyle": "square,pad=0.15", "facecolor": "black", "alpha": 0.65, "linewidth": 0},
}
FEW_ANSWERS = 100
"""In the fullest bin; up to it the axis of counts is linear, beyond it empty and full bins need a logarithmic one."""
LABEL_PAD_PX = 2
"""Of the ground of a label beyond its letters."""
LOWEST_FPS = 0.125
"""Left end of the false positive axis, which is logarithmic and cannot show 0."""


def draw_key_slice(
    image: np.ndarray,
    result: KeySliceResult,
    focus: np.ndarray,
    threshold: float,
    window: Window,
    cited: int | None = None,
) -> bytes:
    """The whole key slice, and beside it the surroundings of the focus with scores and a scale bar.

    True boxes are green and solid, detections from ``threshold`` on orange and dashed, the best on top.

    Args:
        cited: the detection that the caption tells of: its score is written first, and it is drawn though it lies below
            the threshold, blue and dotted.
    """
    ascending = np.argsort(result.scores, kind="stable")
    reported = ascending[result.scores[ascending] >= threshold]
    below = [cited] if cited is not None and cited not in reported else []
    figure, whole, close = _two_views(image, result.spacing_mm, focus, window)
    for axes in (whole, close):
        _draw_boxes(axes, result.true_boxes, TRUE_COLOUR, "-")
        _draw_boxes(axes, result.boxes[reported], FOUND_COLOUR, (0, (4, 2)))
        _draw_boxes(axes, result.boxes[below], OTHER_COLOUR, (0, (1, 1)))
    first_to_last = sorted(reported[::-1].tolist(), key=lambda index: index != cited)
    for indices, colour in ((below, OTHER_COLOUR), (first_to_last, FOUND_COLOUR)):
        _write_at(close, result.boxes[indices], [f"{result.scores[index]:.2f}" for index in indices], colour)
    return png_bytes(figure)


def draw_finding(volume: Volume, lesions: Sequence[Lesion], number: int) -> bytes:
    """The best slice of a lesion in a series without labels, and beside it what is around the lesion; with a caption.

    Slices are shown as they are stored, whichever way that is; letters at the edges name the patient's sides. The
    lesion's box is orange and bold; those of other lesions on that slice are thin and blue, with their numbers.

    Args:
        lesions: of the series; they are numbered from 1.
    """
    lesion = lesions[number - 1]
    index, box = lesion.best.slice_index, np.array(lesion.best.box_px)
    others = {
        str(other): finding.box_px
        for other, each in enumerate(lesions, 1)
        for finding in each.findings
        if finding.slice_index == index and other != number
    }
    other_boxes = np.array([*others.values()]).reshape(-1, 4)
    image = volume.hu[index]
    window = display_window(image, box)
    figure, whole, close = _two_views(image, volume.spacing_mm, box, window, caption_inches=CAPTION_INCHES)
    for axes in (whole, close):
        _draw_edge_letters(axes, edge_letters(volume.affine))
        _draw_boxes(axes, other_boxes, OTHER_COLOUR, "-", width=0.8)
        _draw_boxes(axes, box[None], FOUND_COLOUR, "-", width=2.4)
    _write_at(close, box[None], [str(number)], FOUND_COLOUR)
    _write_at(close, other_boxes, [*others], OTHER_COLOUR)
    caption = finding_caption(volume, lesion, number, window)
    figure.text(0.5, 0.5 * CAPTION_INCHES / figure.get_figheight(), caption, color="white", ha="center", va="center")
    return png_bytes(figure)


def finding_caption(volume: Volume, lesion: Lesion, number: int, window: Window) -> str:
    """What a picture of :func:`draw_finding` is of."""
    x_mm, y_mm, z_mm = lesion.size_mm
    parts = (
        f"lesion {number}",
        f"slice {lesion.best.slice_index} of 0–{len(volume.hu) - 1}",
        f"score {lesion.score:.2f}",
        f"{x_mm:.0f} × {y_mm:.0f} × {z_mm:.0f} mm (x, y, z)",
        window.in_words,
    )
    return " · ".join(parts)


def _two_views(
    image: np.ndarray,
    spacing_mm: tuple[float, float, float],
    focus: np.ndarray,
    window: Window,
    caption_inches: float = 0.0,
) -> tuple[Figure, Axes, Axes]:
    """The whole slice, with a square marked in it, and that square with a scale bar; room for a caption below."""
    figure = Figure(figsize=(8, 4 + caption_inches), dpi=100, facecolor="black")
    _, row_mm, column_mm = spacing_mm
    bottom = caption_inches / (4 + caption_inches)
    whole, close = (figure.add_axes((left, bottom, 0.5, 1 - bottom)) for left in (0, 0.5))
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
    x1, y1, x2, y2 = _close_up(focus, image.shape)
    whole.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=0.7, alpha=0.8))
    close.set(xlim=(x1, x2), ylim=(y2, y1))
    draw_scale_bar(close, (x1, y1, x2, y2), column_mm)
    return figure, whole, close


def draw_froc(
    curves: Mapping[str, FrocResult], intervals: Mapping[str, Mapping[float, Interval]] | None = None
) -> bytes:
    """All curves in one axes; points are marked where the protocol reads them, hollow beyond a curve's end.

    Args:
        intervals: of the sensitivities at those points, by curve: bars, a little apart where curves share a rate.
    """
    figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    ticks = sorted({LOWEST_FPS, 0.25} | {fps for curve in curves.values() for fps in curve.protocol.fps_per_image})
    for index, (name, curve) in enumerate(curves.items()):
        colour = CURVE_COLOURS[index % len(CURVE_COLOURS)]
        line, marker = CURVE_STYLES[index % len(CURVE_STYLES)]
        x, y = _visible(curve, ticks[-1])
        axes.plot(x, y, line, color=colour, linewidth=1.8)
        end = curve.last_fps_per_image
        if end < ticks[-1] and len(y):
            axes.plot([max(end, LOWEST_FPS), ticks[-1]], [y[-1]] * 2, color=colour, linewidth=0.8, alpha=0.6)
        for fps, sensitivity in curve.sensitivity_at.items():
            axes.plot(fps, sensitivity, marker, color=colour, markersize=6, fillstyle="full" if fps <= end else "none")
        for fps, (low, high) in (intervals or {}).get(name, {}).items():
            axes.plot(
                [fps * 1.03**index] * 2, [low, high], color=colour, linewidth=5, alpha=0.25, solid_capstyle="butt"
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=(LOWEST_FPS / 1.05, ticks[-1] * 1.08), ylim=(0, 1.02), yticks=np.linspace(0, 1, 6))
    per = " or ".join(sorted({curve.protocol.per for curve in curves.values()}))
    axes.set_xlabel(f"False positives per {per}", color=INK)
    axes.set_ylabel("Sensitivity", color=INK)
    style_axes(axes)
    _label_ends(axes, curves)
    return png_bytes(figure)


def draw_strata(strata: Sequence[Stratum], overall: float) -> bytes:
    """Mean sensitivity of each stratum with its interval; the line is that of all lesions."""
    figure = Figure(figsize=(8, 0.9 + 0.33 * len(strata)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(stratum.by for stratum in strata))
    place, places = 0.0, []
    for previous, stratum in zip([None, *strata], strata, strict=False):
        place += 1.0 if previous is None or previous.by == stratum.by else 1.6
        places.append(place)
        colour = CURVE_COLOURS[groups.index(stratum.by) % len(CURVE_COLOURS)]
        axes.plot([stratum.mean.low, stratum.mean.high], [place] * 2, color=colour, linewidth=5, alpha=0.25)
        axes.plot(stratum.mean_sensitivity, place, "o", color=colour, markersize=7)
    axes.axvline(overall, color="#9aa5b1", linewidth=1, linestyle="--")
    axes.set_yticks(places, [f"{stratum.name}  ({stratum.num_lesions})" for stratum in strata])
    axes.set(xlim=(-0.02, 1.02), ylim=(place + 0.7, 0.3))
    axes.set_xlabel("Mean sensitivity", color=INK)
    style_axes(axes)
    axes.grid(visible=False, axis="y")
    return png_bytes(figure)


def draw_reliability(of: Calibration, right: str) -> bytes:
    """Share that is right against mean score, and how many answers each bin holds.

    Args:
        right: what it is to be right, as the axis says it.
    """
    figure = Figure(figsize=(8, 3.8), dpi=160, layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(1, 1))
    filled = of.counts > 0
    axes.plot([0, 1], [0, 1], "--", color="#9aa5b1", linewidth=1)
    axes.plot(of.mean_score[filled], of.share_right[filled], "o-", color=CURVE_COLOURS[0], linewidth=1.8, markersize=6)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    axes.set_xlabel("Mean score of the bin", color=INK)
    axes.set_ylabel(right, color=INK)
    edges = np.linspace(0, 1, len(of.counts) + 1)
    bars.bar(edges[:-1], of.counts, width=np.diff(edges), align="edge", color=CURVE_COLOURS[4])
    bars.set(xlim=(0, 1), xticks=np.linspace(0, 1, 6))
    if of.counts.max(initial=0) > FEW_ANSWERS:
        bars.set_yscale("log")
        bars.set(ylim=(0.5, None))
    else:
        bars.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bars.set_xlabel("Score", color=INK)
    bars.set_ylabel("Answers", color=INK)
    for each in (axes, bars):
        style_axes(each)
    return png_bytes(figure)


def _label_ends(axes: Axes, curves: Mapping[str, FrocResult]) -> None:
    """Each curve's name at its right end, moved up where it would cover the one below."""
    heights = {name: curve.sensitivity_at[curve.protocol.fps_per_image[-1]] for name, curve in curves.items()}
    colours = dict(zip(curves, cycle(CURVE_COLOURS)))
    lowest_free = 0.0
    for name in sorted(curves, key=lambda name: heights[name]):
        text = fill(name, 24, max_lines=3)
        half = 0.03 * (1 + text.count("\n"))
        height = max(heights[name], lowest_free + half)
        axes.annotate(
            text, (1.015, height), xycoords=("axes fraction", "data"), color=colours[name], fontsize=10, va="center"
        )
        lowest_free = height + half


def _visible(curve: FrocResult, last_tick: float) -> tuple[np.ndarray, np.ndarray]:
    """The curve from the left end of the axis to its own end, one point for each false positive count: its highest."""
    fps, sensitivity = curve.curve
    if len(curve.thresholds) == 0:
        return np.array([LOWEST_FPS, last_tick]), np.zeros(2)
    highest = np.flatnonzero(np.diff(fps, append=np.inf))
    fps, sensitivity = fps[highest], sensitivity[highest]
    inside = (fps > LOWEST_FPS) & (fps <= last_tick)
    start = np.interp(LOWEST_FPS, fps, sensitivity, left=0.0)
    return np.r_[LOWEST_FPS, fps[inside]], np.r_[start, sensitivity[inside]]


def _draw_boxes(axes: Axes, boxes: np.ndarray, colour: str, line: str | tuple, width: float = 1.6) -> None:
    for x1, y1, x2, y2 in boxes:
        patch = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width, linestyle=line)
        axes.add_patch(patch)


def _write_at(axes: Axes, boxes: np.ndarray, texts: Sequence[str], colour: str) -> None:
    """A text above each box that can be seen, below it where it would cover an earlier text, or else none at all.

    Args:
        boxes: the most important first.
    """
    axes.apply_aspect()  # as drawing does: before it the texts are not where they will be
    renderer = FigureCanvasAgg(cast(Figure, axes.get_figure(root=True))).get_renderer()
    taken = [text.get_window_extent(renderer).padded(LABEL_PAD_PX) for text in axes.texts]
    (x1, x2), (y2, y1) = axes.get_xlim(), axes.get_ylim()
    for box, text in zip(boxes, texts, strict=True):
        if not (box[0] < x2 and box[2] > x1 and box[1] < y2 and box[3] > y1):
            continue
        left, highest, lowest = max(box[0], x1), y1 + 0.07 * (y2 - y1), y2 - 0.07 * (y2 - y1)
        for corner, points in (((left, max(box[1], highest)), 4), ((left, min(box[3], lowest)), -14)):
            label = axes.annotate(text, corner, (2, points), color=colour, **LABEL)
            extent = label.get_window_extent(renderer).padded(LABEL_PAD_PX)
            if not any(extent.overlaps(other) for other in taken):
                taken.append(extent)
                break
            label.remove()


def _close_up(focus: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """A square around the focus, three times its longer side and at least 64 pixels, moved inside the image."""
    x1, y1, x2, y2 = (float(each) for each in focus)
    side = min(max(3 * max(x2 - x1, y2 - y1), 64.0), *shape)
    left = float(np.clip((x1 + x2 - side) / 2, 0, shape[1] - side))
    top = float(np.clip((y1 + y2 - side) / 2, 0, shape[0] - side))
    return left, top, left + side, top + side


def draw_scale_bar(axes: Axes, view: tuple[float, float, float, float], column_mm: float) -> None:
    """At the lower left, at most a quarter of the view wide.

    Args:
        view: what the axes show, xyxy in pixels.
    """
    x1, y1, x2, y2 = view
    quarter_mm = (x2 - x1) * column_mm / 4
    length_mm = max((length for length in (1, 2, 5, 10, 20, 50, 100) if length <= quarter_mm), default=1)
    left, bottom = x1 + 0.05 * (x2 - x1), y2 - 0.06 * (y2 - y1)
    axes.add_patch(
        Rectangle((left, bottom), length_mm / column_mm, 0.01 * (y2 - y1), facecolor="white", edgecolor="black", lw=0.5)
    )
    axes.annotate(f"{length_mm} mm", (left, bottom), (2, 6), color="white", **LABEL)


def _draw_edge_letters(axes: Axes, letters: EdgeLetters) -> None:
    places = {"left": (0.0, 0.5), "right": (1.0, 0.5), "top": (0.5, 1.0), "bottom": (0.5, 0.0)}
    for edge, (x, y) in places.items():
        axes.annotate(
            getattr(letters, edge),
            (x, y),
            (5 * (1 - 2 * x), 5 * (1 - 2 * y)),  # points, from the edge inwards
            xycoords="axes fraction",
            color="white",
            weight="bold",
            ha={0.0: "left", 0.5: "center", 1.0: "right"}[x],
            va={0.0: "bottom", 0.5: "center", 1.0: "top"}[y],
            **LABEL,
        )


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
