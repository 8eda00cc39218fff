"""Defines the loss of a critic."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.losses.reduce import masked_sum
from llmtrain.types import Batch, Metrics, Scores


def value_loss(scores: Scores, batch: Batch, clip: float) -> tuple[Tensor, Metrics]:
    """Returns the clipped squared error, summed over the trained tokens, and its metrics.

    0.5 max((V - R)^2, (V_clip - R)^2), V_clip = V_old + clamp(V - V_old, -clip, clip): a value that has moved by more
    than `clip` (inf = no limit) towards its return has no gradient. The first PPO code has it, the paper does not
    (arXiv 2005.12729 lists what else).

    `batch.extra` holds, [B, T] each, `values` (V_old) and `returns` (R). Metrics, summed over the trained tokens:
    `value_error`, (V - R)^2, and `value_clip_fraction` (clipping binds: no gradient).
    """
    assert scores.values is not None
    mask, old, returns = batch.loss_mask, batch.extra["values"], batch.extra["returns"]
    values = torch.where(mask, scores.values, 0.0)  # before the square, whose gradient at infinity would be 0 * inf
    plain = (values - returns).square()
    clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
    metrics = {
        "value_error": masked_sum(plain, mask).detach(),
        "value_clip_fraction": masked_sum((clipped > plain).float(), mask),
    }
    return 0.5 * masked_sum(torch.maximum(plain, clipped), mask), metrics


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Returns 1 - Var(returns - values) / Var(returns): 1 for a critic that knows all, 0 for one that knows the mean at
    best, negative for a worse one. 0 where returns do not vary, or are fewer than two."""
    spread = returns.var() if returns.numel() > 1 else torch.tensor(0.0)
    return float(1 - (returns - values).var() / spread) if spread > 0 else 0.0
