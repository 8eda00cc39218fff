"""Turns rewards into advantages."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SPREAD = 1e-6  # rewards closer than this are equal: dividing by rounding noise would make it an advantage


def group_advantages(rewards: Tensor, normalize_std: bool) -> Tensor:
    """Returns the advantage of each sample over its group: [prompts, samples] -> the same shape.

    GRPO (arXiv 2402.03300, section 4.1.2): (r - mean) / std, with the sample standard deviation (n - 1). Dr. GRPO
    (arXiv 2503.20783), `normalize_std=False`: r - mean, so that easy and hard prompts are not weighted up. A group
    without spread carries no signal: zeros. [[1, 0, 0, 0]] -> [[1.5, -0.5, -0.5, -0.5]].
    """
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)
    centered = rewards - rewards.mean(-1, keepdim=True)
    if normalize_std:
        degrees = max(rewards.size(-1) - 1, 1)
        centered = centered / (centered.square().sum(-1, keepdim=True) / degrees).sqrt()
    return torch.where(spread > MIN_SPREAD, centered, 0.0)
