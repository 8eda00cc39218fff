from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from llmtrain.losses.policy import grpo_loss
from llmtrain.types import Batch, Scores

CLIP = partial(grpo_loss, clip_low=0.2, clip_high=0.3)


def _batch(mask: Tensor, **extra: Tensor) -> Batch:
    zeros = torch.zeros(mask.shape, dtype=torch.int64)
    return Batch(zeros, zeros, mask, zeros, extra=extra)


def _case() -> tuple[Tensor, Batch]:
    """Ratios 3/2, 1/2, 3/2, 1/2, 1 with advantages 2, 2, -2, -4, 2, and one masked token."""
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.0, 9.0]])
    old = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.1]]))
    logp = (old + ratios.log()).requires_grad_()
    advantages = torch.tensor([[2.0, 2.0, -2.0, -4.0, 2.0, 5.0]])
    return logp, _batch(torch.tensor([[True] * 5 + [False]]), advantages=advantages, old_logprobs=old)


def test_clipping_by_hand() -> None:
    # clip to [0.8, 1.3]:
    # A=2,  r=1.5: min(3, 2.6) = 2.6 clipped, no gradient     A=2,  r=0.5: min(1, 1.6) = 1, gradient r A = 1
    # A=-2, r=1.5: min(-3, -2.6) = -3, gradient -3            A=-4, r=0.5: min(-2, -3.2) = -3.2 clipped
    # A=2,  r=1: 2, gradient 2                                sum = 2.6 + 1 - 3 - 3.2 + 2 = -0.6
    logp, batch = _case()
    loss, metrics = CLIP(Scores(logp, torch.full((1, 6), 0.5)), batch, kl_coef=0.0)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.6))
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0, -1.0, 3.0, 0.0, -2.0, 0.0]]))
    assert metrics["clip_fraction"].item() == 2.0 and metrics["entropy"].item() == 2.5
    # k3 against old: r - 1 - ln r = 0.5 - ln 1.5 twice, -0.5 + ln 2 twice, 0 once: 2 ln(4/3)
    torch.testing.assert_close(metrics["kl_old"], torch.tensor(2 * math.log(4 / 3)))
    torch.testing.assert_close(metrics["logprob_gap_max"], torch.tensor(math.log(2)))
    assert set(metrics) == {"clip_fraction", "entropy", "kl_old", "logprob_gap_max"}
    assert not any(value.requires_grad for value in metrics.values())


def test_kl_to_reference_by_hand() -> None:
    # p_ref / p = 2 and 1/2: k3 = 2 - 1 - ln 2 and 1/2 - 1 + ln 2, together 1/2; d k3 / d log p = 1 - p_ref / p
    logp = torch.log(torch.tensor([[0.25, 0.5]])).requires_grad_()
    ref = torch.log(torch.tensor([[0.5, 0.25]]))
    zero = torch.zeros(1, 2)
    batch = _batch(torch.ones(1, 2).bool(), advantages=zero, old_logprobs=logp.detach(), ref_logprobs=ref)
    loss, metrics = CLIP(Scores(logp, zero), batch, kl_coef=0.1)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.05))
    torch.testing.assert_close(metrics["kl"], torch.tensor(0.5))
    torch.testing.assert_close(logp.grad, torch.tensor([[0.1 * (1 - 2), 0.1 * (1 - 0.5)]]))


def test_reference_without_penalty_is_only_measured() -> None:
    logp, batch = _case()
    batch.extra["ref_logprobs"] = batch.extra["old_logprobs"] - 1
    loss, metrics = CLIP(Scores(logp, logp.detach()), batch, kl_coef=0.0)
    torch.testing.assert_close(loss, torch.tensor(0.6))
    assert metrics["kl"].item() > 0


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    logp = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(2, 4, dtype=torch.float64)
    batch = _batch(torch.ones(2, 4).bool(), advantages=advantages, old_logprobs=logp.detach())
    loss, metrics = CLIP(Scores(logp, logp.detach()), batch, kl_coef=0.0)
    loss.backward()
    torch.testing.assert_close(logp.grad, -advantages)
    assert metrics["clip_fraction"].item() == metrics["logprob_gap_max"].item() == 0.0


def test_gradcheck() -> None:
    torch.manual_seed(0)
    logp, old, ref, advantages = (torch.randn(2, 5, dtype=torch.float64) for _ in range(4))
    batch = _batch(torch.rand(2, 5) < 0.7, advantages=advantages, old_logprobs=old, ref_logprobs=ref)
    assert torch.autograd.gradcheck(lambda x: CLIP(Scores(x, logp), batch, kl_coef=0.3)[0], logp.requires_grad_())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_masked_tokens_never_make_nan(bad: float) -> None:
    logp, batch = _case()
    batch.extra["ref_logprobs"] = batch.extra["old_logprobs"].clone()
    expected, _ = CLIP(Scores(logp, logp.detach()), batch, kl_coef=0.1)
    for tensor in batch.extra.values():
        tensor[0, -1] = bad
    loss, metrics = CLIP(Scores(logp, torch.full((1, 6), bad).where(~batch.loss_mask, 0.0)), batch, kl_coef=0.1)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(logp.grad).all() and all(torch.isfinite(value) for value in metrics.values())


def test_nothing_trained_is_zero() -> None:
    logp, batch = _case()
    batch.loss_mask = torch.zeros_like(batch.loss_mask)
    loss, metrics = CLIP(Scores(logp, logp.detach()), batch, kl_coef=0.0)
    assert loss.item() == 0.0 and all(value.item() == 0.0 for value in metrics.values())


def test_penalty_needs_a_reference() -> None:
    logp, batch = _case()
    with pytest.raises(AssertionError, match="ref_logprobs"):
        CLIP(Scores(logp, logp.detach()), batch, kl_coef=0.1)
