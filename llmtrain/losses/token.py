"""The loss of pretraining and supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from llmtrain.losses.reduce import masked_sum
from llmtrain.types import Batch


def token_loss(scores: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood, -sum log p(label), over `batch.loss_mask`: (sum in nats, no metrics).

    `scores` are (log-probs, entropies), [B, T] each. Divided by the number of trained tokens this is the
    cross-entropy; its exponential the perplexity.
    """
    logprobs, _ = scores
    return -masked_sum(logprobs, batch.loss_mask), {}
