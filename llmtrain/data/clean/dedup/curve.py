"""Computes how likely MinHash with bands finds a pair, and draws it beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, NamedTuple

from llmtrain.observe.interval import wilson
from llmtrain.observe.plots import plot_measured


class Measured(NamedTuple):
    """Counts the pairs of about one similarity: how many there are, and how many share a band."""

    similarity: float
    pairs: int
    found: int


def probability(similarity: float, buckets: int, hashes: int) -> float:
    """Returns the probability that two documents of a Jaccard similarity share a band (arXiv 2107.06499, A)."""
    return 1 - (1 - similarity**hashes) ** buckets


def draw_curve(file: str | IO[bytes], buckets: int, hashes: int, measured: Sequence[Measured] = ()) -> None:
    """Writes a PNG, to a path or a file, with the curve, and with measured recalls and their intervals of 95 %."""
    curve = [(step / 200, probability(step / 200, buckets, hashes)) for step in range(201)]
    points = [(m.similarity, m.found / m.pairs, *wilson(m.found / m.pairs, m.pairs)) for m in measured]
    title = f"Share of pairs that {buckets} bands of {hashes} hashes find"
    plot_measured(file, title, "Jaccard similarity of shingles", curve, points)
