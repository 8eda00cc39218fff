"""Measures perplexity on held-out text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from llmtrain.losses.token import text_measures
from llmtrain.types import Batch


@torch.no_grad()
def perplexity(
    model: nn.Module, batches: Iterable[Batch], bytes_per_token: float, autocast: torch.dtype | None = None
) -> dict[str, float]:
    """Returns the mean negative log-likelihood over the `loss_mask` of all batches, and measures derived from it.

    `model` is a Decoder; `autocast` the compute type (None: that of the weights). The result holds `loss` (nats a
    token), `perplexity` = exp(loss) and `bits_per_byte` = loss / (ln 2 * bytes_per_token), which does not depend on the
    tokenizer. Raises ValueError if no token is to be predicted.
    """
    device = next(model.parameters()).device
    nats, tokens = 0.0, 0
    for batch in batches:
        b = batch.to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logprobs, _ = model(b.input_ids, b.positions, b.segment_ids, b.ends, b.labels)
        nats -= logprobs[b.loss_mask].double().sum().item()
        tokens += int(b.loss_mask.sum())
    if tokens == 0:
        raise ValueError("no token to predict: perplexity needs held-out text; raise data.sources[].held_out")
    return text_measures(nats / tokens, bytes_per_token)
