from __future__ import annotations

from itertools import combinations

import pytest

from llmtrain.eval.passk import majority, pass_at_k


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (6, 0), (6, 1), (6, 3), (6, 5), (6, 6)])
def test_equals_counting_all_subsets(n: int, c: int) -> None:
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        hits = sum(any(sample < c for sample in subset) for subset in subsets)
        assert abs(pass_at_k(n, c, k) - hits / len(subsets)) < 1e-12


def test_pass_at_k_refuses_more_than_it_has() -> None:
    with pytest.raises(ValueError, match="pass@9 of 1 right among 8"):
        pass_at_k(8, 1, 9)


def test_majority() -> None:
    assert majority([0, 1, None, None, None, 1]) == 1
    assert majority([7, 1, 1, 7]) == 0 and majority([None, 0, 1, 1]) == 2
    assert majority([None, None]) is None and majority([]) is None
