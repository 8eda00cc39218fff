"""Turns the scores of one prompt's samples into preference pairs and best samples, and compares two judges. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

Scores = Sequence[float | None]
"""Holds a judge's scores of the samples of one prompt; None: it has none."""


def ranking(scores: Scores, texts: Sequence[str], finished: Sequence[bool]) -> list[int]:
    """Returns the numbers of the samples that have a score, best first, of equal scores the earlier one before the
    later. Of equal texts there is one alone: the best of those that were not cut off, or else of all."""
    order = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: -scores[i])
    firsts: dict[str, int] = {}
    for i in sorted(order, key=lambda i: not finished[i]):
        firsts.setdefault(texts[i], i)
    return [i for i in order if firsts[texts[i]] == i]


def best_against_worst(
    scores: Scores, texts: Sequence[str], finished: Sequence[bool], most: int, tie: float
) -> list[tuple[int, int]]:
    """Returns at most `most` pairs (chosen, rejected): best against worst, second best against second worst, ...; then
    the best against other bad ones, and other good ones against the worst.

    Scores that differ by `tie` or less are a tie, and no pair. What was cut off is never chosen, as its row would teach
    to end there. Example: best_against_worst([1, 3, 2], ["a", "b", "c"], [True] * 3, 1, 0.0) -> [(1, 0)]
    """
    order = ranking(scores, texts, finished)
    good, bad = [i for i in order if finished[i]], order[::-1]
    pairs = [
        *zip(good, bad, strict=False),
        *((i, j) for i in good[:1] for j in bad),
        *((i, j) for i in good for j in bad[:1]),
    ]
    return [(i, j) for i, j in dict.fromkeys(pairs) if scores[i] - scores[j] > tie][:most]


def best_of(
    scores: Scores, texts: Sequence[str], finished: Sequence[bool], most: int, least: float | None
) -> list[int]:
    """Returns the numbers of at most `most` of the best samples that were not cut off, with a score of at least
    `least`."""
    order = (i for i in ranking(scores, texts, finished) if finished[i])
    return [i for i in order if least is None or scores[i] >= least][:most]


def agreement(scores: Scores, truth: Scores) -> tuple[float, int]:
    """Returns (how many pairs of samples a judge orders as the truth does, how many the truth orders). A tie of the
    judge counts half; a pair that one of them has no score for does not count."""
    agreed, count = 0.0, 0
    for i, j in combinations(range(len(scores)), 2):
        if None in (scores[i], scores[j], truth[i], truth[j]) or truth[i] == truth[j]:
            continue
        count += 1
        difference = (scores[i] - scores[j]) * (truth[i] - truth[j])
        agreed += 0.5 if difference == 0 else float(difference > 0)
    return agreed, count


def soft_label(chosen: float, rejected: float, scale: float) -> float:
    """Returns how sure a judge is that the chosen one is better: sigmoid((chosen - rejected) / scale)."""
    return 1 / (1 + math.exp(-min(700.0, (chosen - rejected) / scale)))


def votes(classes: Sequence[int | None]) -> list[float]:
    """Returns for each sample the share of all samples that give its answer; 0 for one without an answer.

    Example: votes([0, 1, 0, None]) -> [0.5, 0.25, 0.5, 0.0]
    """
    counts = Counter(classes)
    return [0.0 if own is None else counts[own] / len(classes) for own in classes]


def agrees_with_first(classes: Sequence[int | None]) -> list[float | None]:
    """Returns for each but the first whether it has the answer of the first, 1 or 0; None where that has none.

    Example: agrees_with_first([5, 5, 6, None]) -> [1.0, 0.0, 0.0]
    """
    first, *others = classes
    return [None if first is None else float(own == first) for own in others]
