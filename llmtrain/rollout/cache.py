"""Keys and values of the sequences being decoded: one static block of memory, a row (slot) a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import LayerCache

BUCKET_TOKENS = 64  # attended lengths are rounded up to this: few shapes, little masked work


def round_up(tokens: int) -> int:
    """To a whole number of buckets."""
    return -(-tokens // BUCKET_TOKENS) * BUCKET_TOKENS


class Recorder:
    """A LayerCache that keeps what every layer computes, in layer order: the prompt's keys and values."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(k)
        self.values.append(v)
        return k, v


class KVCache:
    """keys, values [layers, slots, kv heads, tokens, head_dim]. Used rows are always the first ones."""

    def __init__(self, config: ModelConfig, slots: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        head_dim = config.head_dim or config.hidden_size // config.num_heads
        self.shape = (config.num_layers, slots, config.num_kv_heads, tokens, head_dim)
        # zeros, not empty: a masked NaN would still reach the output, as 0 * NaN
        self.keys = torch.zeros(self.shape, dtype=dtype, device=device)
        self.values = torch.zeros(self.shape, dtype=dtype, device=device)

    def holds(self, slots: int, tokens: int) -> bool:
        """Whether it is large enough."""
        return slots <= self.shape[1] and tokens <= self.shape[3]

    def fill(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Start a row with a prompt's keys and values [layers, kv heads, T, head_dim]."""
        self.keys[:, row, :, : keys.size(2)] = keys
        self.values[:, row, :, : values.size(2)] = values

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a row over another."""
        for block in (self.keys, self.values):
            block[:, target, :, :tokens] = block[:, source, :, :tokens]

    def decoding(self, positions: Sequence[int]) -> tuple[Tensor, list[LayerCache]]:
        """For one new token in each of the first rows, at `positions`: the mask and a LayerCache for every layer."""
        device = self.keys.device
        attended = min(round_up(max(positions) + 1), self.shape[3])
        rows, at = torch.arange(len(positions), device=device), torch.tensor(positions, device=device)
        mask = torch.arange(attended, device=device) <= at[:, None]

        def layer(keys: Tensor, values: Tensor) -> LayerCache:
            def append(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
                return keys[: len(rows), :, :attended], values[: len(rows), :, :attended]

            return append

        return mask[:, None, None], [layer(*pair) for pair in zip(self.keys, self.values, strict=True)]
