"""Turns rewards into advantages."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SPREAD = 1e-6  # rewards closer than this are equal: dividing by rounding noise would make it an advantage


def group_advantages(
    rewards: Tensor,
    normalize_std: bool,
    baseline: str = "mean",
    std_of: str = "group",
    eps: float = 0.0,
) -> Tensor:
    """Returns the advantage of each sample over its group: [prompts, samples] -> the same shape and dtype.

    GRPO (arXiv 2402.03300, section 4.1.2): (r - mean) / (std + eps), with the sample standard deviation (n - 1) of the
    group. Dr. GRPO (arXiv 2503.20783), `normalize_std=False`: r - mean, so that easy and hard prompts are not weighted
    up. `baseline="leave_one_out"` (RLOO, arXiv 2402.14740): r - the mean of the others. `std_of="batch"` (arXiv
    2508.08221): the deviation of all rewards that are given. A group without spread carries no signal: zeros.
    [[1, 0, 0, 0]] -> [[1.5, -0.5, -0.5, -0.5]].
    """
    samples = rewards.size(-1)
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)
    centered = deviations = rewards - rewards.mean(-1, keepdim=True)
    if baseline == "leave_one_out":
        centered = centered * (samples / max(samples - 1, 1))
    if normalize_std and std_of == "batch":
        centered = centered / (_std(rewards.flatten() - rewards.mean()) + eps)
    elif normalize_std:
        centered = centered / (_std(deviations) + eps)
    return torch.where(spread > MIN_SPREAD, centered, 0.0)


def _std(deviations: Tensor) -> Tensor:
    """Returns the sample standard deviation over the last dimension, given the deviations from its mean."""
    degrees = max(deviations.size(-1) - 1, 1)
    return (deviations.square().sum(-1, keepdim=True) / degrees).sqrt()


def has_spread(rewards: list[float]) -> bool:
    """Says whether a group's rewards differ, so that it has advantages."""
    return max(rewards) - min(rewards) > MIN_SPREAD


def overlong_penalty(length_tokens: int, limit_tokens: int, buffer_tokens: int) -> float:
    """Returns what a completion of this length loses (DAPO, arXiv 2503.14476, equation 13): 0 up to limit - buffer,
    falling to -1 at the limit: min(-(length - (limit - buffer)) / buffer, 0)."""
    return min(-(length_tokens - (limit_tokens - buffer_tokens)) / buffer_tokens, 0.0)
