"""Minimises a function from many starts at once, by L-BFGS (Nocedal and Wright, Numerical Optimization)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Function = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Returns values [S] and gradients [S, P] at points [S, P]; the second argument are the numbers [S] of their starts."""

MEMORY = 10  # pairs of steps and changes of the gradient
ARMIJO, WOLFE = 1e-4, 0.9
SEARCHES = 30  # evaluations in one line search


class Minima(NamedTuple):
    """Holds the end of every start."""

    points: np.ndarray  # [S, P]
    values: np.ndarray  # [S]
    steepest: np.ndarray  # [S], largest component of the gradient


def minimise(function: Function, starts: np.ndarray, iterations: int = 500, tolerance: float = 1e-9) -> Minima:
    """Returns the minima that the starts [S, P] lead to. A start rests when no component of its gradient exceeds
    `tolerance`, when a line search finds nothing lower, or after `iterations`."""
    x = np.array(starts, dtype=np.float64)
    f, g = function(x, np.arange(len(x)))
    steps, changes = (np.zeros((len(x), MEMORY, x.shape[1])) for _ in range(2))
    active = np.flatnonzero(np.abs(g).max(1) > tolerance)
    for _ in range(iterations):
        if not len(active):
            break
        d = -_product(g[active], steps[active], changes[active])
        downhill = (d * g[active]).sum(1) < 0
        d = np.where(downhill[:, None], d, -g[active])
        new_x, new_f, new_g = _search(function, x[active], f[active], g[active], d, active)
        _remember(steps, changes, active, new_x - x[active], new_g - g[active])
        moved = new_f < f[active]
        x[active], f[active], g[active] = new_x, new_f, new_g
        active = active[moved & (np.abs(new_g).max(1) > tolerance)]
    return Minima(x, f, np.abs(g).max(1))


def _remember(steps: np.ndarray, changes: np.ndarray, active: np.ndarray, step: np.ndarray, change: np.ndarray) -> None:
    """Puts the newest pair first where the curvature along it is positive."""
    rows, good = active, (step * change).sum(1) > 1e-14 * np.linalg.norm(step, axis=1) * np.linalg.norm(change, axis=1)
    for memory, value in ((steps, step), (changes, change)):
        memory[rows[good], 1:] = memory[rows[good], :-1]
        memory[rows[good], 0] = value[good]


def _product(g: np.ndarray, steps: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Returns the inverse Hessian times the gradients, by the two loops over the remembered pairs."""
    curvature = (steps * changes).sum(2)
    inverse = np.divide(1.0, curvature, out=np.zeros_like(curvature), where=curvature > 0)
    q, shares = g.copy(), np.zeros(inverse.shape)
    for i in range(MEMORY):
        shares[:, i] = inverse[:, i] * (steps[:, i] * q).sum(1)
        q -= shares[:, i, None] * changes[:, i]
    norm = (changes[:, 0] ** 2).sum(1)
    first = 1 / np.maximum(1.0, np.linalg.norm(g, axis=1))  # without pairs: a step of length 1 at most
    q *= np.divide(curvature[:, 0], norm, out=first, where=norm > 0)[:, None]
    for i in reversed(range(MEMORY)):
        q += steps[:, i] * (shares[:, i] - inverse[:, i] * (changes[:, i] * q).sum(1))[:, None]
    return q


def _search(
    function: Function, x: np.ndarray, f: np.ndarray, g: np.ndarray, d: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns points along the directions `d` that meet Wolfe's weak conditions, by bisection; where there is none
    after SEARCHES trials, the lowest one seen."""
    low, high, t = np.zeros(len(x)), np.full(len(x), np.inf), np.ones(len(x))
    slope = (g * d).sum(1)
    best = (x.copy(), f.copy(), g.copy())
    todo = np.arange(len(x))
    for _ in range(SEARCHES):
        trial = x[todo] + t[todo, None] * d[todo]
        new_f, new_g = function(trial, numbers[todo])
        lower = new_f < best[1][todo]
        for kept, new in zip(best, (trial, new_f, new_g), strict=True):
            kept[todo[lower]] = new[lower]
        far = ~(new_f <= f[todo] + ARMIJO * t[todo] * slope[todo])  # not a number is too far as well
        with np.errstate(over="ignore", invalid="ignore"):  # of points that are too far anyway
            near = ~far & ((new_g * d[todo]).sum(1) < WOLFE * slope[todo])
        high[todo[far]], low[todo[near]] = t[todo[far]], t[todo[near]]
        todo = todo[far | near]
        if not len(todo):
            break
        t[todo] = np.where(np.isinf(high[todo]), 2 * low[todo], (low[todo] + high[todo]) / 2)
    return best
