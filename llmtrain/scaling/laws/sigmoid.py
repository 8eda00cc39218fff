"""Fits reward against compute: R(C) = R_0 + (R_max - R_0) / (1 + (C_mid / C)^slope) (arXiv 2510.13786, equation 1).

R_0 is the reward without compute, R_max the asymptote, C_mid the compute at half the gain. For given slope and C_mid
the curve is linear in R_0 and R_max; a grid over these two that closes in finds the least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST = 5  # points, for four parameters
SIDE, ZOOMS, CLOSER = 25, 12, 0.4
STEEPEST, FLATTEST = 10.0, 0.1
BEYOND = 2.0  # C_mid lies within the points' range of log compute, or as much as this many times its width above
NEAR = 0.9  # share of the gain that a point has to reach


@dataclass(frozen=True)
class Sigmoid:
    """Holds a fit."""

    R_0: float
    R_max: float
    C_mid: float
    slope: float
    squares: float  # sum of squared residuals

    def reward(self, compute: np.ndarray | float) -> np.ndarray | float:
        """Returns the reward at a compute."""
        return self.R_0 + (self.R_max - self.R_0) / (1 + (self.C_mid / compute) ** self.slope)


def fit_sigmoid(compute: np.ndarray, reward: np.ndarray) -> tuple[Sigmoid, list[str]]:
    """Returns the fit and what is doubtful about it. Raises ValueError for too few points."""
    if len(np.unique(compute)) < LEAST:
        raise ValueError(
            f"scaling.method=sigmoid: {len(np.unique(compute))} values of compute, needs at least {LEAST}; add points"
        )
    fit = refit_sigmoid(compute, reward, np.ones((1, len(compute))))[0]
    reached = 1 / (1 + (fit.C_mid / compute.max()) ** fit.slope)
    words = []
    if reached < NEAR:
        words.append(f"the last point has {reached:.0%} of the gain: the asymptote is extrapolated, add compute")
    if fit.C_mid <= compute.min() * 1.001:
        words.append("half of the gain lies before the first point: R_0 is extrapolated, add points of less compute")
    if fit.slope >= STEEPEST * 0.99 or fit.slope <= FLATTEST * 1.01:
        words.append(f"slope {fit.slope:.3g} is at the end of {FLATTEST:g} to {STEEPEST:g}: the points show no sigmoid")
    return fit, words


def refit_sigmoid(compute: np.ndarray, reward: np.ndarray, counts: np.ndarray) -> list[Sigmoid]:
    """Returns a fit for each row of `counts` [R, points], which says how often a point is drawn."""
    x = np.log(compute)
    middle = (x.min(), x.max() + BEYOND * (x.max() - x.min()))
    steepness = (np.log(FLATTEST), np.log(STEEPEST))
    return [_closest(x, reward, weights, np.array([middle, steepness])) for weights in counts]


def _closest(x: np.ndarray, reward: np.ndarray, weights: np.ndarray, bounds: np.ndarray) -> Sigmoid:
    center, half = bounds.mean(1), (bounds[:, 1] - bounds[:, 0]) / 2
    for _ in range(ZOOMS):
        low, high = np.maximum(bounds[:, 0], center - half), np.minimum(bounds[:, 1], center + half)
        pairs = np.stack(np.meshgrid(*np.linspace(low, high, SIDE).T, indexing="ij"), -1).reshape(-1, 2)
        shares = 1 / (1 + np.exp(np.clip(np.exp(pairs[:, 1:]) * (pairs[:, :1] - x), -700, 700)))
        start, gain, squares = _lines(shares, reward, weights)
        best = int(np.argmin(squares))
        center, half = pairs[best], half * CLOSER
    slope, middle = float(np.exp(center[1])), float(np.exp(center[0]))
    return Sigmoid(float(start[best]), float(start[best] + gain[best]), middle, slope, float(squares[best]))


def _lines(shares: np.ndarray, reward: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (offsets, slopes, sums of squares) [S] of the weighted lines through reward over shares [S, points]."""
    total = weights.sum()
    x, y = (shares * weights).sum(1, keepdims=True) / total, (reward * weights).sum() / total
    spread = (weights * (shares - x) ** 2).sum(1)
    gain = (weights * (shares - x) * (reward - y)).sum(1) / np.maximum(spread, 1e-30)
    start = y - gain * x[:, 0]
    squares = (weights * (reward - start[:, None] - gain[:, None] * shares) ** 2).sum(1)
    return start, gain, squares
