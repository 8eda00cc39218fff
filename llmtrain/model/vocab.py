"""Resizes the embedding and the head, with rows for tokens that a model has not seen."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_embedding(weight: Tensor, rows: int, used: int | None = None) -> Tensor:
    """Returns `weight` [V, H] of an embedding or a head with `rows` rows: [rows, H], same dtype and device.

    The first `used` rows (None = all) belong to tokens: they are copied bit for bit, or cut to `rows`. Every other row
    is their mean, also where padding was before. A new token that starts as the mean is at most as likely an output as
    the old ones are on average (Jensen's inequality; Hewitt 2021, "Initializing new word embeddings"), which is why
    `transformers.resize_token_embeddings` draws close around it. Nothing is drawn here, so new rows are equal until
    they are trained. The mean is taken in fp32. Raises ValueError where `rows` or `used` is out of range.
    """
    used = len(weight) if used is None else used
    if rows < 1 or not 1 <= used <= len(weight):
        raise ValueError(
            f"rows={rows}, used={used}: rows must be at least 1 and used in 1 .. {len(weight)}, the rows there are"
        )
    new = weight.new_empty(rows, weight.size(1))
    new[:used] = weight[: min(rows, used)]
    new[used:] = weight[:used].mean(0, dtype=torch.float32).to(weight.dtype)
    return new
