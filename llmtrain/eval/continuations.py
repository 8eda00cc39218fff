"""Scores given texts: what a model thinks of words that it did not choose."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.model.decoder import Decoder

Continuation = tuple[Sequence[int], Sequence[int]]
"""Holds (tokens that are given, tokens that follow)."""


@torch.inference_mode()
def continuation_logprobs(
    model: Decoder, rows: Sequence[Continuation], device: torch.device, batch_tokens: int = 8192
) -> list[float]:
    """Returns for each row the sum of the log-probs of the tokens that follow, at temperature 1, in nats.

    Rows that differ in their last token alone share a forward, such as the two answers to one question. Logits are
    computed for the tokens that follow only. Raises ValueError when one of the two parts is empty.
    """
    if not all(given and following for given, following in rows):
        raise ValueError("a continuation needs at least one token before it and one of its own")
    owners: dict[tuple[int, ...], list[int]] = {}
    for number, (given, following) in enumerate(rows):
        owners.setdefault((*given, *following[:-1]), []).append(number)
    waiting, totals = sorted(owners, key=len), [0.0] * len(rows)
    while waiting:
        count = max(1, batch_tokens // len(waiting[-1]))
        inputs, waiting = waiting[-count:], waiting[:-count]
        hidden = _hidden(model, inputs, device)
        places = [(i, number) for i, ids in enumerate(inputs) for number in owners[ids]]
        asked = [hidden[i, len(rows[n][0]) - 1 : len(inputs[i])] for i, n in places]
        labels = torch.tensor([token for _, n in places for token in rows[n][1]], device=device)
        logprobs = model.head(torch.cat(asked)[None], labels[None])[0][0].double()
        for (_, n), own in zip(places, logprobs.split([len(each) for each in asked]), strict=True):
            totals[n] = float(own.sum())
    return totals


def _hidden(model: Decoder, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Returns the last hidden states [B, T, hidden] of rows, padded on the right, where attention never looks."""
    trunk, width = copy.copy(model), max(map(len, rows))
    trunk._modules = {**model._modules, "head": None}
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return trunk(ids, torch.arange(width, device=device).expand_as(ids))
