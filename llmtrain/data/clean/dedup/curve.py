"""Computes how likely MinHash with bands finds a pair, and draws it beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from llmtrain.observe.plots import plot_measured


class Measured(NamedTuple):
    """Counts the pairs of about one similarity: how many there are, and how many share a band."""

    similarity: float
    pairs: int
    found: int


def probability(similarity: float, buckets: int, hashes: int) -> float:
    """Returns the probability that two documents of a Jaccard similarity share a band (arXiv 2107.06499, A)."""
    return 1 - (1 - similarity**hashes) ** buckets


def threshold(buckets: int, hashes: int) -> float:
    """Returns the similarity near which the curve is steepest, (1 / buckets)^(1 / hashes): 0.719 for 14 x 8."""
    return (1 / buckets) ** (1 / hashes)


def interval(found: int, pairs: int, z: float = 1.96) -> tuple[float, float]:
    """Returns Wilson's interval of a share, of 95 % by default (Wilson, 1927)."""
    share, spread = found / pairs, z * z / pairs
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / pairs + spread / (4 * pairs))
    return max(0.0, middle - half), min(1.0, middle + half)


def draw_curve(path: str, buckets: int, hashes: int, measured: Sequence[Measured] = ()) -> None:
    """Writes a PNG with the curve, and with measured recalls and their intervals of 95 %."""
    curve = [(step / 200, probability(step / 200, buckets, hashes)) for step in range(201)]
    points = [(m.similarity, m.found / m.pairs, *interval(m.found, m.pairs)) for m in measured]
    title = f"Share of pairs that {buckets} bands of {hashes} hashes find"
    plot_measured(path, title, "Jaccard similarity of shingles", curve, points)
