"""Computes tokens that several rows begin with once: what follows them attends to their keys and values."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.model.decoder import Decoder

STEM_TOKENS = 32  # a shorter beginning costs more to keep than to compute with every row
STEM_SHARE = 1 / 4  # of the longest prompt: rows behind a stem need a mask [T, S], without which attention is faster


@dataclass(frozen=True)
class Stem:
    """Holds the beginning of several rows: for each layer its keys and values, [1, heads, tokens, dim]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def tokens(self) -> int:
        return self.keys[0].size(2)


class Behind:
    """Puts a stem before the keys and values of rows; a LayerCache for all layers, in layer order."""

    def __init__(self, stem: Stem) -> None:
        self.layers = zip(stem.keys, stem.values, strict=True)

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = next(self.layers)
        return _joined(keys, k), _joined(values, v)


def _joined(stem: Tensor, own: Tensor) -> Tensor:
    return torch.cat([stem.expand(own.size(0), -1, -1, -1), own], 2)


def without_head(model: Decoder) -> Decoder:
    """Returns the modules of a model without the head: it gives hidden states."""
    trunk = copy.copy(model)
    trunk._modules = {**model._modules, "head": None}
    return trunk


def masks_behind(model: Decoder, stem_tokens: int, positions: Tensor, ends: Tensor) -> dict[str, Tensor]:
    """Returns for each kind of layer which query sees which key, bool [B, 1, T, stem + T].

    The token at place j of a row is seen by those at places j to ends[j] - 1 of the row; `ends` and `positions` are
    [B, T]. All tokens of the stem are seen, in a sliding-window layer those that lie in the window.
    """
    places = torch.arange(positions.size(1), device=positions.device)
    own = (places <= places[:, None]) & (places[:, None] < ends[:, None])
    mask = torch.cat([own.new_ones(*own.shape[:2], stem_tokens), own], -1)
    found = {}
    for kind in dict.fromkeys(block.kind for block in model.layers.values()):
        found[kind] = mask[:, None]
        if kind == "sliding":
            before = torch.arange(stem_tokens, device=positions.device).expand(len(positions), -1)
            age = positions[:, :, None] - torch.cat([before, positions], 1)[:, None]
            found[kind] = (mask & (age < model.config.sliding_window))[:, None]
    return found
