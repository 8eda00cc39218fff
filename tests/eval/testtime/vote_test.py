from __future__ import annotations

import random
from itertools import combinations, permutations
from math import comb
from statistics import fmean

import pytest

from llmtrain.eval.passk import majority
from llmtrain.eval.testtime.vote import majority_accuracy, weighted_accuracy

ANSWERS = [0, 0, 1, None]
RIGHT = [True, True, False, False]


def test_majority_by_hand() -> None:
    # n = 1: two of four are 0. n = 2, six pairs: 00 right; 01, 01 tie; 0-, 0- right; 1- wrong: (1 + 2/2 + 2) / 6.
    # n = 3, four triples: 001 right; 00- right; 01-, 01- tie: (2 + 2/2) / 4. n = 4: 0 wins.
    assert majority_accuracy(ANSWERS, RIGHT, [1, 2, 3, 4]) == pytest.approx([0.5, 4 / 6, 0.75, 1.0])


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ([0, 1, 2], [False, False, False], [0, 0, 0]),
        ([5, 5, 5], [True, True, True], [1, 1, 1]),
        ([None, None, None], [False, True, True], [0, 0, 0]),  # without an answer none is right
        ([7, None, None], [True, False, False], [1 / 3, 2 / 3, 1]),  # a lone answer wins wherever it is
        ([0, 0, 0], [True, True, False], [2 / 3, 2 / 3, 2 / 3]),  # the scorer failed on one
    ],
)
def test_odd_votes(answers: list[int | None], right: list[bool], expected: list[float]) -> None:
    assert majority_accuracy(answers, right, [1, 2, 3]) == pytest.approx(expected)
    drawn = weighted_accuracy(answers, [1.0] * 3, right, [1, 2, 3], subsets=10, seed=0)
    assert [mean for mean, _ in drawn] == pytest.approx(expected) and all(error == 0 for _, error in drawn)


def test_majority_is_the_mean_over_all_orders() -> None:
    rng = random.Random(1)
    for _ in range(60):
        total = rng.randint(1, 6)
        answers = [rng.choice([None, 0, 1, 2]) for _ in range(total)]
        verdict = {0: rng.random() < 0.5, 1: rng.random() < 0.5, 2: rng.random() < 0.5, None: False}
        right, sizes = [verdict[a] for a in answers], list(range(1, total + 1))
        for n, found in zip(sizes, majority_accuracy(answers, right, sizes), strict=True):
            winners = [(p, majority([answers[i] for i in p])) for p in permutations(range(total), n)]
            expected = fmean(w is not None and right[p[w]] for p, w in winners)
            assert found == pytest.approx(expected), (answers, right, n)


def test_majority_of_many_samples_needs_no_subsets() -> None:
    # 40 right against 24 wrong ones that differ: 32 of them hold none of the right with C(24, 32) = 0 subsets
    answers, right = [0] * 40 + list(range(1, 25)), [True] * 40 + [False] * 24
    assert majority_accuracy(answers, right, [1, 2, 32, 64]) == pytest.approx(
        [40 / 64, (comb(40, 2) + 40 * 24 / 2) / comb(64, 2), 1.0, 1.0]
    )


def test_weighted_by_hand() -> None:
    # weights 1, 1 of the right answer against 3: of two samples {0, 0} alone is right, of three none
    assert weighted_accuracy([0, 0, 1], [1.0, 1.0, 3.0], [True, True, False], [1, 2, 3], 100, 0) == [
        (pytest.approx(2 / 3), 0.0),
        (pytest.approx(1 / 3), 0.0),
        (0.0, 0.0),
    ]
    # sums that differ by rounding tie: 0.1 + 0.2 against 0.3; and so do answers that weigh nothing
    assert weighted_accuracy([0, 0, 1], [0.1, 0.2, 0.3], [True, True, False], [3], 100, 0) == [(0.5, 0.0)]
    assert weighted_accuracy([0, 1], [0.0, 0.0], [True, False], [2], 100, 0) == [(0.5, 0.0)]


def test_weighted_over_all_subsets_and_over_drawn_ones() -> None:
    rng = random.Random(2)
    answers = [rng.choice([None, 0, 1, 2, 3]) for _ in range(12)]
    weights, right = [rng.random() for _ in answers], [a == 0 for a in answers]
    expected = []
    for chosen in combinations(range(12), 6):
        sums = {a: sum(weights[i] for i in chosen if answers[i] == a) for a in (0, 1, 2, 3)}
        expected.append(max(sums, key=sums.__getitem__) == 0)
    ((exact, none),) = weighted_accuracy(answers, weights, right, [6], subsets=924, seed=0)
    assert (exact, none) == (pytest.approx(fmean(expected)), 0.0)
    ((drawn, variance),) = weighted_accuracy(answers, weights, right, [6], subsets=400, seed=0)
    # a share of 400 draws: variance p (1 - p) / 399; within 4 standard errors of the exact one
    assert variance == pytest.approx(drawn * (1 - drawn) / 399) and abs(drawn - exact) < 4 * variance**0.5
    assert weighted_accuracy(answers, weights, right, [6], subsets=400, seed=0) == [(drawn, variance)]
