"""Fits isoFLOP parabolas (arXiv 2203.15556, section 3.2; arXiv 2407.21783, section 3.2.1).

The loss of the runs of one budget is a quadratic in the logarithm of their size, or of their tokens. The minima of all
budgets give a power law of compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from llmtrain.scaling.laws.read import Points, budgets_of

Axis = Literal["params", "tokens"]
FEW_POINTS, FEW_BUDGETS = 4, 4
SIDE = 2  # points that an optimum needs on either side, else it lies at the edge


class PowerLaw(NamedTuple):
    """Says that a value is coefficient x FLOPs^exponent."""

    coefficient: float
    exponent: float

    def at(self, flops: float) -> float:
        """Returns the value at a budget."""
        return self.coefficient * flops**self.exponent


@dataclass(frozen=True)
class Parabola:
    """Holds the fit of one budget: loss = quadratic[0] x^2 + quadratic[1] x + quadratic[2], x = log10 of the axis."""

    flops: float
    points: int
    quadratic: tuple[float, float, float]
    best: float | None  # params or tokens of lowest loss; None: the parabola has no minimum
    loss: float | None
    used: bool  # for the power laws


@dataclass(frozen=True)
class IsoFlop:
    """Holds the parabolas of all budgets, and the power laws of their minima. The law of the axis that is not `axis` is
    that of budget / (6 x best), so that params x tokens = FLOPs / 6."""

    axis: Axis
    parabolas: list[Parabola]
    params: PowerLaw
    tokens: PowerLaw
    warnings: list[str]


def fit_parabolas(points: Points, axis: Axis) -> IsoFlop:
    """Returns the parabolas and their laws. Raises ValueError where fewer than two budgets have a minimum."""
    parabolas, warnings = [], []
    for rows in budgets_of(points.flops):
        parabola, words = fit_parabola(getattr(points, axis)[rows], points.loss[rows], budget(points.flops[rows]))
        parabolas.append(parabola)
        warnings += [f"budget {parabola.flops:.3g}: {each}" for each in words]
    used = [each for each in parabolas if each.used]
    if len(used) < 2:
        what = f"needs two budgets with a minimum among their points, {len(used)} of {len(parabolas)} have one"
        raise ValueError("\n".join([f"scaling.method=parabolas: {what}; add runs or leave the method out", *warnings]))
    if len(used) < FEW_BUDGETS:
        warnings.append(f"only {len(used)} budgets: a power law through them says little of larger ones")
    flops, best = np.array([each.flops for each in used]), np.array([each.best for each in used])
    own, other = power_law(flops, best), power_law(flops, flops / (6 * best))
    params, tokens = (own, other) if axis == "params" else (other, own)
    return IsoFlop(axis, parabolas, params, tokens, warnings)


def budget(flops: np.ndarray) -> float:
    """Returns the budget of runs: the geometric mean of theirs."""
    return float(flops[0]) if (flops == flops[0]).all() else float(np.exp(np.log(flops).mean()))


def fit_parabola(sizes: np.ndarray, loss: np.ndarray, flops: float) -> tuple[Parabola, list[str]]:
    """Returns the parabola of one budget and what is doubtful about it. One is not used when it has fewer than three
    sizes, no minimum, or its minimum outside of the points."""
    x, count = np.log10(sizes), len(sizes)
    if len(np.unique(x)) < 3:
        words = f"{len(np.unique(x))} sizes give no parabola; the budget is left out, add runs"
        return Parabola(flops, count, (math.nan,) * 3, None, None, False), [words]
    center = x.mean()
    a, b, c = np.polyfit(x - center, loss, 2)
    quadratic = (float(a), float(b - 2 * a * center), float(c - b * center + a * center**2))
    words = [] if count >= FEW_POINTS else [f"{count} points give a parabola without any residual; add runs"]
    if a <= 0:
        return Parabola(flops, count, quadratic, None, None, False), [*words, "curves down; the budget is left out"]
    minimum = center - b / (2 * a)
    inside = x.min() <= minimum <= x.max()
    if not inside:
        words.append("the optimum lies outside of its points; the budget is left out, add runs on that side")
    elif min((x < minimum).sum(), (x > minimum).sum()) < SIDE:
        words.append(f"the optimum lies at the edge, fewer than {SIDE} points on one side; add runs there")
    best, lowest = 10.0**minimum, c - b**2 / (4 * a)
    return Parabola(flops, count, quadratic, float(best), float(lowest), bool(inside)), words


def power_law(flops: np.ndarray, values: np.ndarray) -> PowerLaw:
    """Returns the least-squares line through the logarithms."""
    x, y = np.log(flops), np.log(values)
    exponent = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return PowerLaw(float(np.exp(y.mean() - exponent * x.mean())), float(exponent))
