from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from llmtrain.losses.mismatch import mask_tokens, truncate
from llmtrain.losses.policy import capped, clipped, clipped_by_sequence, grpo_loss, policy_loss
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


def _scores(logp: Tensor) -> Scores:
    return Scores(logp, torch.zeros_like(logp))


def _sequences() -> tuple[Tensor, Batch]:
    """Two branches of ratios (4, 1) and (1/2, 1/2, 1/4): of the sequences 2, and 2^(-4/3); advantages 1 and -3."""
    ratios = torch.tensor([[4.0, 1.0, 0.5, 0.5, 0.25]])
    old = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]]))
    logp = (old + ratios.log()).requires_grad_()
    batch = _batch(torch.ones(1, 5).bool(), advantages=torch.tensor([[1.0, 1, -3, -3, -3]]), old_logprobs=old)
    batch.branch_ids = torch.tensor([[1, 1, 2, 2, 2]])
    return logp, batch


def test_dual_clip_by_hand() -> None:
    # A=-2: r=1.5 stays -3, r=8 is -16, of which 3 A = -6 is left without a gradient; A=2, r=8: 2.6 as ever
    ratios = torch.tensor([[1.5, 8.0, 8.0]])
    logp = ratios.log().requires_grad_()
    batch = _batch(
        torch.ones(1, 3).bool(), advantages=torch.tensor([[-2.0, -2.0, 2.0]]), old_logprobs=torch.zeros(1, 3)
    )
    loss, metrics = policy_loss(_scores(logp), batch, partial(clipped, low=0.2, high=0.3, dual=3.0))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(3 + 6 - 2.6))
    torch.testing.assert_close(logp.grad, torch.tensor([[3.0, 0.0, 0.0]]))
    assert metrics["clip_fraction"].item() == 2


def test_ratio_of_the_sequence_by_hand() -> None:
    """Wide bounds: sum over tokens of s A = 2 x 2 - 3 x 3 s; the gradient at each token is s A."""
    logp, batch = _sequences()
    loss, metrics = policy_loss(_scores(logp), batch, partial(clipped_by_sequence, low=0.9, high=9.0))
    loss.backward()
    s = 2 ** (-4 / 3)
    torch.testing.assert_close(loss, torch.tensor(-4 + 9 * s))
    torch.testing.assert_close(logp.grad, torch.tensor([[-2.0, -2.0, 3 * s, 3 * s, 3 * s]]))
    assert metrics["clip_fraction"].item() == 0
    loss, metrics = policy_loss(_scores(logp), batch, partial(clipped_by_sequence, low=3e-4, high=4e-4))
    torch.testing.assert_close(loss, torch.tensor(-2 * 1.0004 + 9 * 0.9997))  # both are clipped
    assert metrics["clip_fraction"].item() == 5


def test_capped_ratio_by_hand() -> None:
    """Weights min(r, 2): 2, 1, 1/2, 1/2, 1/4, times A log p; every token keeps the gradient of its log p."""
    logp, batch = _sequences()
    loss, metrics = policy_loss(_scores(logp), batch, partial(capped, cap=2.0))
    loss.backward()
    weights = torch.tensor([[2.0, 1.0, -1.5, -1.5, -0.75]])
    torch.testing.assert_close(loss, -(weights * torch.tensor([[0.4, 0.2, 0.15, 0.2, 0.125]]).log()).sum())
    torch.testing.assert_close(logp.grad, -weights)
    assert metrics["clip_fraction"].item() == 0


def test_weights_of_tokens_by_hand() -> None:
    """Weights 1/2, 1/4, of the objective and of the KL; metrics are plain."""
    logp, batch = _sequences()
    batch.extra["weights"] = torch.tensor([[1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4]])
    batch.extra["ref_logprobs"] = logp.detach() - torch.tensor([[1.0, 0, 0, 0, 3.0]])
    loss, metrics = policy_loss(_scores(logp), batch, partial(clipped, low=0.9, high=9.0), 0.1, "k1")
    torch.testing.assert_close(loss, torch.tensor(-(4 + 1) / 2 + 3 * 1.25 / 4 + 0.1 * (1 / 2 + 3 / 4)))
    torch.testing.assert_close(metrics["kl"], torch.tensor(4.0))


@pytest.mark.parametrize(("form", "value", "slope"), [("k1", 2.0, 1.0), ("k2", 2.0, 2.0)])
def test_forms_of_the_kl_by_hand(form: str, value: float, slope: float) -> None:
    """log p - log p_ref = 2: k1 = 2 with gradient 1, k2 = 2 with gradient 2."""
    logp, zero = torch.tensor([[-1.0]], requires_grad=True), torch.zeros(1, 1)
    batch = _batch(torch.ones(1, 1).bool(), advantages=zero, old_logprobs=zero - 1, ref_logprobs=zero - 3)
    loss, _ = policy_loss(_scores(logp), batch, partial(clipped, low=0.2, high=0.2), 0.1, form)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * value) and logp.grad.item() == pytest.approx(0.1 * slope)


def test_a_correction_by_hand() -> None:
    """p_generator 0.1, 0.2, 0.5; the trainer had 0.2, 0.1, 0.5 (w = 2, 1/2, 1) and has 0.22, 0.1, 0.5 (ratios 1.1, 1,
    1): the ratio is clipped at 1.05, and w truncated at 1.5."""
    generator, old, now = (torch.tensor([p]).log() for p in ([0.1, 0.2, 0.5], [0.2, 0.1, 0.5], [0.22, 0.1, 0.5]))
    advantages = torch.tensor([[1.0, -4.0, 8.0]])
    batch = _batch(torch.ones(1, 3).bool(), advantages=advantages, old_logprobs=generator, train_logprobs=old)
    logp, objective = now.requires_grad_(), partial(clipped, low=0.05, high=0.05)
    loss, metrics = policy_loss(_scores(logp), batch, objective, correction=partial(truncate, cap=1.5))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(-(1.05 * 1.5 - 4 * 0.5 + 8)))
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0, 2.0, -8.0]]))
    found = {name: value.item() for name, value in metrics.items()}
    assert found["mismatch_weight"] == pytest.approx(3.0) and found["mismatch_fraction"] == 1
    assert found["mismatch_kl"] == pytest.approx((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)))
    assert found["kl_old"] == pytest.approx(0.1 - math.log(1.1), rel=1e-4)
    assert found["logprob_gap_max"] == pytest.approx(math.log(2.2))  # of the generator
    assert found["clip_fraction"] == 1


def test_the_first_update_is_its_own_old_policy() -> None:
    """Without `train_logprobs` the ratio is 1 and w that of the weights as they are: nothing is scored twice."""
    generator, now = torch.tensor([[0.1, 0.2]]).log(), torch.tensor([[0.2, 0.02]]).log().requires_grad_()
    batch = _batch(torch.ones(1, 2).bool(), advantages=torch.tensor([[1.0, 1.0]]), old_logprobs=generator)
    correction = partial(mask_tokens, low=0.5, high=5.0)
    loss, metrics = policy_loss(_scores(now), batch, partial(clipped, low=0.2, high=0.2), correction=correction)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(-2.0))  # w = 2, and 0.1, which is left out
    torch.testing.assert_close(now.grad, torch.tensor([[-2.0, 0.0]]))
    assert metrics["mismatch_fraction"].item() == 1 and metrics["kl_old"].item() == 0


def test_sequences_off_the_policy_are_left_out_by_hand() -> None:
    """The second branch has a negative advantage, and log p_old - log p of 4/3 ln 2 = 0.92 a token."""
    logp, batch = _sequences()
    objective = partial(clipped, low=0.9, high=9.0)
    loss, metrics = policy_loss(_scores(logp), batch, objective, off_policy_delta=0.9)
    torch.testing.assert_close(loss, torch.tensor(-5.0))
    assert metrics["off_policy_fraction"].item() == 3
    loss, metrics = policy_loss(_scores(logp), batch, objective, off_policy_delta=0.95)
    torch.testing.assert_close(loss, torch.tensor(-5.0 + 3 * 1.25))
    assert metrics["off_policy_fraction"].item() == 0
    # with a correction too the distance is that to the generator: in the first update the ratio itself is 1
    loss, metrics = policy_loss(
        _scores(logp), batch, objective, correction=partial(truncate, cap=9.0), off_policy_delta=0.9
    )
    torch.testing.assert_close(loss, torch.tensor(-5.0))
    assert metrics["off_policy_fraction"].item() == 3


@pytest.mark.parametrize("objective", [partial(clipped_by_sequence, low=0.2, high=0.3), partial(capped, cap=1.2)])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_masked_tokens_never_make_nan_in_any_objective(objective: partial, bad: float) -> None:
    logp, batch = _case()
    batch.extra |= {name: batch.extra["old_logprobs"].clone() for name in ("train_logprobs", "ref_logprobs")}
    batch.extra["weights"] = torch.ones(1, 6)
    call = partial(policy_loss, objective=objective, kl_coef=0.1, kl_form="k2", off_policy_delta=0.1)
    expected, _ = call(_scores(logp), batch, correction=partial(truncate, cap=2.0))
    for tensor in batch.extra.values():
        tensor[0, -1] = bad
    spoiled = torch.where(batch.loss_mask, logp.detach(), bad).requires_grad_()
    loss, metrics = call(_scores(spoiled), batch, correction=partial(truncate, cap=2.0))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(spoiled.grad).all() and all(torch.isfinite(value) for value in metrics.values())
