"""Draws scaling laws as PNG plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from llmtrain.observe.plots import FAINT, INK, LINES, figure_of, style
from llmtrain.scaling.laws.read import Points, budgets_of
from llmtrain.scaling.laws.sigmoid import Sigmoid

NAMES = {"params": "parameters", "tokens": "tokens"}


def plot_isoflops(path: str, points: Points, result: Mapping[str, Any], axis: str) -> None:
    """Draws the losses of each budget over size or tokens, with the parabolas and their minima; without parabolas the
    points alone."""
    figure = figure_of(8, 5)
    axes = figure.add_subplot()
    style(axes, "Loss by budget")
    groups, parabolas = budgets_of(points.flops), result["methods"].get("parabolas", {}).get("fit", {}).get("parabolas")
    for i, rows in enumerate(groups):
        sizes, color = getattr(points, axis)[rows], f"C{i % 10}"
        axes.plot(sizes, points.loss[rows], ".", color=color, label=f"{result['budgets'][i]:.3g} FLOPs")
        if parabolas is not None and parabolas[i]["best"] is not None:
            x = np.linspace(np.log10(sizes.min()), np.log10(sizes.max()), 100)
            axes.plot(10**x, np.polyval(parabolas[i]["quadratic"], x), color=color, linewidth=1)
            marker = "o" if parabolas[i]["used"] else "x"  # a cross: the budget is left out
            axes.plot(parabolas[i]["best"], parabolas[i]["loss"], marker, color=color, markersize=7)
    _logarithmic(axes, NAMES[axis])
    low, high = np.percentile(points.loss, [0, 97])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    axes.legend(frameon=False, fontsize=7, labelcolor=INK, ncols=2)
    figure.savefig(path)


def plot_optima(path: str, result: Mapping[str, Any]) -> None:
    """Draws the best size and tokens over FLOPs by all methods, shaded by their intervals, with the minima of the
    parabolas."""
    figure = figure_of(11, 4.5)
    methods = {name: found for name, found in result["methods"].items() if "params" in found}
    look = dict(zip(methods, zip(LINES, ("-", "-", "--"), strict=False), strict=False))  # two that agree are both seen
    for axes, axis in zip(figure.subplots(1, 2), NAMES, strict=True):
        style(axes, f"Best {NAMES[axis]}")
        for method, found in methods.items():
            color, dashes = look[method]
            best = sorted(found[axis]["best"], key=lambda each: each["flops"])
            flops = [each["flops"] for each in best]
            axes.plot(flops, [each["value"] for each in best], dashes, color=color, linewidth=1.5, label=method)
            if all(each["interval"] is not None for each in best):
                axes.fill_between(
                    flops, *zip(*(each["interval"] for each in best), strict=True), color=color, alpha=0.15
                )
            _minima(axes, found["fit"], axis, color)
        _logarithmic(axes, "FLOPs")
        axes.set_yscale("log")
        if methods:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)


def _minima(axes: Axes, fit: Mapping[str, Any], axis: str, color: str) -> None:
    used = [each for each in fit.get("parabolas", ()) if each["used"]]
    own = [each["best"] if fit["axis"] == axis else each["flops"] / (6 * each["best"]) for each in used]
    axes.plot([each["flops"] for each in used], own, "o", color=color, markersize=4)


def plot_rewards(path: str, columns: Mapping[str, np.ndarray], result: Mapping[str, Any], compute: str) -> None:
    """Draws rewards over compute, called `compute`, with the sigmoid, its asymptote and the interval of that."""
    figure = figure_of(8, 4)
    axes = figure.add_subplot()
    style(axes, "Reward")
    fit, interval = Sigmoid(**result["fit"]), result["intervals"]["R_max"]
    flops = [*columns["flops"], *(each["flops"] for each in result["targets"])]
    x = np.geomspace(min(flops), max(flops), 200)
    axes.plot(columns["flops"], columns["reward"], ".", color=LINES[1], label="measured")
    axes.plot(x, fit.reward(x), color=LINES[0], linewidth=1.5, label="sigmoid")
    axes.axhline(fit.R_max, color=FAINT, linestyle=":", label="asymptote")
    if interval is not None:
        axes.axhspan(*interval, color=FAINT, alpha=0.12)
    _logarithmic(axes, compute)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)


def _logarithmic(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(label, fontsize=8, color=FAINT)
