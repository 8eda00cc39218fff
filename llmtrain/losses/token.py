"""The loss of pretraining and supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from llmtrain.losses.reduce import masked_sum
from llmtrain.types import Batch, Metrics, Scores


def token_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood, -sum log p(label), over `batch.loss_mask`: (sum in nats, no metrics).

    Divided by the number of trained tokens this is the
    cross-entropy; its exponential the perplexity.
    """
    assert scores.logprobs is not None
    return -masked_sum(scores.logprobs, batch.loss_mask), {}
