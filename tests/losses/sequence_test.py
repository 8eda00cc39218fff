"""Sums by sequence, worked by hand."""

from __future__ import annotations

import math

import torch

from llmtrain.losses.sequence import sequence_means, sequence_sums
from llmtrain.types import Batch


def batch_of(segments: list | None, branches: list | None, shape: tuple[int, int]) -> Batch:
    zeros = torch.zeros(shape, dtype=torch.int64)
    ids = [None if given is None else torch.tensor(given) for given in (segments, branches)]
    return Batch(zeros, zeros, zeros.bool(), zeros, *ids)


def summed(x: list, mask: list | None = None, segments: list | None = None, branches: list | None = None) -> tuple:
    values = torch.tensor(x)
    where = torch.ones_like(values).bool() if mask is None else torch.tensor(mask).bool()
    sums, numbers = sequence_sums(values, where, batch_of(segments, branches, values.shape))
    return sums.tolist(), numbers.tolist()


def test_whole_rows() -> None:
    assert summed([[1.0, 2.0], [4.0, 8.0]]) == ([3.0, 12.0], [[0, 0], [1, 1]])
    assert summed([[1.0, 2.0], [4.0, 8.0]], mask=[[1, 0], [0, 0]]) == ([1.0, 0.0], [[0, 0], [1, 1]])


def test_the_example_of_the_docstring() -> None:
    found = summed([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], segments=[[0, 0, 0, 0, 1, -1]], branches=[[0, 1, 1, 2, 0, 0]])
    assert found == ([5.0, 4.0, 5.0], [[-1, 0, 0, 1, 2, -1]])


def test_rows_of_unequal_numbers_of_sequences() -> None:
    x = [[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0], [1.0, 1.0, 1.0, 1.0], [256.0, 512.0, 1024.0, 2048.0]]
    segments = [[0, 1, 1, 2], [0, 0, -1, -1], [-1, -1, -1, -1], [0, 0, 1, 1]]
    sums, numbers = summed(x, segments=segments)
    assert sums == [1.0, 6.0, 8.0, 48.0, 768.0, 3072.0]
    assert numbers == [[0, 1, 1, 2], [3, 3, -1, -1], [-1, -1, -1, -1], [4, 4, 5, 5]]


def test_two_groups_in_a_row_are_pairs_side_by_side() -> None:
    """The second group has no trunk, and a branch in two pieces (the second behind the other branch)."""
    x = [[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]]
    segments, branches = [[0, 0, 0, 1, 1, 1, -1, -1]], [[0, 1, 2, 1, 2, 1, 0, 0]]
    sums, numbers = summed(x, segments=segments, branches=branches)
    assert (sums, numbers) == ([2.0, 4.0, 40.0, 16.0], [[-1, 0, 1, 2, 3, 2, -1, -1]])
    chosen, rejected = torch.tensor(sums).view(-1, 2).unbind(-1)
    assert (chosen - rejected).tolist() == [-2.0, 24.0]


def test_a_branch_that_is_all_masked_keeps_its_place() -> None:
    found = summed([[1.0, 2.0, 4.0]], mask=[[0, 0, 1]], segments=[[0, 0, 0]], branches=[[0, 1, 2]])
    assert found == ([0.0, 4.0], [[-1, 0, 1]])


def test_nothing_but_padding() -> None:
    assert summed([[1.0, 2.0]], segments=[[-1, -1]], branches=[[0, 0]]) == ([], [[-1, -1]])


def test_gradient_reaches_what_is_in_the_mask_alone() -> None:
    x = torch.tensor([[1.0, math.nan, 2.0, math.inf], [3.0, 5.0, 7.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True, False], [True, True, False, True]])
    sums, _ = sequence_sums(x, mask, batch_of([[0, 0, 0, 0], [0, 0, 1, -1]], None, (2, 4)))
    assert sums.tolist() == [3.0, 8.0, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 1.0, 0.0], [10.0, 10.0, 0.0, 0.0]]


def test_a_mean_is_spread_over_the_tokens_of_its_sequence() -> None:
    x, mask = torch.tensor([[9.0, 1.0, 3.0, 5.0]]), torch.tensor([[False, True, True, True]])
    assert sequence_means(x, mask, batch_of(None, [[0, 1, 1, 2]], (1, 4))).tolist() == [[0.0, 2.0, 2.0, 5.0]]
    # two groups in a row, the second in two pieces; what is not in the mask neither counts nor gets a mean
    x, mask = (
        torch.tensor([[1.0, math.inf, 4.0, 8.0, 16.0, 7.0]]),
        torch.tensor([[True, False, True, True, True, False]]),
    )
    batch = batch_of([[0, 0, 1, 1, 1, -1]], [[1, 1, 1, 2, 1, 0]], (1, 6))
    assert sequence_means(x, mask, batch).tolist() == [[1.0, 0.0, 10.0, 8.0, 10.0, 0.0]]
    assert sequence_means(x, torch.zeros(1, 6).bool(), batch).tolist() == [[0.0] * 6]


def test_gradient_of_a_mean_is_shared_by_its_tokens() -> None:
    x = torch.tensor([[1.0, 3.0, math.nan, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False, True]])
    means = sequence_means(x, mask, batch_of(None, [[1, 1, 1, 2]], (1, 4)))
    (means * torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert x.grad.tolist() == [[5.5, 5.5, 0.0, 1000.0]]
