from __future__ import annotations

import random
from itertools import permutations
from statistics import fmean

import pytest

from llmtrain.eval.passk import pass_at_k
from llmtrain.eval.testtime.best_of import best_of_accuracy


def test_by_hand() -> None:
    # the best, which is wrong, is in 1/3, 2/3, 3/3 of the subsets of 1, 2, 3
    assert best_of_accuracy([3, 2, 1], [False, True, True], [1, 2, 3]) == pytest.approx([2 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        ([1, 1, 1], [True, False, False], [1 / 3, 1 / 3, 1 / 3]),  # all tie: any of them
        ([None, None, 0.5], [True, True, False], [2 / 3, 1 / 3, 0]),  # a failed score is below all
        ([-5, None, None], [True, False, False], [1 / 3, 2 / 3, 1]),
        ([1, 2, 3], [False, False, False], [0, 0, 0]),
    ],
)
def test_ties_and_failures(scores: list[float | None], right: list[bool], expected: list[float]) -> None:
    assert best_of_accuracy(scores, right, [1, 2, 3]) == pytest.approx(expected)


def test_closed_form_is_the_mean_over_all_orders() -> None:
    rng = random.Random(3)
    for _ in range(40):
        total = rng.randint(1, 6)
        scores = [rng.choice([None, 0.0, 1.0, 2.0]) for _ in range(total)]
        right, sizes = [rng.random() < 0.5 for _ in range(total)], list(range(1, total + 1))
        for n, found in zip(sizes, best_of_accuracy(scores, right, sizes), strict=True):
            places = [-9.0 if score is None else score for score in scores]
            best = [max(order, key=places.__getitem__) for order in permutations(range(total), n)]
            assert found == pytest.approx(fmean(right[i] for i in best)), (scores, right, n)


def test_a_verifier_that_knows_the_answer_is_pass_at_k() -> None:
    right = [True, False, True, False, False, False, False, False]
    found = best_of_accuracy([float(r) for r in right], right, [1, 2, 4, 8])
    assert found == pytest.approx([pass_at_k(8, 2, k) for k in (1, 2, 4, 8)])
