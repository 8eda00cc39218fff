"""Draws points again for intervals (Efron 1979): with replacement, within each budget, so that none gets lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARE = 95.0  # per cent of the fits that an interval holds
FEWEST = 20  # fits that an interval needs


def drawn_rows(groups: Sequence[np.ndarray], times: int, seed: int) -> np.ndarray:
    """Returns rows [times, points], each as many of a group as it has."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.choice(group, (times, len(group))) for group in groups], axis=1)


def counts_of(rows: np.ndarray, points: int) -> np.ndarray:
    """Returns how often each point is drawn, [times, points]."""
    return np.stack([np.bincount(each, minlength=points) for each in rows]).astype(float)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the ends of the middle SHARE of values; None for fewer than FEWEST."""
    if len(values) < FEWEST:
        return None
    low, high = np.percentile(values, [(100 - SHARE) / 2, (100 + SHARE) / 2])
    return float(low), float(high)
