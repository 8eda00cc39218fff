"""Scores given texts: what a model thinks of words that it did not choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.eval.sharing import Packed, batches, merged, plan
from llmtrain.model.decoder import Decoder
from llmtrain.rollout.cache import Recorder
from llmtrain.rollout.stem import Behind, Stem, masks_behind, without_head

HEAD_TOKENS = 512  # whose logits exist at one time; with fewer the product is slower on a CPU

Continuation = tuple[Sequence[int], Sequence[int]]
"""Holds (tokens that are given, tokens that follow)."""


class Scored(NamedTuple):
    """Holds what a model says of a continuation."""

    logprob: float  # the sum over the tokens that follow, in nats
    greedy: bool  # each of them is the likeliest one at its place


def continuation_logprobs(
    model: Decoder, rows: Sequence[Continuation], device: torch.device, batch_tokens: int = 8192
) -> list[float]:
    """Returns the log-probs of `continuations`."""
    return [scored.logprob for scored in continuations(model, rows, device, batch_tokens)]


@torch.inference_mode()
def continuations(
    model: Decoder, rows: Sequence[Continuation], device: torch.device, batch_tokens: int = 8192
) -> list[Scored]:
    """Returns for each row the sum of the log-probs of the tokens that follow, at temperature 1, and whether greedy
    decoding would choose them.

    Tokens that rows begin with alike are computed once (see `eval.sharing`); equal rows have equal results, to the bit.
    Logits are computed for the tokens that follow only, the softmax in fp32. What a row is computed with, and
    `batch_tokens`, the most tokens in a forward (padding counted; a longer row is one by itself), change a result by
    rounding only. Raises ValueError when one of the two parts is empty.
    """
    if not all(given and following for given, following in rows):
        raise ValueError("a continuation needs at least one token before it and one of its own")
    if not rows:
        return []
    leaves, owners = merged([(*given, *following[:-1]) for given, following in rows])
    of_leaf: list[list[int]] = [[] for _ in leaves]
    for number, owner in enumerate(owners):
        of_leaf[owner].append(number)
    root = plan(leaves, [min(len(rows[n][0]) - 1 for n in numbers) for numbers in of_leaf])
    scoring, waiting = _Scoring(model, rows, of_leaf, device), [(root, None)]
    while waiting:
        node, stem = waiting.pop()
        if node.tokens:
            stem = scoring.extended(stem, leaves[node.leaf][: node.tokens])
        for batch in batches(node.rows, batch_tokens):
            scoring.score(batch, stem)
        waiting += [(longer, stem) for longer in node.stems]
    return [Scored(*each) for each in zip(scoring.totals.tolist(), (scoring.misses == 0).tolist(), strict=True)]


class _Scoring:
    """Adds up the results of all rows."""

    def __init__(
        self, model: Decoder, rows: Sequence[Continuation], of_leaf: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        self.model, self.trunk, self.device = model, without_head(model), device
        self.rows, self.of_leaf = rows, of_leaf
        self.totals = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self.misses = torch.zeros(len(rows), dtype=torch.int64, device=device)

    def extended(self, stem: Stem | None, ids: Sequence[int]) -> Stem:
        """Returns the stem of the tokens `ids`, which begin with those of `stem`."""
        recorder, start = Recorder(), stem.tokens if stem else 0
        positions = torch.arange(start, len(ids), device=self.device)[None]
        new = torch.tensor(ids[start:], device=self.device)[None]
        ends = torch.full_like(positions, len(ids))
        masks = masks_behind(self.model, start, positions, ends) if stem else None
        behind = Behind(stem) if stem else lambda *kv: kv
        caches = dict.fromkeys(self.model.layers, lambda *kv: recorder(*behind(*kv)))
        self.trunk(new, positions, masks=masks, caches=caches)
        return Stem(recorder.keys, recorder.values)

    def score(self, batch: Sequence[Packed], stem: Stem | None) -> None:
        """Computes some rows behind a stem, and adds what their tokens get to the totals."""
        width, start = max(len(row.ids) for row in batch), stem.tokens if stem else 0
        ids = self._padded([row.ids for row in batch], width)
        positions = self._padded([row.positions for row in batch], width)
        ends = self._padded([row.ends for row in batch], width, width)
        masked = stem is not None or len(batch[0].leaves) > 1
        masks = masks_behind(self.model, start, positions, ends) if masked else None
        caches = dict.fromkeys(self.model.layers, Behind(stem)) if stem else None
        hidden = self.trunk(ids, positions, masks=masks, caches=caches).flatten(0, 1)
        owners, places, labels = self._asked([(i * width, row) for i, row in enumerate(batch)], start)
        logprobs, greedy = label_scores(self.model, hidden, places, labels)
        self.totals.index_add_(0, owners, logprobs.double())
        self.misses.index_add_(0, owners, (~greedy).long())

    def _padded(self, rows: Sequence[Sequence[int]], width: int, filler: int = 0) -> Tensor:
        """Returns rows [B, width], padded on the right, where attention never looks. (Padding sees itself.)"""
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=self.device)

    def _asked(self, batch: Sequence[tuple[int, Packed]], start: int) -> Tensor:
        """Returns [3, n]: which row asks, the place that answers, and the token it asks for. `batch` holds the place of
        the first token of each row."""
        found = []
        for first, packed in batch:
            for leaf, path in zip(packed.leaves, packed.paths, strict=True):
                for number in self.of_leaf[leaf]:
                    given, following = self.rows[number]
                    places = path[len(given) - 1 - start :]
                    found += [(number, first + place, token) for place, token in zip(places, following, strict=False)]
        return torch.tensor(found, device=self.device).T


def label_scores(model: Decoder, hidden: Tensor, places: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-probs (fp32) of labels and whether they are the likeliest tokens, both [n].

    `hidden` is [N, hidden]; `places` [n] says which of them answers for each of `labels` [n]. Of equal logits the first
    is the likeliest. The logits of a place that is asked several times are computed once.
    """
    places, asked = places.unique(return_inverse=True)
    logprobs, greedy = torch.empty(len(labels), device=hidden.device), torch.empty_like(labels, dtype=torch.bool)
    for start in range(0, len(places), HEAD_TOKENS):
        logits = model.head(hidden[places[start : start + HEAD_TOKENS]]).float()
        (here,) = ((asked >= start) & (asked < start + HEAD_TOKENS)).nonzero(as_tuple=True)
        rows, own = asked[here] - start, labels[here]
        top, chosen = logits.amax(-1), logits[rows, own]  # `max`, which gives the place too, is 4x slower
        likeliest = chosen == top[rows]
        likeliest[likeliest.clone()] = logits[rows[likeliest]].argmax(-1) == own[likeliest]  # the first of equal ones
        log_total = logits.sub_(top[:, None]).exp_().sum(-1).log()
        logprobs[here], greedy[here] = chosen - top[rows] - log_total[rows], likeliest
    return logprobs, greedy
