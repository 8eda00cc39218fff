"""Holds the KV cache of the sequences being decoded: for each layer one static tensor, with a row (slot) a sequence.

A token takes 2 x K/V heads x head_dim numbers in a layer, with latent attention kv_rank + rope_head_dim in total. A row
has room for all tokens of its sequence, in a sliding-window layer for as many as the window is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.arch.attention import cache_row, round_up
from llmtrain.arch.parameters import layer_type
from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import LayerCache


class Recorder:
    """Records the keys and values that every layer computes for a prompt, in layer order; a LayerCache."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(k)
        self.values.append(v)
        return k, v


@dataclass(frozen=True)
class Kept:
    """Describes one row of the cache in one layer.

    The token at position t lies at index t % tokens, so in a sliding-window layer the row is a ring buffer.
    """

    kind: str  # layer type: full or sliding
    heads: int
    key_dim: int
    value_dim: int
    tokens: int
    window: int | None  # number of tokens that a token attends to; None = all

    def places(self, positions: Tensor) -> Tensor:
        """Returns the indices at which tokens lie."""
        return positions % self.tokens

    def attended(self, length: int) -> int:
        """Returns how many indices must be attended to when the longest sequence has `length` tokens."""
        return min(round_up(length), self.tokens)

    def mask(self, positions: Tensor, length: int) -> Tensor:
        """Returns the mask [rows, 1, 1, attended] bool: which indices the newest tokens, at `positions`, attend to."""
        places = torch.arange(self.attended(length), device=positions.device)
        age = (positions[:, None] - places) % self.tokens
        seen = age <= positions[:, None]  # others are left from an earlier sequence
        return (seen if self.window is None else seen & (age < self.window))[:, None, None]


def kept(config: ModelConfig, layer: int, tokens: int) -> Kept:
    """Returns the description of a layer's rows for sequences of at most `tokens`."""
    return Kept(layer_type(config, layer), *cache_row(config, layer, tokens))


class KVCache:
    """Holds keys and values for each layer, [slots, heads, tokens, dim]. Used rows are always the first ones."""

    def __init__(self, config: ModelConfig, slots: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.tokens, self.device = slots, tokens, device
        self.layers = [kept(config, layer, tokens) for layer in range(config.num_layers)]
        # zeros, not empty: a masked NaN would still reach the output, as 0 * NaN
        like = {"dtype": dtype, "device": device}
        self.keys = [torch.zeros(slots, x.heads, x.tokens, x.key_dim, **like) for x in self.layers]
        self.values = [torch.zeros(slots, x.heads, x.tokens, x.value_dim, **like) for x in self.layers]

    @property
    def memory_bytes(self) -> int:
        """Returns the bytes of all keys and values."""
        return sum(block.nbytes for block in (*self.keys, *self.values))

    def holds(self, slots: int, tokens: int) -> bool:
        """Returns whether the cache is large enough."""
        return slots <= self.slots and tokens <= self.tokens

    def fill(self, row: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Starts a row with a prompt's keys and values, for each layer [heads, T, dim].

        A sliding-window layer keeps only those that later tokens can still attend to.
        """
        T = keys[0].size(1)
        for blocks, new in ((self.keys, keys), (self.values, values)):
            for layer, block, x in zip(self.layers, blocks, new, strict=True):
                first = max(0, T - layer.tokens)
                block[row, :, layer.places(torch.arange(first, T, device=self.device))] = x[:, first:]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` of a row over another."""
        for block in (*self.keys, *self.values):
            block[target, :, :tokens] = block[source, :, :tokens]

    def clean(self) -> None:
        """Writes 0 over all that is not finite: a masked NaN would still reach the output, as 0 * NaN."""
        for block in (*self.keys, *self.values):
            block.nan_to_num_(0.0, 0.0, 0.0)

    def decoding(self, positions: Sequence[int]) -> tuple[dict[str, Tensor], list[LayerCache]]:
        """Returns the masks by layer type and a LayerCache for every layer, for one new token in each of the first
        rows.

        `positions` are those of the new tokens.
        """
        rows, length = torch.arange(len(positions), device=self.device), max(positions) + 1
        at = torch.tensor(positions, device=self.device)
        kinds = {layer.kind: layer for layer in self.layers}
        places = {kind: layer.places(at) for kind, layer in kinds.items()}

        def cache(layer: Kept, keys: Tensor, values: Tensor) -> LayerCache:
            place, attended = places[layer.kind], layer.attended(length)

            def append(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                keys[rows, :, place], values[rows, :, place] = k[:, :, 0], v[:, :, 0]
                return keys[: len(rows), :, :attended], values[: len(rows), :, :attended]

            return append

        masks = {kind: layer.mask(at, length) for kind, layer in kinds.items()}
        return masks, [cache(*layer) for layer in zip(self.layers, self.keys, self.values, strict=True)]
