"""Computes how often the best of n of N samples is right, over all subsets and not over one of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import comb, inf
from statistics import fmean


def best_of_accuracy(scores: Sequence[float | None], right: Sequence[bool], sizes: Sequence[int]) -> list[float]:
    """Returns for each n of `sizes` the chance that the best by score of n of the samples, drawn without putting back,
    is right; exact.

    Equal scores share the place evenly; None, where a scorer failed, is below all scores. With the samples in falling
    order, those at places a .. b - 1 tie, and hold the best with probability [C(N - a, n) - C(N - b, n)] / C(N, n).

    best_of_accuracy([3, 2, 1], [False, True, True], [1, 2, 3]) = [2/3, 1/3, 0]
    """
    ranked = sorted(zip(scores, right, strict=True), key=rank, reverse=True)
    found, above, total = [0.0] * len(sizes), 0, len(ranked)
    for _, tied in groupby(ranked, key=rank):
        verdicts = [verdict for _, verdict in tied]
        upto = above + len(verdicts)
        for i, n in enumerate(sizes):
            found[i] += fmean(verdicts) * (comb(total - above, n) - comb(total - upto, n)) / comb(total, n)
        above = upto
    return found


def rank(scored: tuple[float | None, bool]) -> float:
    """Returns the place of a sample by its score alone."""
    return -inf if scored[0] is None else scored[0]
