"""Defines the losses that push a policy along its advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmtrain.losses.kl import KL_FORMS, k3, masked_log_ratio
from llmtrain.losses.mismatch import Correction, off_policy
from llmtrain.losses.reduce import masked_sum
from llmtrain.losses.sequence import sequence_means
from llmtrain.types import Batch, Metrics, Scores

Objective = Callable[[Tensor, Tensor, Batch], tuple[Tensor, Tensor]]
"""Maps log p - log p_old and log p, [B, T] each and 0 where masked, to what each token adds to the objective, and
where, [B, T] bool, the clipping leaves it no gradient."""


def clipped(
    log_ratio: Tensor, logprobs: Tensor, batch: Batch, low: float, high: float, dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = exp(log_ratio): PPO's objective (arXiv
    1707.06347, equation 7), with bounds of its own for each side as in DAPO (arXiv 2503.14476).

    `dual`, above 1 (arXiv 1912.09729): where A < 0, at least dual A, so that a huge ratio has no gradient.
    """
    advantages, ratio = batch.extra["advantages"], log_ratio.exp()
    unclipped = ratio * advantages
    bound = ratio.clamp(1 - low, 1 + high) * advantages
    gain, binds = torch.minimum(unclipped, bound), bound < unclipped
    if dual is not None:
        floor = dual * advantages
        below = (advantages < 0) & (gain < floor)
        gain, binds = torch.where(below, floor, gain), binds | below
    return gain, binds


def clipped_by_sequence(
    log_ratio: Tensor, logprobs: Tensor, batch: Batch, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Returns `clipped` with the ratio of the sequence at each of its tokens, exp(mean log_ratio): GSPO (arXiv
    2507.18071, equations 5 and 7)."""
    return clipped(sequence_means(log_ratio, batch.loss_mask, batch), logprobs, batch, low, high)


def capped(log_ratio: Tensor, logprobs: Tensor, batch: Batch, cap: float) -> tuple[Tensor, Tensor]:
    """Returns sg(min(ratio, cap)) A log p: CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5), in which every
    token keeps a gradient, as a weighted log-prob. The bound is a ratio itself."""
    ratio = log_ratio.detach().exp()
    return ratio.clamp(max=cap) * batch.extra["advantages"] * logprobs, torch.zeros_like(batch.loss_mask)


def policy_loss(
    scores: Scores,
    batch: Batch,
    objective: Objective,
    kl_coef: float = 0.0,
    kl_form: str = "k3",
    correction: Correction | None = None,
    off_policy_delta: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Returns -objective + kl_coef KL, summed over the trained tokens with the weights of `extra`, and its metrics.

    `batch.extra` holds, [B, T] each, `advantages` and `old_logprobs`, the generator's; where wanted `ref_logprobs`, and
    `weights` of tokens. Without a `correction` p_old is the generator's. With one it is the trainer's before the
    updates, `extra["train_logprobs"]`, or if that is missing the policy's own as it is now, as in the first of them;
    the objective of a token is multiplied by the correction of p_old / p_generator. Sequences that `off_policy` names
    are left out of the objective.

    Metrics, summed over the trained tokens: `clip_fraction` (clipping binds: no gradient), `entropy`, `kl_old` (from
    the old policy to this one), `kl` (from this one to the reference, if there is one, by `kl_form`), and those of
    `_corrected` and `off_policy_fraction` where these are used; `logprob_gap_max` is the largest |log p - log p_old|,
    of the generator.
    """
    logprobs, entropies = scores.logprobs, scores.entropies
    assert logprobs is not None and entropies is not None
    mask, extra = batch.loss_mask, batch.extra
    assert kl_coef == 0 or "ref_logprobs" in extra, "a KL penalty needs extra['ref_logprobs']"
    sampled = log_ratio = masked_log_ratio(logprobs, extra["old_logprobs"], mask)
    if correction is not None:
        log_ratio = masked_log_ratio(logprobs, extra.get("train_logprobs", logprobs.detach()), mask)
    gain, binds = objective(log_ratio, torch.where(mask, logprobs, 0.0), batch)
    metrics = {
        "clip_fraction": masked_sum(binds.float(), mask),
        "entropy": masked_sum(entropies, mask),
        "kl_old": masked_sum(k3(log_ratio), mask),
        "logprob_gap_max": sampled.abs().max(),
    }
    if correction is not None:
        gain, more = _corrected(gain, (sampled - log_ratio).detach(), batch, correction)
        metrics |= more
    if off_policy_delta is not None:
        left_out = off_policy(sampled.detach(), extra["advantages"], batch, off_policy_delta)
        gain = torch.where(left_out, 0.0, gain)
        metrics["off_policy_fraction"] = masked_sum(left_out.float(), mask)
    loss = -masked_sum(_weighted(gain, batch), mask)
    if "ref_logprobs" in extra:
        divergence = KL_FORMS[kl_form](-masked_log_ratio(logprobs, extra["ref_logprobs"], mask))
        metrics["kl"] = masked_sum(divergence, mask)
        loss = loss + kl_coef * masked_sum(_weighted(divergence, batch), mask)
    return loss, {name: value.detach() for name, value in metrics.items()}


def grpo_loss(
    scores: Scores, batch: Batch, clip_low: float, clip_high: float, kl_coef: float
) -> tuple[Tensor, Metrics]:
    """Returns the loss of GRPO (arXiv 2402.03300, equation 3): -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high)
    A) + kl_coef k3. See `policy_loss`."""
    return policy_loss(scores, batch, partial(clipped, low=clip_low, high=clip_high), kl_coef)


def _corrected(gain: Tensor, log_w: Tensor, batch: Batch, correction: Correction) -> tuple[Tensor, Metrics]:
    """Returns the objective times the correction, and metrics: `mismatch_kl` from the generator to the trainer,
    `mismatch_weight`, the factor, and `mismatch_fraction`, tokens whose factor is not w."""
    mask, factor = batch.loss_mask, correction(log_w, batch)
    metrics = {
        "mismatch_kl": masked_sum(k3(log_w), mask),
        "mismatch_weight": masked_sum(factor, mask),
        "mismatch_fraction": masked_sum((factor != log_w.exp()).float(), mask),
    }
    return gain * factor, metrics


def _weighted(x: Tensor, batch: Batch) -> Tensor:
    """Returns x times the weights of tokens, where the batch has them."""
    return x * batch.extra["weights"] if "weights" in batch.extra else x
