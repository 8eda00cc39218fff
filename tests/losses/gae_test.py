"""Advantages, returns and whitening against hand arithmetic, with tokens that the policy did not write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.losses.gae import gae, length_lambda, token_rewards, whiten

WRITTEN = torch.tensor([[True, True, False, True], [True, False, False, False]])


def rows(*numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(found: Tensor, *expected: list[float]) -> None:
    torch.testing.assert_close(found, rows(*expected), rtol=0, atol=1e-12)


def test_a_reward_comes_with_the_last_token_that_the_policy_wrote() -> None:
    penalties = rows([0.1, -0.2, 7.0, 0.3], [0.5, 7.0, 7.0, 7.0])
    close(token_rewards(rows([1.0, -2.0])[0], penalties, WRITTEN), [-0.1, 0.2, 0, 1 - 0.3], [-2 - 0.5, 0, 0, 0])
    nobody = torch.zeros(1, 2, dtype=torch.bool)
    close(token_rewards(torch.ones(1).double(), rows([1.0, 1.0]), nobody), [0, 0])


def test_advantages_step_over_what_the_policy_did_not_write() -> None:
    """gamma 1, lambda 0.5, rewards 0, 0, -, 5 and values 1, 2, (9), 3. From behind:
    t=3: delta 5 + 0 - 3 = 2, A 2                 t=2: a tool's token; V = 3 and A = 2 are carried over it
    t=1: delta 0 + 3 - 2 = 1, A 1 + 0.5 * 2 = 2   t=0: delta 0 + 2 - 1 = 1, A 1 + 0.5 * 2 = 2
    The second sample, one token: 4 - 1.5 = 2.5; what stands behind it, 9, is no value of its own.
    """
    values = rows([1, 2, 9, 3], [1.5, 9, 9, 9])
    rewards = rows([0, 0, 9, 5], [4, 9, 9, 9])
    close(gae(rewards, values, WRITTEN, 0.5), [2, 2, 0, 2], [2.5, 0, 0, 0])
    joined = gae(rows([0, 0, 5]), rows([1, 2, 3]), torch.ones(1, 3).bool(), 0.5)
    close(joined, [2, 2, 2])  # the same as if the tool had said nothing


def test_limits_of_lambda_and_the_discount() -> None:
    """lambda 1: all that is to come less the value; lambda 0: delta. gamma discounts each written token once."""
    values, rewards = rows([1, 2, 9, 3]), rows([0.5, 0, 9, 5])
    one = WRITTEN[:1]
    close(gae(rewards, values, one, 1.0), [5.5 - 1, 5 - 2, 0, 5 - 3])
    close(gae(rewards, values, one, 0.0), [0.5 + 2 - 1, 3 - 2, 0, 5 - 3])
    # gamma 0.5, lambda 1: returns 0.5 + 0.5 * 2.5 = 1.75, 0 + 0.5 * 5 = 2.5, 5
    close(gae(rewards, values, one, 1.0, gamma=0.5), [1.75 - 1, 2.5 - 2, 0, 5 - 3])
    # gamma 0.5, lambda 0.5: A3 = 2; A1 = 0.5 * 3 - 2 + 0.25 * 2 = 0; A0 = 0.5 + 0.5 * 2 - 1 + 0.25 * 0 = 0.5
    close(gae(rewards, values, one, 0.5, gamma=0.5), [0.5, 0, 0, 2])


def test_a_lambda_for_each_sample_by_its_length() -> None:
    """alpha 0.05: 1 - 20 / l; up to 20 tokens it is 0."""
    torch.testing.assert_close(
        length_lambda(torch.tensor([10, 20, 40, 200, 2000]), 0.05), torch.tensor([0, 0, 0.5, 0.9, 0.99])
    )
    rewards, values = rows([0, 5], [0, 5]), rows([1, 2], [1, 2])
    close(gae(rewards, values, torch.ones(2, 2).bool(), torch.tensor([0.0, 1.0])), [1, 3], [4, 3])


def test_whitening_by_hand() -> None:
    """1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3."""
    x, mask = rows([1, 2, 99, 3], [6, float("nan"), 99, 99]), WRITTEN
    deviation = (14 / 3 + 1e-8) ** 0.5
    close(whiten(x, mask), [-2 / deviation, -1 / deviation, 0, 0], [3 / deviation, 0, 0, 0])
    close(whiten(rows([5, 5]), torch.ones(1, 2).bool()), [0, 0])
    close(whiten(rows([5, 7]), torch.tensor([[True, False]])), [0, 0])
    close(whiten(rows([5, 7]), torch.zeros(1, 2).bool()), [0, 0])


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_advantages_are_the_sum_of_their_definition(lam: float) -> None:
    """A_t = sum over k of (gamma lambda)^k delta_t+k, over the written tokens alone; many drawn samples."""
    g = torch.Generator().manual_seed(1)
    written = torch.rand(8, 12, generator=g) < 0.7
    rewards, values = torch.randn(2, 8, 12, generator=g, dtype=torch.float64)
    found = gae(rewards, values, written, lam, gamma=0.9)
    assert not found[~written].any()
    for sample in range(8):
        own = written[sample]
        r, v = rewards[sample][own].tolist(), [*values[sample][own].tolist(), 0.0]
        deltas = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(len(r))]
        expected = [sum((0.9 * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(r))]
        torch.testing.assert_close(found[sample][own], torch.tensor(expected, dtype=torch.float64))
