"""The loss of a critic, what it explains, and the coefficient that follows the KL, against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmtrain.losses.kl_control import adapted_kl_coef
from llmtrain.losses.value import explained_variance, value_loss
from llmtrain.types import Batch, Scores


def batch_of(mask: Tensor, **extra: Tensor) -> Batch:
    zeros = torch.zeros(mask.shape, dtype=torch.int64)
    return Batch(zeros, zeros, mask, zeros, extra=extra)


def case() -> tuple[Tensor, Batch]:
    values = torch.tensor([[1.5, 0.1, 0.5, -0.5, math.inf]], requires_grad=True)
    mask = torch.tensor([[True, True, True, True, False]])
    extra = {"values": torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]]), "returns": torch.tensor([[2.0, 1.0, 2.0, -1, 0.0]])}
    return values, batch_of(mask, **extra)


def test_the_larger_of_two_errors_by_hand() -> None:
    """clip 0.2 around the old values 1, 0, 1, 0; returns 2, 1, 2, -1:
    1.5: plain 0.25, clipped at 1.2: 0.64, which is larger: no gradient     0.1: within the clip: 0.81, gradient -0.9
    0.5, moved away: plain 2.25, clipped at 0.8: 1.44: plain, gradient -1.5 -0.5: plain 0.25, clipped at -0.2: 0.64
    sum 0.5 (0.64 + 0.81 + 2.25 + 0.64) = 2.17"""
    values, batch = case()
    loss, metrics = value_loss(Scores(values=values), batch, clip=0.2)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(2.17))
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.9, -1.5, 0.0, 0.0]]))
    assert metrics["value_clip_fraction"] == 2
    torch.testing.assert_close(metrics["value_error"], torch.tensor(0.25 + 0.81 + 2.25 + 0.25))
    assert not any(value.requires_grad for value in metrics.values())


def test_without_a_limit_it_is_half_the_squared_error() -> None:
    values, batch = case()
    loss, metrics = value_loss(Scores(values=values), batch, clip=math.inf)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(0.5 * 3.56))
    torch.testing.assert_close(values.grad, torch.tensor([[-0.5, -0.9, -1.5, 0.5, 0.0]]))
    assert metrics["value_clip_fraction"] == 0


def test_what_a_critic_explains() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])  # variance 5/3
    assert explained_variance(returns - 7, returns) == pytest.approx(1)  # wrong by a constant only
    assert explained_variance(torch.zeros(4), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(1 - 4)
    assert explained_variance(returns, torch.ones(4)) == explained_variance(torch.ones(1), torch.ones(1)) == 0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # at the target
        (6.6, 0.1 * (1 + 0.1 * 256 / 10_000)),  # a tenth above it
        (60.0, 0.1 * (1 + 0.2 * 256 / 10_000)),  # far above: a fifth counts
        (0.0, 0.1 * (1 - 0.2 * 256 / 10_000)),
    ],
)
def test_the_coefficient_follows_the_kl(kl: float, expected: float) -> None:
    assert adapted_kl_coef(0.1, kl, target=6.0, samples=256, horizon=10_000) == pytest.approx(expected, rel=1e-12)
