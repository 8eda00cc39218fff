"""Draws the plots of the cleaning report, each as the bytes of a PNG file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from llmtrain.data.clean.dedup.curve import draw_curve
from llmtrain.observe.plots import FAINT, INK, LINES, figure_of, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lanes = Mapping[str, tuple[float, float]]
"""What comes into a step and what goes on, by input; an input that the step does not see is left out."""

ALL = "all inputs"
LOST = "#e0a39b"
BARS = 30  # languages that are drawn
LABEL_CHARS = 24
FLOOR, BAR = -0.12, 0.16  # where the boxes of what was dropped hang, in shares of all; width of a box in columns


def png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def label(text: str) -> str:
    """Returns a text as Matplotlib shows it as it is, cut short: a dollar sign would start a formula."""
    cut = text if len(text) <= LABEL_CHARS else text[: LABEL_CHARS - 1] + "…"
    return cut.replace("$", r"\$")


def sankey(title: str, read: Mapping[str, float], columns: Sequence[tuple[str, Lanes]]) -> bytes:
    """Draws what was read, by input, and how much of it each step lets through and drops. From the first step that
    sees all inputs together (lane ALL) on there is one flow."""
    figure = figure_of(max(8.0, 1.1 * len(columns) + 4), 5.2)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.axis("off")
    whole = sum(read.values()) or 1.0
    heights = {name: value / whole for name, value in read.items()}
    color = {name: LINES[place % len(LINES)] for place, name in enumerate(read)} | {ALL: FAINT}
    for name, top in tops(heights).items():
        axes.text(
            -0.1, top - heights[name] / 2, f"{label(name)}\n{read[name]:,.0f}", ha="right", va="center", fontsize=7
        )
    for place, (step, lanes) in enumerate(columns):
        shares = {name: (came / whole, went / whole) for name, (came, went) in lanes.items()}
        heights = column(axes, place, step, heights, shares, color, whole)
    end = len(columns)
    kept = sum(heights.values())
    axes.text(end + 0.1, 1 - kept / 2, f"kept\n{kept * whole:,.0f}\n{kept:.1%}", va="center", fontsize=8, color=INK)
    axes.set_xlim(-1.2, end + 0.9)
    axes.set_ylim(min(FLOOR - 0.55, -0.7), 1.12)
    return png(figure)


def tops(heights: Mapping[str, float]) -> dict[str, float]:
    """Returns where each of the lanes of a column begins, the first at 1."""
    return {name: 1 - below for name, below in zip(heights, accumulate(heights.values(), initial=0.0), strict=False)}


def column(
    axes: Axes, x: int, step: str, heights: dict[str, float], lanes: Lanes, color: Mapping[str, str], whole: float
) -> dict[str, float]:
    """Draws the flows of a step, from x to x + 1, and returns the heights of the lanes behind it."""
    if ALL in lanes and ALL not in heights:
        heights = {ALL: lanes[ALL][0]}
    after = {name: lanes[name][1] if name in lanes else height for name, height in heights.items()}
    lost = {name: max(0.0, heights[name] - after[name]) for name in heights}
    starts, ends, sink = tops(heights), tops(after), FLOOR
    for name, height in heights.items():
        kept = min(height, after[name])
        ribbon(axes, (x, starts[name], kept), (x + 1, ends[name], after[name]), color[name])
        if lost[name]:
            ribbon(axes, (x, starts[name] - kept, lost[name]), (x + 0.6, sink, lost[name]), LOST)
            sink -= lost[name]
    axes.text(x + 0.3, 1.04, label(step), rotation=25, fontsize=7, color=INK)
    axes.bar(x + 0.6, sink - FLOOR, BAR, FLOOR, align="edge", color=LOST)
    if sum(lost.values()):
        axes.text(x + 0.6, sink - 0.02, f"−{sum(lost.values()) * whole:,.0f}", va="top", fontsize=7, color=FAINT)
    return after


def ribbon(axes: Axes, start: tuple[float, float, float], end: tuple[float, float, float], color: str) -> None:
    """Draws a flow between two places (x, top, height)."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    (x, top, height), (x_end, top_end, height_end) = start, end
    half = (x + x_end) / 2
    upper = [(x, top), (half, top), (half, top_end), (x_end, top_end)]
    low, low_end = top - height, top_end - height_end
    lower = [(x_end, low_end), (half, low_end), (half, low), (x, low), (x, top)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    axes.add_patch(PathPatch(Path(upper + lower, codes), facecolor=color, alpha=0.55, linewidth=0))


def languages(counts: Mapping[str, int]) -> bytes:
    """Draws the documents of the most frequent languages."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:BARS]
    figure = figure_of(10, 3.2)
    axes = figure.add_subplot()
    style(axes, "Documents by language" + (f", the first {BARS} of {len(counts)}" if len(counts) > BARS else ""))
    bars = axes.bar(range(len(most)), [value for _, value in most], color=LINES[0])
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=6, color=INK, padding=2)
    axes.set_xticks(range(len(most)), [label(name) for name, _ in most], rotation=45, ha="right")
    return png(figure)


def lengths(histograms: Mapping[str, Mapping[int, int]]) -> bytes:
    """Draws the shares of documents by length, for each folder that was looked at. Bin b has lengths 2^(b-1) up to
    2^b."""
    figure = figure_of(10, 3.2)
    axes = figure.add_subplot()
    style(axes, "Share of documents by characters, each bar up to twice its label")
    bins = [b for histogram in histograms.values() for b in histogram]
    span = range(min(bins), max(bins) + 1)
    for (name, histogram), color in zip(histograms.items(), LINES, strict=False):
        shares = [histogram.get(b, 0) / sum(histogram.values()) for b in span]
        axes.stairs(shares, [b - 0.5 for b in (*span, span[-1] + 1)], fill=True, color=color, alpha=0.35, label=name)
    axes.set_xticks(list(span), [f"{2 ** (b - 1):,}" if b else "0" for b in span], rotation=45, ha="right")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return png(figure)


def curve(buckets: int, hashes: int) -> bytes:
    """Draws the probability that near duplicates are found over their similarity."""
    file = io.BytesIO()
    draw_curve(file, buckets, hashes)
    return file.getvalue()
