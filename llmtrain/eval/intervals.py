"""Computes how sure a mean over problems is: bootstrap intervals. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
AT_ONCE = 50  # resamples whose counts are held together


def bootstrap(values: Mapping[str, Sequence[float]], seed: int = 0) -> dict[str, list[float]]:
    """Returns the ends [low, high] of the 95 % interval of the mean of each measure, by its name.

    `values` holds for each measure one value a problem, in the same order. Problems are drawn with replacement, 1,000
    times, the same ones for all measures, and the ends are the 2.5 and 97.5 percentiles of the means (Efron, Annals of
    Statistics 7, 1979). Returns {} without measures. Raises ValueError when their lengths differ, or are 0.
    """
    if not values:
        return {}
    table = np.array(list(values.values()), np.float64)  # raises where lengths differ
    count = table.shape[1]
    if count == 0:
        raise ValueError("an interval needs at least one problem")
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // AT_ONCE):
        counts = rng.multinomial(count, np.full(count, 1 / count), AT_ONCE)  # how often each problem is drawn
        means.append(counts @ table.T / count)
    ends = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: [float(low), float(high)] for name, low, high in zip(values, *ends, strict=True)}
