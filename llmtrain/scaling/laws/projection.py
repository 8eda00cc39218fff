"""Fits the parametric law by variable projection (Golub and Pereyra 1973): no starts, one search over two exponents.

For given alpha and beta the law is linear in E, A and B. Reweighted least squares on the linearised logarithm gives the
three of least Huber loss; what is left is a function of two variables, which a grid that closes in finds. It minimises
the objective of `parametric`, so that the two fits check each other.
"""

from __future__ import annotations

import numpy as np

from llmtrain.scaling.laws.parametric import DELTA, Parametric, checked, huber
from llmtrain.scaling.laws.read import Points

LOW, HIGH = 0.02, 2.0  # exponents that are looked at
SIDE = 15  # values of each exponent in a grid
ZOOMS, CLOSER = 14, 0.5  # grids, and the width of each as a share of the one before
ROUNDS, LAST = 40, 2000  # reweightings, and those of the last fit


def fit_projection(points: Points) -> Parametric:
    """Returns the fit of least objective. Raises ValueError for too few points."""
    checked(points, "projection")
    center, half = np.full(2, (LOW + HIGH) / 2), (HIGH - LOW) / 2
    for _ in range(ZOOMS):
        sides = [np.linspace(max(LOW, c - half), min(HIGH, c + half), SIDE) for c in center]
        exponents = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2)
        _, values = project(points, exponents, ROUNDS)
        center, half = exponents[np.argmin(values)], half * CLOSER
    factors, values = project(points, center[None], LAST)
    E, A, B = (float(each) for each in factors[0])
    return Parametric(E, A, B, float(center[0]), float(center[1]), float(values[0]))


def project(points: Points, exponents: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (E, A, B) [S, 3] of least objective, none negative, and the objectives [S], at (alpha, beta) [S, 2]."""
    n, d, target = np.log(points.params), np.log(points.tokens), np.log(points.loss)
    centers = np.array([n.mean(), d.mean()])
    basis = np.stack(
        [
            np.ones((len(exponents), len(n))),
            np.exp(-exponents[:, :1] * (n - centers[0])),
            np.exp(-exponents[:, 1:] * (d - centers[1])),
        ],
        -1,
    )  # [S, points, 3]
    x = np.repeat(points.loss.mean()[None, None] / np.array([[2.0, 4.0, 4.0]]), len(exponents), 0)
    best, lowest = x, np.full(len(x), np.inf)
    for _ in range(rounds):
        value = (basis * x[:, None]).sum(-1)
        residual = np.log(value) - target
        loss = huber(residual)[0].sum(1)
        lower = loss < lowest
        best, lowest = np.where(lower[:, None], x, best), np.where(lower, loss, lowest)
        x = _reweighted(basis / value[..., None], residual, x)
    return best * np.exp(np.pad(exponents * centers, ((0, 0), (1, 0)))), lowest


def _reweighted(slopes: np.ndarray, residual: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns the factors after one step of least squares, with weights that make squares Huber losses. A step that
    would make a factor negative brings it a tenth of the way to zero."""
    weighted = slopes / np.maximum(1.0, np.abs(residual) / DELTA)[..., None]
    normal = np.einsum("spi,spj->sij", weighted, slopes)
    normal += 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    step = np.linalg.solve(normal, np.einsum("spi,sp->si", weighted, -residual)[..., None])[..., 0]
    return np.maximum(x + step, 0.1 * x)
