"""The pictures of a data passport, as PNG bytes."""

from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mp3d.data.intensity import Intensities
from mp3d.data.survey import SplitSurvey
from mp3d.report.figures import CURVE_COLOURS, CURVE_STYLES, INK, png_bytes, style_axes

SPLIT_LOOKS: Mapping[str, tuple[str, str]] = {
    "train": (CURVE_COLOURS[0], "-"),
    "val": (CURVE_COLOURS[1], "--"),
    "test": (CURVE_COLOURS[2], ":"),
}
"""Colour and line of each split."""
HU_SHOWN = (-1100, 2000)
GREY_SHOWN = (0, 255)
NUM_BINS = 30
IOU_FROM = 0.3


def draw_geometry(surveys: Mapping[str, SplitSurvey]) -> bytes:
    """Slice spacing, pixel spacing and slices per series, as shares of the series of each split."""
    figure, (across, inside, slices) = _panels(3)
    _histograms(across, {split: of.spacing_mm[:, 0] for split, of in surveys.items()}, "Slice spacing, mm")
    _histograms(inside, {split: of.spacing_mm[:, 1] for split, of in surveys.items()}, "Spacing of rows, mm")
    _histograms(slices, {split: of.slices_per_series for split, of in surveys.items()}, "Slices in a series")
    across.set_ylabel("Share of series", color=INK)
    _legend_above(figure)
    return png_bytes(figure)


def draw_intensities(intensities: Mapping[str, Intensities]) -> bytes:
    """Shares of the pixels; of Hounsfield units on a logarithmic axis, for most are air."""
    figure, (axes,) = _panels(1)
    for split, of in intensities.items():
        colour, line = SPLIT_LOOKS[split]
        low, high = HU_SHOWN if of.unit == "HU" else GREY_SHOWN
        width = max(1, (high - low) // 155)
        edges = np.arange(low, high + width, width)
        counts, _ = np.histogram(of.values, bins=edges, weights=of.counts)
        shares = counts / of.counts.sum()
        axes.plot((edges[:-1] + edges[1:]) / 2, np.where(shares > 0, shares, np.nan), line, color=colour, label=split)
        axes.set_xlabel("HU" if of.unit == "HU" else "Grey value of a plane", color=INK)
        axes.set_yscale("log" if of.unit == "HU" else "linear")
    axes.minorticks_off()
    axes.set_ylabel("Share of the pixels", color=INK)
    _legend_above(figure)
    return png_bytes(figure)


def draw_boxes(sizes: Mapping[str, np.ndarray], ratios: Mapping[str, np.ndarray], unit: str) -> bytes:
    """Square root of the area and height over width, both on logarithmic axes, as shares of the boxes of each split."""
    figure, (size, ratio) = _panels(2)
    _histograms(size, sizes, f"Square root of the area, {unit}", logarithmic=True)
    _histograms(ratio, ratios, "Height over width", logarithmic=True)
    size.set_ylabel("Share of boxes", color=INK)
    _legend_above(figure)
    return png_bytes(figure)


def draw_anchors(centred: Mapping[str, np.ndarray], placed: Mapping[str, np.ndarray], emphasised: str) -> bytes:
    """Which share of the boxes reaches an overlap with its best anchor, for each set of anchors.

    Args:
        emphasised: name of the set whose curve stands out.
    """
    figure, panels = _panels(2, height=4.2)
    thresholds = np.linspace(IOU_FROM, 1, 141)
    titles = ("Anchor centred on the box", "Anchor on the grid")
    for axes, title, overlaps in zip(panels, titles, (centred, placed), strict=True):
        for index, (name, iou) in enumerate(overlaps.items()):
            shares = [(iou >= threshold).mean() for threshold in thresholds]
            line, _ = CURVE_STYLES[index % len(CURVE_STYLES)]
            look = {"color": CURVE_COLOURS[index % len(CURVE_COLOURS)], "linestyle": line, "linewidth": 1.6}
            if name == emphasised:
                look = {"color": INK, "linestyle": "-", "linewidth": 2.6}
            axes.plot(thresholds, shares, label=name, **look)
        for threshold in (0.5, 0.7):
            axes.axvline(threshold, color="#9aa5b1", linewidth=0.8)
        axes.set(xlim=(IOU_FROM, 1), ylim=(0, 1.02))
        axes.set_title(title, color=INK, fontsize=11)
        axes.set_xlabel("IoU with the best anchor", color=INK)
    panels[0].set_ylabel("Share of boxes that reach it", color=INK)
    panels[0].legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower left")
    return png_bytes(figure)


def _panels(count: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), dpi=160, layout="constrained")
    panels = [figure.add_subplot(1, count, number + 1) for number in range(count)]
    for axes in panels:
        style_axes(axes)
    return figure, panels


def _histograms(axes: Axes, values: Mapping[str, np.ndarray], title: str, *, logarithmic: bool = False) -> None:
    """One outline for each split, over common bins; each adds up to 1."""
    edges = _edges(values.values(), logarithmic)
    for split, of in values.items():
        if len(of):
            colour, line = SPLIT_LOOKS[split]
            counts, _ = np.histogram(of, bins=edges)
            axes.stairs(counts / len(of), edges, color=colour, linestyle=line, linewidth=1.6, label=split)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_ylim(0)
    axes.set_xlabel(title, color=INK)


def _legend_above(figure: Figure) -> None:
    """One legend for all panels, outside of them, where it covers nothing."""
    handles = {
        text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper right", ncols=len(SPLIT_LOOKS), frameon=False,
        labelcolor=INK, fontsize=9,
    )  # fmt: skip


def _edges(values: Iterable[np.ndarray], logarithmic: bool) -> np.ndarray:
    """Bins over all values, with some room around them; on a logarithmic axis enough for two marks."""
    together = np.concatenate([np.asarray(each, float) for each in values])
    low, high = together.min(), together.max()
    if logarithmic:
        middle = np.sqrt(low * high)
        return np.geomspace(min(low / 1.05, middle / 2), max(high * 1.05, middle * 2), NUM_BINS + 1)
    margin = max(high - low, abs(high), 1e-6) * 0.05
    return np.linspace(low - margin, high + margin, NUM_BINS + 1)
