"""Estimates the advantages of the tokens that a policy wrote, from rewards and a critic's values."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8  # keeps the division of what has no spread finite


def token_rewards(rewards: Tensor, penalties: Tensor, written: Tensor) -> Tensor:
    """Returns the reward of each token, [samples, T]: minus its penalty, and at the last written one plus the reward of
    the sample (arXiv 2203.02155, equation 2, as a sum over tokens).

    rewards [samples]; penalties, such as kl_coef (log p - log p_ref), and written (bool) [samples, T]. 0 elsewhere.
    """
    last = written & (written.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(written, -penalties, 0.0) + torch.where(last, rewards[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, written: Tensor, lam: Tensor | float, gamma: float = 1.0) -> Tensor:
    """Returns the advantage of each token, [samples, T], 0 where `written` (bool, same shape) is False.

    Generalised advantage estimation (arXiv 1506.02438, equation 16), from the last token to the first:
        delta_t = r_t + gamma V_t+1 - V_t        A_t = delta_t + gamma lam A_t+1
    V_t is the value before token t was written. A token that the policy did not write is no action: value and advantage
    are carried over it, so that t+1 is the next token that was written. Behind the last one both are 0, also in a
    sample that was cut at its limit: no token follows, and its reward is final. `lam` is one number, or one a sample.

    Example: values 1, 2, -, 3, the reward 5 at the end, gamma = lam = 1, and the third token a tool's
        advantages 4, 3, 0, 2: all of what is still to come, 5, less the value
    """
    advantages = torch.zeros_like(values)
    advantage, value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = torch.where(written[:, t], delta + gamma * lam * advantage, advantage)
        value = torch.where(written[:, t], values[:, t], value)
        advantages[:, t] = torch.where(written[:, t], advantage, 0.0)
    return advantages


def length_lambda(tokens: Tensor, alpha: float) -> Tensor:
    """Returns 1 - 1 / (alpha tokens) for samples of so many written tokens, at least 0 (length-adaptive
    GAE of VAPO, arXiv 2504.05118): the reward at the end reaches the first tokens of a long sample as well."""
    return (1 - 1 / (alpha * tokens)).clamp(min=0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Returns (x - mean) / sqrt(var + 1e-8) over where `mask` (bool, same shape) is True, with the variance of a sample
    (n - 1); 0 elsewhere, and everywhere for fewer than two numbers. [1, 3, 8 masked] -> [-0.71, 0.71, 0]."""
    count = mask.sum()
    if count < 2:
        return torch.zeros_like(x)
    centered = torch.where(mask, x - x[mask].mean(), 0.0)
    return centered * (centered.square().sum() / (count - 1) + TINY).rsqrt()
