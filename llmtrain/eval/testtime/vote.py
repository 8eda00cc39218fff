"""Computes how often a vote among n of N samples is right, over all subsets and not over one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb
from statistics import fmean

import numpy as np

TIE = 1e-9  # sums of weights that differ by this share are equal: rounding of float64 in any order of adding


def majority_accuracy(answers: Sequence[int | None], right: Sequence[bool], sizes: Sequence[int]) -> list[float]:
    """Returns for each n of `sizes` the chance that the most frequent answer among n of the samples is right, the mean
    over all C(N, n) subsets (self-consistency, arXiv 2203.11171); exact.

    Equal answers have equal numbers, None is no answer and has no vote. Answers that tie share the subset evenly. An
    answer is right by the share of its samples that were judged so, 0 or 1 where the scorer did not fail. It is what
    `passk.majority` expects over all orders of the samples.

    majority_accuracy([0, 0, 1], [True, True, False], [1, 2, 3]) = [2/3, 2/3, 1]: of two samples {0, 0} is right and
    the others tie.
    """
    counts, share = Counter(a for a in answers if a is not None), shares(answers, right)
    found, most = [0.0] * len(sizes), max(sizes)
    for k in range(1, min(most, max(counts.values(), default=0)) + 1):
        large = [(count, share[answer]) for answer, count in counts.items() if count >= k]
        free = len(answers) - sum(count for count, _ in large)  # of which no subset holds k equal answers
        won = _won(k, large, most)
        for i, n in enumerate(sizes):
            found[i] += sum(float(won[s]) * comb(free, n - s) for s in range(k, n + 1)) / comb(len(answers), n)
    return found


def shares(answers: Sequence[int | None], right: Sequence[bool]) -> dict[int, float]:
    """Returns the share of the samples of each answer that were judged right."""
    judged: dict[int, list[bool]] = {}
    for answer, verdict in zip(answers, right, strict=True):
        if answer is not None:
            judged.setdefault(answer, []).append(verdict)
    return {answer: fmean(own) for answer, own in judged.items()}


def _won(k: int, large: Iterable[tuple[int, float]], most: int) -> np.ndarray:
    """Returns for s = 0 .. most in how many ways s samples of the answers (count, share right) hold k of one and more
    of none, each way multiplied by the mean share of those that have k.

    `ways[t, s]` are those in which t answers have k, `credit[t, s]` the same with the shares of the t answers added.
    """
    large = list(large)
    ways = np.zeros((min(len(large), most // k) + 1, most + 1))
    ways[0, 0], credit = 1.0, np.zeros_like(ways)
    for count, share in large:
        old_ways, old_credit = ways, credit
        ways, credit = np.zeros_like(ways), np.zeros_like(ways)
        for i in range(k):
            ways[:, i:] += comb(count, i) * old_ways[:, : most + 1 - i]
            credit[:, i:] += comb(count, i) * old_credit[:, : most + 1 - i]
        ways[1:, k:] += comb(count, k) * old_ways[:-1, :-k]
        credit[1:, k:] += comb(count, k) * (old_credit + share * old_ways)[:-1, :-k]
    tied = np.arange(1, len(ways))[:, None]
    return (credit[1:] / tied).sum(0)


def weighted_accuracy(
    answers: Sequence[int | None],
    weights: Sequence[float],
    right: Sequence[bool],
    sizes: Sequence[int],
    subsets: int,
    seed: int,
) -> list[tuple[float, float]]:
    """Returns for each n of `sizes` the chance that the answer with the largest sum of weights among n of the samples
    is right, and the variance of that number: 0 where all C(N, n) subsets, at most `subsets`, were looked at, else that
    of the mean over `subsets` random ones.

    Answers, ties and who is right are as in `majority_accuracy`; a sum of 0 can win. `weights` are at least 0.
    """
    share, rng = shares(answers, right), np.random.default_rng(seed)
    if not share:
        return [(0.0, 0.0)] * len(sizes)
    votes = np.array([[a == answer for answer in share] for a in answers], dtype=float)
    table, verdicts = votes * np.asarray(weights)[:, None], np.array(list(share.values()))
    found = []
    for n in sizes:
        chosen, every = subsets_of(len(answers), n, subsets, rng)
        there = chosen @ votes > 0
        sums = np.where(there, chosen @ table, -1.0)
        best = there & (sums >= sums.max(1, keepdims=True) * (1 - TIE))
        credit = (best @ verdicts) / np.maximum(best.sum(1), 1)
        found.append((float(credit.mean()), 0.0 if every else float(credit.var(ddof=1)) / len(chosen)))
    return found


def subsets_of(total: int, n: int, most: int, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """Returns subsets of n of `total` as rows of ones and zeros [S, total], and whether they are all: all where there
    are at most `most`, else `most` random ones, each as likely as any other."""
    every = comb(total, n) <= most
    drawn = list(combinations(range(total), n)) if every else rng.random((most, total)).argsort(1)[:, :n]
    chosen = np.zeros((len(drawn), total))
    np.put_along_axis(chosen, np.asarray(drawn), 1.0, axis=1)
    return chosen, every
