"""Draws PNG plots of a run. Matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import IO, TYPE_CHECKING, Any

from llmtrain.config.recipes import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BarPanel = tuple[str, Mapping[str, Mapping[str, float]], int]
"""A panel of bars is (title, {label: {measure: value}}, digits shown)."""

TRAINING: tuple[Panel, ...] = (
    ("Loss, nats a token", {"loss": "training", "held_out_loss": "held out"}),
    ("Gradient norm", {"grad_norm": "before clipping"}),
    ("Learning rate", {"lr": "learning rate"}),
    ("Tokens a second", {"tokens_per_s": "all ranks"}),
)
LINES = ("#2563eb", "#d97706", "#059669", "#7c3aed")
SHADES = ("#dbeafe", "#1d4ed8")  # of bars
INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
MOST_BESIDE = 6  # bars whose numbers fit beside each other
MOST_POINTS = 32  # of a line among others
SMOOTH_SHARE = 0.02  # a line's running mean spans this share of its steps


def plot_curves(
    path: str, panels: Sequence[Panel], metrics: Sequence[Mapping[str, Any]], levels: Mapping[str, float] | None = None
) -> bool:
    """Draws one small plot over the steps for each panel that has data, and a level line for each key that has one.
    Returns False, and writes no file, if none has data."""
    present = {key for record in metrics for key, value in record.items() if value is not None}
    panels = [(title, {k: n for k, n in lines.items() if k in present}) for title, lines in panels]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return False
    columns = min(len(panels), 2)
    figure = figure_of(5 * columns, 2.7 * math.ceil(len(panels) / columns))
    for place, (title, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, place)
        style(axes, title)
        axes.set_xlabel("step", fontsize=8, color=FAINT)
        for (key, name), color in zip(lines.items(), LINES, strict=False):
            _draw(axes, [(r["step"], r[key]) for r in metrics if r.get(key) is not None], name, color)
            if levels and key in levels:
                axes.axhline(levels[key], color=color, linewidth=1, linestyle="--", label=f"{name} before training")
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)
    return True


def plot_lines(path: str, title: str, x_label: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draws one plot with all lines, each of points (x, y); of a long one the means over a few neighbours."""
    figure = figure_of(10, 4)
    axes = figure.add_subplot()
    style(axes, title)
    axes.set_xlabel(x_label, fontsize=8, color=FAINT)
    for i, (name, points) in enumerate(lines.items()):
        _draw(axes, _means(points, MOST_POINTS), name.replace("$", r"\$"), f"C{i}")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)


Points = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""The values of x and of y that belong together, by label."""


def plot_measured(
    file: str | IO[bytes],
    title: str,
    x_label: str,
    curve: Sequence[tuple[float, float]],
    points: Sequence[tuple[float, float, float, float]],
) -> None:
    """Draws a curve that theory gives, and measured points (x, y, low, high) with the ends of their intervals."""
    figure = figure_of(6, 3.5)
    axes = figure.add_subplot()
    style(axes, title)
    axes.set_xlabel(x_label, fontsize=8, color=FAINT)
    axes.plot(*zip(*curve, strict=True), color=LINES[0], linewidth=1.5, label="expected")
    if points:
        x, y, low, high = zip(*points, strict=True)
        axes.vlines(x, low, high, color=LINES[1], linewidth=1.2)
        axes.plot(x, y, "o", color=LINES[1], markersize=4, label="measured, 95 %")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(file)


def plot_spent(
    path: str, title: str, x_label: str, lines: Mapping[str, Sequence[tuple[float, float, float, float]]]
) -> None:
    """Draws lines of points (x, y, low, high) over the logarithm of x, with the ends of their intervals."""
    figure = figure_of(10, 4.5)
    axes = figure.add_subplot()
    style(axes, title.replace("$", r"\$"))
    axes.set_xlabel(x_label, fontsize=8, color=FAINT)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    for i, (name, points) in enumerate(lines.items()):
        x, y, low, high = zip(*points, strict=True)
        axes.vlines(x, low, high, color=f"C{i}", linewidth=0.8, alpha=0.5)
        axes.plot(x, y, marker="o", markersize=4, linewidth=1.5, color=f"C{i}", label=name.replace("$", r"\$"))
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside right upper")
    figure.savefig(path)


def plot_marks(path: str, y_label: str, panels: Mapping[str, Points]) -> None:
    """Draws panels side by side, by what x is: a labelled mark at each mean, a faint dot at each value."""
    figure = figure_of(12, 5)
    for axes, (x_label, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        style(axes, y_label)
        axes.set_xlabel(x_label, fontsize=8, color=FAINT)
        for i, (label, (xs, ys)) in enumerate(points.items()):
            axes.plot(xs, ys, ".", color=f"C{i}", alpha=0.4, markersize=4)
            axes.plot(fmean(xs), fmean(ys), "o", color=f"C{i}", markersize=5)
            place = {"xytext": (5, 3), "textcoords": "offset points", "fontsize": 7, "color": INK}
            axes.annotate(label.replace("$", r"\$"), (fmean(xs), fmean(ys)), **place)
        axes.margins(x=0.18)
    figure.savefig(path)


Passes = Sequence[tuple[int, float, float, float]]
"""The points (k, pass@k, low, high) of one model on one task, with the ends of their 95 % intervals."""


def plot_passes(path: str, panels: Mapping[str, Mapping[str, Passes]]) -> None:
    """Draws for each task the share of problems that one of k samples solves, over k, with a band for its interval."""
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = figure_of(5 * columns, 2.9 * rows)
    for place, (task, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        style(axes, f"pass@k: {task}".replace("$", r"\$"))
        axes.set_xscale("log", base=2)
        axes.set_xlabel("k, samples", fontsize=8, color=FAINT)
        for i, (label, points) in enumerate(curves.items()):
            ks, values, low, high = zip(*points, strict=True)
            axes.plot(ks, values, color=f"C{i}", marker="o", markersize=3, label=label.replace("$", r"\$"))
            axes.fill_between(ks, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        axes.set_xticks(ticks := sorted({k for points in curves.values() for k, *_ in points}), map(str, ticks))
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)


def plot_bars(path: str, panels: Sequence[BarPanel]) -> None:
    """Draws the panels side by side under one legend."""
    from matplotlib.patches import Patch

    labels = list(dict.fromkeys(label for _, rows, _ in panels for label in rows))
    colors = dict(zip(labels, _shades(len(labels)), strict=True))
    measures = [list(dict.fromkeys(m for row in rows.values() for m in row)) for _, rows, _ in panels]
    figure = figure_of(10, 3.2)
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=[len(names) for names in measures])[0]
    for axes, names, (title, rows, digits) in zip(grid, measures, panels, strict=True):
        style(axes, title)
        _bars(axes, names, rows, colors, digits)
    # a dollar sign would start a formula
    legend = [Patch(color=color, label=label.replace("$", r"\$")) for label, color in colors.items()]
    figure.legend(handles=legend, frameon=False, fontsize=8, labelcolor=INK, loc="outside right upper")
    figure.savefig(path)


def _bars(
    axes: Axes,
    measures: Sequence[str],
    rows: Mapping[str, Mapping[str, float]],
    colors: Mapping[str, str],
    digits: int,
) -> None:
    """Draws a group of bars for each measure, with one bar for each row; each bar shows its value."""
    width = 0.84 / len(rows)
    for i, (label, row) in enumerate(rows.items()):
        xs = [x + (i - (len(rows) - 1) / 2) * width for x, name in enumerate(measures) if name in row]
        bars = axes.bar(xs, [row[name] for name in measures if name in row], width * 0.92, color=colors[label])
        upright = {"rotation": 90, "fontsize": 6} if len(rows) > MOST_BESIDE else {"fontsize": 8}
        axes.bar_label(bars, fmt=f"%.{digits}f", color=INK, padding=2, **upright)
    axes.set_xticks(range(len(measures)), measures)
    axes.margins(y=0.16)
    axes.set_ylim(bottom=0)


def _shades(count: int) -> list[str]:
    """Returns colours from light, for the first model, to dark, for the last."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    shades = LinearSegmentedColormap.from_list("shades", SHADES)
    return [to_hex(shades((i + 1) / count)) for i in range(count)]


def figure_of(width: float, height: float) -> Figure:
    """Returns an empty figure. It is made without pyplot, which would keep global state and need a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=144, layout="constrained", facecolor="white")


def style(axes: Axes, title: str) -> None:
    """Gives axes the look of all plots: a title at the left, faint lines, no frame."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)


def _draw(axes: Axes, points: Sequence[tuple[int, float]], name: str, color: str) -> None:
    """Draws a long curve as faint values with a bold running mean, and a few points as marks."""
    steps, values = zip(*points, strict=True)
    reach = int(len(values) * SMOOTH_SHARE / 2)
    if reach == 0:
        marks = {"marker": "o", "markersize": 4, "linestyle": ":"} if len(values) < 8 else {}
        axes.plot(steps, values, color=color, linewidth=1.5, label=name, **marks)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, _running_mean(values, reach), color=color, linewidth=1.5, label=name)


def _means(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Returns at most `most` points, each the mean of as many neighbours."""
    each = math.ceil(len(points) / most)
    parts = [points[i : i + each] for i in range(0, len(points), each)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Returns the mean over `reach` neighbours on both sides, so that the line does not lag; fewer at the ends."""
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
