"""Defines the loss of samples that the policy drew itself and a reward has chosen."""

from __future__ import annotations

from torch import Tensor

from llmtrain.losses.kl import k3, masked_log_ratio
from llmtrain.losses.reduce import masked_sum
from llmtrain.losses.token import token_loss
from llmtrain.types import Batch, Metrics, Scores


def raft_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns the loss of RAFT (arXiv 2304.06767; 2504.11343, equation 1), which is that of SFT on the chosen samples:
    -log p, summed over the trained tokens, in nats; and metrics.

    `batch.extra["old_logprobs"]`, [B, T], are those that the samples were drawn with; the loss does not read them.
    Metrics, summed over the trained tokens: `entropy`, `kl_old` (k3 of p / p_old: a distance of the two policies on
    what was chosen, which is no sample of either); `logprob_gap_max` is the largest |log p - log p_old|.
    """
    assert scores.logprobs is not None and scores.entropies is not None
    mask = batch.loss_mask
    log_ratio = masked_log_ratio(scores.logprobs, batch.extra["old_logprobs"], mask)
    metrics = {
        "entropy": masked_sum(scores.entropies, mask),
        "kl_old": masked_sum(k3(log_ratio), mask),
        "logprob_gap_max": log_ratio.abs().max(),
    }
    loss, _ = token_loss(scores, batch)
    return loss, {name: value.detach() for name, value in metrics.items()}
