from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from llmtrain.losses.token import token_loss
from llmtrain.types import IGNORE, Batch, Scores


def _batch(labels: torch.Tensor, loss_mask: torch.Tensor) -> Batch:
    return Batch(torch.zeros_like(labels), labels, loss_mask, torch.zeros_like(labels))


def test_sum_of_trained_tokens() -> None:
    # p = 1/2, 1/4, 1/8; the middle one is not trained: ln 2 + ln 8 = 4 ln 2
    logp = torch.log(torch.tensor([[0.5, 0.25, 0.125]])).requires_grad_()
    batch = _batch(torch.ones(1, 3).long(), torch.tensor([[1, 0, 1]]).bool())
    loss, metrics = token_loss(Scores(logp, logp.detach()), batch)
    loss.backward()
    assert math.isclose(loss.item(), 4 * math.log(2), rel_tol=1e-6)
    assert logp.grad.tolist() == [[-1.0, 0.0, -1.0]] and metrics == {}


def test_equals_cross_entropy_with_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, :2] = IGNORE
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss, _ = token_loss(Scores(logp, logp.detach()), _batch(labels, labels != IGNORE))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])
