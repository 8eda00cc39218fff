"""Defines the losses that push a policy along its advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.losses.kl import k3, masked_log_ratio
from llmtrain.losses.reduce import masked_sum
from llmtrain.types import Batch, Metrics, Scores


def grpo_loss(
    scores: Scores, batch: Batch, clip_low: float, clip_high: float, kl_coef: float
) -> tuple[Tensor, Metrics]:
    """Returns the loss of GRPO (arXiv 2402.03300, equation 3), summed over the trained tokens, and its metrics.

    -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_coef k3, with ratio = exp(log p - log p_old).

    `batch.extra` holds, [B, T] each, `advantages`, `old_logprobs` and, when a KL to a reference is wanted,
    `ref_logprobs`. Metrics, summed over the trained tokens: `clip_fraction` (clipping binds: no gradient), `entropy`,
    `kl_old` (from the old policy to this one), `kl` (from this one to the reference, if there is one);
    `logprob_gap_max` is the largest |log p - log p_old|.
    """
    logprobs, entropies = scores.logprobs, scores.entropies
    assert logprobs is not None and entropies is not None
    mask, extra = batch.loss_mask, batch.extra
    assert kl_coef == 0 or "ref_logprobs" in extra, "a KL penalty needs extra['ref_logprobs']"
    log_ratio = masked_log_ratio(logprobs, extra["old_logprobs"], mask)
    ratio = log_ratio.exp()
    unclipped = ratio * extra["advantages"]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * extra["advantages"]
    loss = -masked_sum(torch.minimum(unclipped, clipped), mask)
    metrics = {
        "clip_fraction": masked_sum((clipped < unclipped).float(), mask),
        "entropy": masked_sum(entropies, mask),
        "kl_old": masked_sum(k3(log_ratio), mask),
        "logprob_gap_max": log_ratio.abs().max(),
    }
    if "ref_logprobs" in extra:
        metrics["kl"] = masked_sum(k3(-masked_log_ratio(logprobs, extra["ref_logprobs"], mask)), mask)
        loss = loss + kl_coef * metrics["kl"]
    return loss, {name: value.detach() for name, value in metrics.items()}
