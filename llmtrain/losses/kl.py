"""Estimates the divergence of two policies from the tokens that one of them sampled.

Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). Of KL(q || p), from samples of q, with
log_ratio = log p - log q; for the KL of the policy to a reference q is the policy and p the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def masked_log_ratio(logprobs: Tensor, others: Tensor, mask: Tensor) -> Tensor:
    """Returns logprobs - others, 0 where `mask` (bool, same shape) is False: before any exponential, whose gradient at
    infinity would be 0 * inf."""
    return torch.where(mask, logprobs - others, 0.0)


def k1(log_ratio: Tensor) -> Tensor:
    """Returns -log_ratio: without bias, of either sign. As a term of a loss its gradient, that of log q, is 0 in
    expectation and pulls nowhere; it belongs into the reward."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Returns log_ratio^2 / 2, never negative. As a term of a loss its gradient is, in expectation, that of the KL."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Returns (exp(log_ratio) - 1) - log_ratio: without bias, never negative; the form of GRPO (arXiv 2402.03300,
    equation 4)."""
    return log_ratio.expm1() - log_ratio


KL_FORMS: Mapping[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
