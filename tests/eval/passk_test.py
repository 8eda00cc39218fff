from __future__ import annotations

import math
from itertools import combinations

import pytest

from llmtrain.eval.passk import ks_up_to, majority, pass_at_k


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (6, 0), (6, 1), (6, 3), (6, 5), (6, 6)])
def test_equals_counting_all_subsets(n: int, c: int) -> None:
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        hits = sum(any(sample < c for sample in subset) for subset in subsets)
        assert abs(pass_at_k(n, c, k) - hits / len(subsets)) < 1e-12


def test_equals_the_product() -> None:
    """1 - prod_{i=n-c+1..n} (1 - k/i), and 1 where n - c < k (the paper's own code)."""
    for n in (1, 2, 8, 17, 200):
        for c in {0, 1, n // 2, n - 1, n}:
            for k in ks_up_to(n):
                product = 1.0 if n - c < k else 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))
                assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)


def test_ks() -> None:
    assert [ks_up_to(n) for n in (0, 1, 2, 6, 8)] == [[], [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_pass_at_k_refuses_more_than_it_has() -> None:
    with pytest.raises(ValueError, match="pass@9 of 1 right among 8"):
        pass_at_k(8, 1, 9)


def test_majority() -> None:
    assert majority([0, 1, None, None, None, 1]) == 1
    assert majority([7, 1, 1, 7]) == 0 and majority([None, 0, 1, 1]) == 2
    assert majority([None, None]) is None and majority([]) is None
