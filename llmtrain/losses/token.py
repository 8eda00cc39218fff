"""Defines the loss of pretraining and supervised fine-tuning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmtrain.losses.reduce import masked_sum
from llmtrain.types import Batch, Metrics, Scores


def token_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    """Returns the negative log-likelihood, -sum log p(label), over `batch.loss_mask`: (sum in nats, no metrics).

    Divided by the number of trained tokens this is the cross-entropy; its exponential the perplexity.
    """
    assert scores.logprobs is not None
    return -masked_sum(scores.logprobs, batch.loss_mask), {}


def text_measures(loss: float, bytes_per_token: float) -> dict[str, float]:
    """Returns what a mean loss (nats a token) says of a text: `loss`, `perplexity` = exp(loss), and `bits_per_byte` =
    loss / (ln 2 * bytes_per_token), which does not depend on the tokenizer."""
    return {
        "loss": loss,
        "perplexity": perplexity_of(loss),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
    }


def perplexity_of(loss: float) -> float:
    """Returns exp(loss), inf where that is too large for a number."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())
