"""Makes points of accuracy against tokens spent out of what each problem gave."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from llmtrain.eval.intervals import bootstrap

Line = tuple[str, dict[str, Any]]
"""Holds the name of a line of the plot, and one of its points."""


def point(tokens: Sequence[float], accuracy: Sequence[float], seed: int, **about: Any) -> dict[str, Any]:
    """Returns `about` with the means over the problems of tokens spent and accuracy, and the 95 % interval of the
    accuracy."""
    interval = bootstrap({"accuracy": accuracy}, seed)["accuracy"]
    return {**about, "tokens": fmean(tokens), "accuracy": fmean(accuracy), "interval": interval}


def rows_of(values: Sequence[Any], width: int) -> list[Sequence[Any]]:
    """Returns rows of `width` values. rows_of([1, 2, 3, 4], 2) = [[1, 2], [3, 4]]"""
    return [values[i : i + width] for i in range(0, len(values), width)]
