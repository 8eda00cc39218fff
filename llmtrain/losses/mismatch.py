"""Corrects for a generator whose numbers are not the trainer's: tokens are drawn from one distribution and trained as
if from another.

Every correction maps log w [B, T], w = p_trainer / p_generator of a token under the same weights (0 where the batch
trains nothing), to the factor of the token's objective, [B, T], without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmtrain.losses.sequence import sequence_means
from llmtrain.types import Batch

Correction = Callable[[Tensor, Batch], Tensor]


def truncate(log_w: Tensor, batch: Batch, cap: float) -> Tensor:
    """Returns min(w, cap): truncated importance sampling (TIS; Ionides 2008, J. Comput. Graph. Stat. 17)."""
    return log_w.exp().clamp(max=cap)


def mask_tokens(log_w: Tensor, batch: Batch, low: float, high: float) -> Tensor:
    """Returns w where low <= w <= high, else 0: the token is left out (IcePop, arXiv 2510.18855)."""
    w = log_w.exp()
    return torch.where((w >= low) & (w <= high), w, 0.0)


def mask_sequences(log_w: Tensor, batch: Batch, low: float, high: float, cap: float) -> Tensor:
    """Returns min(w, cap) in sequences whose geometric mean of w lies in [low, high]; others are left out whole."""
    mean = sequence_means(log_w, batch.loss_mask, batch).exp()
    return torch.where((mean >= low) & (mean <= high), truncate(log_w, batch, cap), 0.0)


def correction_of(form: str, cap: float, low: float, high: float) -> Correction | None:
    """Returns the correction of a name, `off` (None), `truncate`, `mask` or `mask_seqs`, with what it reads of the
    bounds."""
    match form:
        case "truncate":
            return partial(truncate, cap=cap)
        case "mask":
            return partial(mask_tokens, low=low, high=high)
        case "mask_seqs":
            return partial(mask_sequences, low=low, high=high, cap=cap)
    assert form == "off", form
    return None


def off_policy(log_ratio: Tensor, advantages: Tensor, batch: Batch, delta: float) -> Tensor:
    """Returns where, [B, T] bool, a sequence is too far off the policy to be pushed down (DeepSeek-V3.2, arXiv
    2512.02556): its advantage is negative and the mean of log p_generator - log p over it is above
    `delta`. `log_ratio` is log p - log p_generator, of the policy as it is now."""
    return (advantages < 0) & (sequence_means(-log_ratio, batch.loss_mask, batch) > delta)
