from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.sampler import BLOCK, permuted, permuted_all, source_of, sources_of


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(epoch * size + i, size, seed) for i in range(size)) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permuted(e * 50 + i, 50, seed) for i in range(50)) for e in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_it_looks_random() -> None:
    """Where the first element lands, over seeds: every place equally often (chi-square, 15 degrees of freedom)."""
    counts = Counter(permuted(0, 16, seed) for seed in range(3200))
    assert sum((counts[i] - 200) ** 2 / 200 for i in range(16)) < 40
    follows = sum(permuted(i + 1, 1000, 7) == permuted(i, 1000, 7) + 1 for i in range(999))
    assert follows < 10


def test_known_values_do_not_change() -> None:
    """Resuming a run needs the same samples from every later version."""
    assert [permuted(i, 10, 0) for i in range(10)] == [8, 5, 3, 6, 1, 4, 0, 9, 2, 7]


def test_sources_are_mixed_exactly_and_each_number_comes_once() -> None:
    picks = [source_of(i, (3, 1), seed=5) for i in range(3 * BLOCK)]
    for source, share in ((0, 0.75), (1, 0.25)):
        numbers = [n for s, n in picks if s == source]
        assert sorted(numbers) == list(range(int(3 * BLOCK * share)))
    early = Counter(s for s, _ in picks[:200])
    assert 25 < early[1] < 75


def test_a_share_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1/1000"):
        source_of(0, (1.0, 1e-6), 0)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 10**12), seed=st.integers(0, 2**64 - 1), first=st.integers(0, 10**13))
def test_many_at_once_are_the_same(size: int, seed: int, first: int) -> None:
    indices = first + np.arange(50)
    assert permuted_all(indices, size, seed).tolist() == [permuted(i, size, seed) for i in indices.tolist()]
    sources, numbers = sources_of(indices, (3, 1, 2.5), seed)
    pairs = list(zip(sources.tolist(), numbers.tolist(), strict=True))
    assert pairs == [source_of(i, (3, 1, 2.5), seed) for i in indices.tolist()]
