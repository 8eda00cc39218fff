"""Fits L(N, D) = E + A / N^alpha + B / D^beta (arXiv 2203.15556, section 3.3).

Both ways minimise one objective: the sum over the points of the Huber loss (delta 1e-3) of log L(N, D) - log loss. Its
sum, not its mean: the mean's gradients are so small that an optimiser stops early (arXiv 2404.10102).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from llmtrain.scaling.laws.lbfgs import Minima, minimise
from llmtrain.scaling.laws.parabolas import PowerLaw
from llmtrain.scaling.laws.read import Points

DELTA = 1e-3
ALPHAS = np.arange(0, 2.01, 0.5)  # and betas, of the grid of starts
OFFSETS = np.arange(-1, 1.01, 0.5)  # log E
FACTORS = np.arange(0, 25.01, 5)  # log A, log B
FIRST, LAST, KEPT = 60, 3000, 100  # iterations of all starts, and of the KEPT best ones
LEAST = 6  # points, for five parameters
LARGEST = 300.0  # of the logarithm of a best size


@dataclass(frozen=True)
class Parametric:
    """Holds a fit. `objective` is the sum of Huber losses."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float

    @property
    def has_optimum(self) -> bool:
        """Says whether the loss falls with size and with tokens, so that a budget has a best size that is a number."""
        if min(self.A, self.B, self.alpha, self.beta) <= 0:
            return False
        log = math.log
        ratio = log(self.alpha) + log(self.A) - log(self.beta) - log(self.B)
        return abs(ratio) < LARGEST * (self.alpha + self.beta)  # no infinity either

    @property
    def params_exponent(self) -> float:
        """Returns a = beta / (alpha + beta), of N* = G (C / 6)^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def params(self) -> PowerLaw:
        """Returns the law of the best size, of C = 6 N D."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return PowerLaw(G * 6**-self.params_exponent, self.params_exponent)

    @property
    def tokens(self) -> PowerLaw:
        """Returns the law of the best number of tokens, of C = 6 N D."""
        law = self.params
        return PowerLaw(1 / (6 * law.coefficient), 1 - law.exponent)

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """Returns the loss at sizes and numbers of tokens."""
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta


def huber(residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the Huber loss with DELTA and its slope."""
    slope = np.clip(residual, -DELTA, DELTA)
    return slope * (residual - slope / 2), slope


def grid() -> np.ndarray:
    """Returns the 4,500 starts [S, 5] of (log E, log A, log B, alpha, beta)."""
    return np.array(list(product(OFFSETS, FACTORS, FACTORS, ALPHAS, ALPHAS)))


def fit_parametric(points: Points, starts: np.ndarray | None = None) -> Parametric:
    """Returns the lowest fit that L-BFGS reaches from the grid, or from other `starts` [S, 5]. All starts get FIRST
    iterations, the KEPT best of them LAST more. Raises ValueError for fewer than LEAST points."""
    checked(points, "parametric")
    found = _from(points, grid() if starts is None else starts)
    best = int(np.nanargmin(found.values))
    return _result(found.points[best], found.values[best])


def refit(points: Points, counts: np.ndarray, start: Parametric) -> list[Parametric]:
    """Returns a fit for each row of `counts` [R, points], which says how often a point is drawn, from one start."""
    starts = np.repeat(_vector(start)[None], len(counts), 0)
    found = _from(points, starts, counts)
    return [_result(x, f) for x, f in zip(found.points, found.values, strict=True)]


def checked(points: Points, method: str) -> None:
    """Raises ValueError where the points are too few, or all of one size or one number of tokens."""
    if len(points) < LEAST:
        raise ValueError(f"scaling.method={method}: {len(points)} points, needs at least {LEAST}; add runs")
    for axis in ("params", "tokens"):
        if len(np.unique(getattr(points, axis))) < 3:
            raise ValueError(
                f"scaling.method={method}: fewer than 3 values of {axis} tell nothing of its law; add runs"
            )


def _vector(fit: Parametric) -> np.ndarray:
    return np.array([np.log(fit.E), np.log(fit.A), np.log(fit.B), fit.alpha, fit.beta])


def _result(x: np.ndarray, value: float) -> Parametric:
    with np.errstate(over="ignore"):  # what is infinite has no optimum
        E, A, B = (float(each) for each in np.exp(x[:3]))
    return Parametric(E, A, B, float(x[3]), float(x[4]), float(value))


def _from(points: Points, starts: np.ndarray, counts: np.ndarray | None = None) -> Minima:
    """Returns where the starts lead. log N and log D are centred meanwhile, which makes the factors nearly independent
    of the exponents."""
    n, d, target = np.log(points.params), np.log(points.tokens), np.log(points.loss)
    centers = np.array([n.mean(), d.mean()])
    n, d = n - centers[0], d - centers[1]

    def function(x: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = 1.0 if counts is None else counts[numbers]
        return objective(x, n, d, target, weights)

    x = starts.copy()
    x[:, 1:3] -= starts[:, 3:] * centers
    if counts is None and len(x) > KEPT:
        first = minimise(function, x, FIRST)
        x = first.points[np.argsort(first.values)[:KEPT]]
    found = minimise(function, x, LAST)
    found.points[:, 1:3] += found.points[:, 3:] * centers
    return found


def objective(
    x: np.ndarray, n: np.ndarray, d: np.ndarray, target: np.ndarray, weights: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of Huber losses [S] and their gradients [S, 5] at (log E, log A, log B, alpha, beta) [S, 5].

    n, d, target: logarithms of sizes, tokens and losses [points]; weights: [S, points] or one for all.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.stack(
            [
                np.broadcast_to(x[:, :1], (len(x), len(n))),
                x[:, 1:2] - x[:, 3:4] * n,
                x[:, 2:3] - x[:, 4:5] * d,
            ]
        )
        top = terms.max(0)
        parts = np.exp(terms - top)
        total = parts.sum(0)
        loss, slope = huber(top + np.log(total) - target)
        each = weights * slope * parts / total
        size, data = each[1], each[2]
        gradient = np.stack([*each.sum(2), -(size * n).sum(1), -(data * d).sum(1)], 1)
        return (weights * loss).sum(1), gradient
