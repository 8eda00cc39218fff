"""Fits L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D (arXiv 2001.08361).

N there is without embeddings; here it is what the file holds. It has no irreducible loss: for large N and D it goes to
zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from llmtrain.scaling.laws.lbfgs import minimise
from llmtrain.scaling.laws.parametric import checked, huber
from llmtrain.scaling.laws.read import Points

STARTS = (np.arange(15, 50, 5), np.arange(15, 50, 5), (0.03, 0.08, 0.2, 0.5), (0.03, 0.08, 0.2, 0.5))
ITERATIONS = 1000


@dataclass(frozen=True)
class Kaplan:
    """Holds a fit. `objective` is the sum of Huber losses, as that of `parametric`."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float
    objective: float

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """Returns the loss at sizes and numbers of tokens."""
        return ((self.N_c / params) ** (self.alpha_N / self.alpha_D) + self.D_c / tokens) ** self.alpha_D


def fit_kaplan(points: Points) -> Kaplan:
    """Returns the lowest fit from a grid of starts. Raises ValueError for too few points."""
    checked(points, "kaplan")
    n, d, target = np.log(points.params), np.log(points.tokens), np.log(points.loss)
    log_nc, log_dc, alpha_n, alpha_d = np.array(list(product(*STARTS))).T
    starts = np.stack(
        [alpha_n * (log_nc - n.mean()), alpha_d * (log_dc - d.mean()), np.log(alpha_n), np.log(alpha_d)], 1
    )
    found = minimise(lambda x, _: objective(x, n - n.mean(), d - d.mean(), target), starts, ITERATIONS)
    best = int(np.nanargmin(found.values))
    u, v, *logs = found.points[best]
    alpha_N, alpha_D = (float(each) for each in np.exp(logs))
    N_c, D_c = np.exp(u / alpha_N + n.mean()), np.exp(v / alpha_D + d.mean())
    return Kaplan(float(N_c), float(D_c), alpha_N, alpha_D, float(found.values[best]))


def objective(x: np.ndarray, n: np.ndarray, d: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of Huber losses [S] and their gradients [S, 4] at (alpha_N log N_c, alpha_D log D_c,
    log alpha_N, log alpha_D) [S, 4]; log N_c and log D_c count from the zeros of n and d.

    With s = u - alpha_N n and t = v - alpha_D d, log L = alpha_D log(exp(s / alpha_D) + exp(t / alpha_D)).
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        u, v, alpha_n, alpha_d = x[:, :1], x[:, 1:2], np.exp(x[:, 2:3]), np.exp(x[:, 3:])
        s, t = u - alpha_n * n, v - alpha_d * d
        top = np.maximum(s, t)
        parts = np.exp((np.stack([s, t]) - top) / alpha_d)
        total = parts.sum(0)
        loss, slope = huber(top + alpha_d * np.log(total) - target)
        size, data = parts / total
        by_width = (
            alpha_d * np.log(total) - size * (s - top) - data * (t - top)
        )  # alpha_D as the width of the soft maximum
        gradient = [size, data, -size * alpha_n * n, by_width - data * alpha_d * d]
        return loss.sum(1), np.stack([(slope * each).sum(1) for each in gradient], 1)
