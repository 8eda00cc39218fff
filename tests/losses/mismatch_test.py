"""Corrections for a generator that is not the trainer, worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.losses.mismatch import mask_sequences, mask_tokens, off_policy, truncate
from llmtrain.types import Batch

W = torch.tensor([[1.0, 4.0, 0.25, 1.0, 8.0, 0.125]])  # branches 1 1 1 | 2 2 2: geometric means 1 and 1
BRANCHES = [[1, 1, 1, 2, 2, 2]]


def batch_of(branches: list[list[int]], mask: Tensor | None = None) -> Batch:
    zeros = torch.zeros(1, len(branches[0]), dtype=torch.int64)
    return Batch(zeros, zeros, ~zeros.bool() if mask is None else mask, zeros, zeros, torch.tensor(branches))


def test_truncated() -> None:
    assert truncate(W.log(), batch_of(BRANCHES), cap=2.0)[0].tolist() == pytest.approx([1, 2, 0.25, 1, 2, 0.125])


def test_masked_by_token() -> None:
    found = mask_tokens(W.log(), batch_of(BRANCHES), low=0.2, high=5.0)[0].tolist()
    assert found == pytest.approx([1, 4, 0.25, 1, 0, 0])


def test_masked_by_the_mean_of_the_sequence() -> None:
    """Geometric means: (1 x 4 x 0.25)^(1/3) = 1 is kept, with its weights truncated; (8 x 0.125 x 27)^(1/3) = 3 is
    not."""
    w = torch.tensor([[1.0, 4.0, 0.25, 8.0, 0.125, 27.0]])
    found = mask_sequences(w.log(), batch_of(BRANCHES), low=0.5, high=2.9, cap=2.0)[0].tolist()
    assert found == pytest.approx([1, 2, 0.25, 0, 0, 0])
    found = mask_sequences(w.log(), batch_of(BRANCHES), low=1.1, high=3.1, cap=2.0)[0].tolist()
    assert found == pytest.approx([0, 0, 0, 2, 0.125, 2])
    mask = torch.tensor([[True] * 5 + [False]])  # without 27: (8 x 0.125)^(1/2) = 1
    found = mask_sequences(w.log(), batch_of(BRANCHES, mask), low=0.5, high=2.9, cap=2.0)[0, 3:5].tolist()
    assert found == pytest.approx([2, 0.125])


def test_sequences_off_the_policy_are_not_pushed_down() -> None:
    """log p_generator - log p: branch 1 has the mean (1 + 0 + 2) / 3 = 1, branch 2 the mean 0.5."""
    log_ratio = -torch.tensor([[1.0, 0.0, 2.0, 0.5, 0.5, 0.5]])
    worse = torch.full((1, 6), -1.0)
    assert off_policy(log_ratio, worse, batch_of(BRANCHES), delta=0.75).tolist() == [[True] * 3 + [False] * 3]
    assert off_policy(log_ratio, worse, batch_of(BRANCHES), delta=0.25).all()
    assert not off_policy(log_ratio, worse, batch_of(BRANCHES), delta=1.25).any()
    assert not off_policy(-log_ratio, worse, batch_of(BRANCHES), delta=0.25).any()  # nearer than sampled
    assert not off_policy(log_ratio, -worse, batch_of(BRANCHES), delta=0.25).any()  # pushed up: kept
