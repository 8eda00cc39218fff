"""Fits logistic regression over hashed words, and measures it: numpy only, the same bits for the same input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain.data.clean.ngrams import WORD, ngram_hashes, word_hashes
from llmtrain.observe.interval import wilson


@dataclass(frozen=True)
class Rows:
    """Holds sparse rows one after the other: row i is what lies from starts[i] to starts[i + 1]."""

    columns: np.ndarray
    values: np.ndarray
    starts: np.ndarray

    def times(self, weights: np.ndarray) -> np.ndarray:
        """Returns the product of every row with the weights."""
        sums = np.concatenate([[0.0], np.cumsum(self.values * weights[self.columns])])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    def transposed_times(self, factors: np.ndarray, columns: int) -> np.ndarray:
        """Returns the sum of all rows, each times its factor, as `columns` numbers."""
        each = np.repeat(factors, np.diff(self.starts))
        return np.bincount(self.columns, weights=each * self.values, minlength=columns)


@dataclass(frozen=True)
class Fit:
    """Holds a fitted model: score = sigmoid(weights x features + bias)."""

    weights: np.ndarray
    bias: float
    iterations: int
    gradient: float  # the largest entry of the gradient where it stopped


def features(text: str, buckets: int, max_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the buckets of a text's words and pairs of words, and sqrt(share) of each, a vector of length 1."""
    words = [match[0] for match, _ in zip(WORD.finditer(text), range(max_words), strict=False)]
    hashes = word_hashes(words)
    both = np.concatenate([hashes, ngram_hashes(hashes, 2)])
    # the upper half, as it depends on all bits of both words
    columns, counts = np.unique((both >> np.uint64(32)) % np.uint64(buckets), return_counts=True)
    return columns.astype(np.int64), np.sqrt(counts / max(1, counts.sum()))


def rows_of(texts: Sequence[str], buckets: int, max_words: int) -> Rows:
    """Returns the features of texts, a row each."""
    found = [features(text, buckets, max_words) for text in texts]
    starts = np.cumsum([0, *(len(columns) for columns, _ in found)])
    return Rows(np.concatenate([c for c, _ in found]), np.concatenate([v for _, v in found]), starts)


def fit(rows: Rows, good: np.ndarray, buckets: int, l2: float, tolerance: float = 1e-6, most: int = 5000) -> Fit:
    """Returns the minimum of the mean logistic loss, both classes weighing the same, plus l2 / 2 |weights|^2.

    Accelerated gradient descent that restarts where it overshoots (O'Donoghue and Candes 2015, arXiv 1204.3982), of
    step 1 / L: the loss of rows of length 1 with a bias has L = 1/2 + l2 at most.
    """
    signs = np.where(good, 1.0, -1.0)
    shares = np.where(good, 0.5 / good.sum(), 0.5 / (~good).sum())
    point, ahead, momentum = np.zeros(buckets + 1), np.zeros(buckets + 1), 1.0  # the bias is the last
    iteration, steepest = 0, float("inf")
    while iteration < most:
        iteration += 1
        margins = signs * (rows.times(ahead[:-1]) + ahead[-1])
        factors = -signs * shares * sigmoid(-margins)
        gradient = np.append(rows.transposed_times(factors, buckets) + l2 * ahead[:-1], factors.sum())
        steepest = float(np.abs(gradient).max())
        if steepest < tolerance:
            break
        last, point = point, ahead - gradient / (0.5 + l2)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        overshot = gradient @ (point - last) > 0
        ahead = point if overshot else point + (momentum - 1) / following * (point - last)
        momentum = 1.0 if overshot else following
    return Fit(ahead[:-1], float(ahead[-1]), iteration, steepest)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Returns 1 / (1 + exp(-value)), without overflow."""
    return np.exp(-np.logaddexp(0.0, -values))


def auc(good: np.ndarray, bad: np.ndarray) -> float:
    """Returns the chance that a good score is above a bad one, ties counting half: auc([2, 3], [1, 2]) = 3.5 / 4."""
    ordered = np.sort(bad)
    wins = np.searchsorted(ordered, good, "left") + np.searchsorted(ordered, good, "right")
    return float(wins.sum() / (2 * len(good) * len(bad)))


def auc_interval(area: float, good: int, bad: int) -> tuple[float, float]:
    """Returns 95 % bounds of an AUC: Wilson's, of as many trials as the smaller class has scores. It is too wide rather
    than too narrow, as the variance is at most area (1 - area) / min(good, bad) (Birnbaum and Klose 1957)."""
    return wilson(area, min(good, bad))
