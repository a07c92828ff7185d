"""The pictures of a classifier's and a segmenter's report, as PNG bytes."""

from collections.abc import Mapping, Sequence
from textwrap import fill, shorten

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mp3d.config import UNKNOWN
from mp3d.evaluation import MaskedSlice, SegmentedCase
from mp3d.metrics.bootstrap import patient_weights
from mp3d.metrics.classification import roc_curve
from mp3d.metrics.dice import dice
from mp3d.report.figures import (
    CURVE_COLOURS,
    CURVE_STYLES,
    INK,
    TRUE_COLOUR,
    draw_scale_bar,
    png_bytes,
    style_axes,
)
from mp3d.report.windows import SOFT_TISSUE, Window, display_window

MASK_COLOURS = ("#FFA023", "#56B4E9", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
"""Of a segmenter's classes."""
BAND_REPLICATES = 300
FEW_CLASSES = 5
"""Up to which a table of classes is a small figure."""
GAP_INCHES = 0.12
"""Between the panels of a picture, which else look like one image."""
LONGEST_NAME = 24
"""Of a class, in letters."""


def draw_roc(
    scores: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str],
    threshold: float,
    auc: float,
    others: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """ROC curve with a 95 % band by resampling patients, and the point of the threshold.

    Args:
        others: scores of other models for the same cases, by what the legend says of them.
    """
    figure = Figure(figsize=(5.4, 5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    grid, sampled = np.linspace(0, 1, 101), []
    for weights in patient_weights(patients, BAND_REPLICATES):
        which = np.repeat(np.arange(len(labels)), weights)
        if 0 < labels[which].sum() < len(which):
            alarms, found, _ = roc_curve(scores[which], labels[which])
            sampled.append(np.interp(grid, alarms, found))
    if sampled:
        low, high = np.percentile(sampled, [2.5, 97.5], axis=0)
        axes.fill_between(grid, low, high, color=CURVE_COLOURS[0], alpha=0.15, linewidth=0)
    alarms, found, thresholds = roc_curve(scores, labels)
    axes.plot([0, 1], [0, 1], "--", color="#9aa5b1", linewidth=1)
    axes.plot(alarms, found, color=CURVE_COLOURS[0], linewidth=1.8, label=f"AUC {auc:.3f}")
    at = int((thresholds >= threshold).sum()) - 1
    axes.plot(alarms[at], found[at], "o", color=CURVE_COLOURS[1], markersize=8, label=f"threshold {threshold:.2f}")
    for index, (name, other) in enumerate((others or {}).items(), 2):  # the second colour is the threshold's
        line, _ = CURVE_STYLES[(index - 1) % len(CURVE_STYLES)]
        look = {"color": CURVE_COLOURS[index % len(CURVE_COLOURS)], "linestyle": line, "linewidth": 1.4}
        other_alarms, other_found, _ = roc_curve(other, labels)
        axes.plot(other_alarms, other_found, label=fill(name, 32, max_lines=3), **look)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_xlabel("1 − specificity", color=INK)
    axes.set_ylabel("Sensitivity", color=INK)
    axes.legend(loc="lower right", frameon=False)
    style_axes(axes)
    return png_bytes(figure)


def draw_scores(scores: np.ndarray, labels: np.ndarray, threshold: float, names: Sequence[str]) -> bytes:
    """How the probability of class 1 is spread in either class."""
    figure = Figure(figsize=(8, 2.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, 21)
    values = [scores[labels == label] for label in (0, 1)]
    axes.hist(values, bins=edges.tolist(), color=list(CURVE_COLOURS[:2]), label=list(names[:2]))
    axes.axvline(threshold, color="#9aa5b1", linestyle="--", linewidth=1)
    axes.annotate(
        "threshold",
        (threshold, 0.97),
        (4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=INK,
        fontsize=9,
        va="top",
    )
    axes.set(xlim=(0, 1))
    axes.set_xlabel(f"Probability of {names[1]}", color=INK)
    axes.set_ylabel("Cases", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(frameon=False)
    style_axes(axes)
    return png_bytes(figure)


def draw_confusion(said: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> bytes:
    """Cases by true and said class."""
    number = len(names)
    table = np.zeros((number, number), int)
    np.add.at(table, (labels, said), 1)
    names = [shorten(name, LONGEST_NAME, placeholder="…") for name in names]
    room = 1.0 + 0.08 * max(map(len, names))
    size = 9 if number <= FEW_CLASSES else 10.5
    figure = Figure(figsize=(0.45 * number + room, 0.45 * number + 0.8 * room), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(table):
        if count:
            colour = "white" if shares[row, column] > 0.6 else INK
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=size)
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if number > 3 else {}
    axes.set_xticks(range(number), names, fontsize=size, **turned)
    axes.set_yticks(range(number), names, fontsize=size)
    axes.set_xlabel("Said", color=INK)
    axes.set_ylabel("True", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.spines[:].set_visible(False)
    return png_bytes(figure)


def draw_dice(cases: Sequence[SegmentedCase], names: Sequence[str]) -> bytes:
    """Dice of every case, and against the true volume."""
    figure = Figure(figsize=(8, 3.6), dpi=160, layout="constrained")
    ranked, sized = figure.subplots(1, 2)
    counts = np.array([case.counts for case in cases])
    for index in range(counts.shape[1]):
        values, sizes = dice(counts[:, index]), counts[:, index, 2]
        defined = ~np.isnan(values)
        colour = CURVE_COLOURS[index % len(CURVE_COLOURS)]
        name = names[index] if index < len(names) else f"class {index + 1}"
        order = np.sort(values[defined])[::-1]
        ranked.plot(np.arange(1, len(order) + 1), order, "o-", color=colour, linewidth=1.2, markersize=5, label=name)
        shown = defined & (sizes > 0)
        sized.plot(sizes[shown], values[shown], "o", color=colour, markersize=5)
    ranked.set(ylim=(-0.02, 1.02), xlim=(0.5, len(cases) + 0.5))
    ranked.set_xlabel("Cases, best first", color=INK)
    ranked.set_ylabel("Dice", color=INK)
    ranked.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if counts.shape[1] > 1:
        ranked.legend(frameon=False, loc="lower left")
    voxels = counts[..., 2][counts[..., 2] > 0]
    low, high = np.log10([voxels.min(), voxels.max()]) if len(voxels) else (0, 1)
    decades = (np.floor(low), max(np.ceil(high), np.floor(low) + 1))  # at least one, or nothing would be written on it
    sized.set(ylim=(-0.02, 1.02), xscale="log", xlim=(0.9 * 10 ** decades[0], 1.1 * 10 ** decades[1]))
    sized.set_xlabel("True voxels", color=INK)
    for axes in (ranked, sized):
        style_axes(axes)
    return png_bytes(figure)


def draw_case(image: np.ndarray) -> bytes:
    """A slice in a window that suits its middle, or a colour picture."""
    if image.ndim == 3:
        shown = image.transpose(1, 2, 0).astype(float) / 255
    else:
        height, width = image.shape
        middle = np.array([width * 0.35, height * 0.35, width * 0.65, height * 0.65])
        shown = _grey(image, display_window(image, middle))
    return _one_picture([shown])


def draw_masks(masked: MaskedSlice) -> bytes:
    """Around what is marked: the slice alone, and with the true outline (green) and the answer (filled).

    The window is that of the truth, where there is any: a wrong answer must not hide what was missed.
    """
    true = (masked.true_mask > 0) & (masked.true_mask != UNKNOWN)
    rows, columns = np.nonzero((masked.predicted_mask > 0) | true)
    if masked.image.ndim == 3:
        grey = masked.image.transpose(1, 2, 0).astype(float) / 255
    else:
        box = np.array([0, 0, *masked.image.shape[::-1]], float)
        y, x = np.nonzero(true if true.any() else masked.predicted_mask)
        if len(y):
            box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], float)
        grey = _grey(masked.image, display_window(masked.image, box))
    overlaid = grey.copy()
    for value in np.unique(masked.predicted_mask[masked.predicted_mask > 0]).tolist():
        colour = np.array(to_rgb(MASK_COLOURS[(value - 1) % len(MASK_COLOURS)]))
        inside = masked.predicted_mask == value
        overlaid[inside] = 0.6 * overlaid[inside] + 0.4 * colour
    part = _around(rows, columns, grey.shape)
    truth = np.where(masked.true_mask == UNKNOWN, 0, masked.true_mask)
    return _one_picture([grey[part], overlaid[part]], truth[part], masked.spacing_mm)


def _around(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """A square twice as wide as what is marked, inside the image."""
    if not len(rows):
        return slice(0, shape[0]), slice(0, shape[1])
    side = int(min(max(2 * max(np.ptp(rows), np.ptp(columns)), 48), *shape[:2]))
    top, left = (
        int(np.clip((values.min() + values.max() - side) // 2, 0, size - side))
        for values, size in ((rows, shape[0]), (columns, shape[1]))
    )
    return slice(top, top + side), slice(left, left + side)


def _grey(image: np.ndarray, window: Window = SOFT_TISSUE) -> np.ndarray:
    grey = np.clip((image.astype(float) - window.low) / (window.high - window.low), 0, 1)
    return np.repeat(grey[..., None], 3, axis=-1)


def _one_picture(
    panels: Sequence[np.ndarray],
    outline: np.ndarray | None = None,
    spacing_mm: tuple[float, float, float] | None = None,
) -> bytes:
    """Panels side by side, with a gap; in the patient's proportions and with a scale bar where the spacing is known.

    Args:
        outline: a mask, whose outlines are drawn on the last panel.
        spacing_mm: z, y, x.
    """
    width = 4 * len(panels) + GAP_INCHES * (len(panels) - 1)
    figure = Figure(figsize=(width, 4), dpi=100, facecolor="black")
    _, row_mm, column_mm = spacing_mm or (1.0, 1.0, 1.0)
    for index, panel in enumerate(panels):
        axes = figure.add_axes((index * (4 + GAP_INCHES) / width, 0, 4 / width, 1))
        axes.imshow(panel, interpolation="bilinear", aspect=row_mm / column_mm)
        if outline is not None and index == len(panels) - 1:
            for value in np.unique(outline[outline > 0]).tolist():
                axes.contour(outline == value, levels=[0.5], colors=[TRUE_COLOUR], linewidths=1.6)
        axes.set_axis_off()
        if index:  # air is as black as the picture's ground
            gap = ((index * (4 + GAP_INCHES) - GAP_INCHES) / width, 0)
            figure.add_artist(Rectangle(gap, GAP_INCHES / width, 1, facecolor="#666666", linewidth=0))
        if spacing_mm is not None and index == 0:
            height, across = panel.shape[:2]
            draw_scale_bar(axes, (-0.5, -0.5, across - 0.5, height - 0.5), column_mm)
    return png_bytes(figure)
