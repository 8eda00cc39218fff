"""Estimators of the KL, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from llmtrain.losses.kl import KL_FORMS, k1, k2, k3, masked_log_ratio


def test_by_hand() -> None:
    # p/q = 2: k1 = -ln 2, k2 = ln2^2 / 2, k3 = 1 - ln 2; p/q = 1/2: k1 = ln 2, k2 the same, k3 = -1/2 + ln 2
    log_ratio, ln2 = torch.tensor([2.0, 0.5]).log(), math.log(2)
    assert k1(log_ratio).tolist() == pytest.approx([-ln2, ln2])
    assert k2(log_ratio).tolist() == pytest.approx([ln2**2 / 2] * 2)
    assert k3(log_ratio).tolist() == pytest.approx([1 - ln2, ln2 - 0.5])
    assert list(KL_FORMS) == ["k1", "k2", "k3"] and list(KL_FORMS.values()) == [k1, k2, k3]


def test_expectations_and_their_gradients() -> None:
    """Exactly, over a vocabulary of three: k1 and k3 have the mean KL(q || p); a loss of k2 has its gradient, of k1
    none, and of k3 that of KL(p || q)."""
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    log_q, log_p = logits.log_softmax(-1), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    q = log_q.exp()
    kl = (q * (log_q - log_p)).sum()
    reverse = (log_p.exp() * (log_p - log_q)).sum()

    def gradient(value: torch.Tensor) -> list[float]:
        return torch.autograd.grad(value, logits, retain_graph=True)[0].tolist()

    means = {name: (q.detach() * form(log_p - log_q)).sum() for name, form in KL_FORMS.items()}
    assert means["k1"].item() == pytest.approx(kl.item()) == pytest.approx(means["k3"].item())
    assert gradient(means["k1"]) == pytest.approx([0.0] * 3, abs=1e-12)
    assert gradient(means["k2"]) == pytest.approx(gradient(kl))
    assert gradient(means["k3"]) == pytest.approx(gradient(reverse))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_masked_is_equal(bad: float) -> None:
    x = torch.tensor([1.0, bad], requires_grad=True)
    k3(masked_log_ratio(x, torch.tensor([0.5, 1.0]), torch.tensor([True, False]))).sum().backward()
    assert x.grad.tolist() == pytest.approx([math.expm1(0.5), 0.0])
