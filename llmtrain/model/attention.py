"""Defines the grouped-query attention layer (arXiv 2305.13245) and which tokens see which."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.arch.mup import score_factor
from llmtrain.config.schema import ModelConfig
from llmtrain.model.kernels.sdpa import attention
from llmtrain.model.linear import Linear
from llmtrain.model.norm import head_norm
from llmtrain.model.rope import apply_rope

LayerCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the new keys and values [B, kv heads, T, head_dim] and returns those to attend to."""


class View(NamedTuple):
    """Holds what all layers of one kind are told about positions and visibility."""

    cos: Tensor | None  # [B, 1, T, rotated dims / 2]; None = positions are learned
    sin: Tensor | None
    mask: Tensor | None  # as `Attention.attend` takes it; None = causal
    padding: Tensor | None = None  # [B, T] bool, True = no token; None = all are tokens


def attention_mask(
    segment_ids: Tensor,
    ends: Tensor | None,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns which query sees which key, bool [B, 1, Q, K].

    A key is seen if it is not later, of the same segment, and the query's place lies before the key's end; with
    `window`, it must also be less than so many `positions` [B, T] back. `queries` [Q] and `keys` [K] are indices into
    the row, None = all of it; `segment_ids` and `ends` (see `types.Batch`) [B, T] always cover the whole row.
    """
    whole = torch.arange(segment_ids.size(1), device=segment_ids.device)
    queries, keys = whole if queries is None else queries, whole if keys is None else keys
    mask = (queries[:, None] >= keys) & (segment_ids[:, queries, None] == segment_ids[:, None, keys])
    if ends is not None:
        mask = mask & (queries[:, None] < ends[:, None, keys])
    if window is not None:
        assert positions is not None
        mask = mask & (positions[:, queries, None] - positions[:, None, keys] < window)
    return mask[:, None]


class Attention(nn.Module):
    """Computes o(softmax(q k^T / sqrt(head_dim)) v), x [B, T, hidden] -> the same shape.

    Head counts are read from the weights, so shards run unchanged.
    """

    kv_heads: slice | None = None  # the K/V heads that this rank's query heads share; None = all (see parallel.tensor)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim or config.hidden_size // config.num_heads
        hidden, q, kv = config.hidden_size, config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q = Linear(hidden, q, bias=config.qkv_bias)
        self.k = Linear(hidden, kv, bias=config.qkv_bias)
        self.v = Linear(hidden, kv, bias=config.qkv_bias)
        self.o = Linear(q, hidden, bias=config.o_bias)
        self.q_norm = head_norm(config) if config.qk_norm else None
        self.k_norm = head_norm(config) if config.qk_norm else None
        self.interleaved, self.softcap = config.rope_interleaved, config.attention_softcap
        # `attention` always divides by sqrt(head_dim); this factor makes another published scale of that
        scale = config.attention_scale
        self.q_factor = score_factor(config) if scale is None else scale * self.head_dim**0.5

    def forward(self, x: Tensor, view: View, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.kv_heads is not None:
            k, v = k[:, self.kv_heads], v[:, self.kv_heads]
        q, k = self.prepared(q, k, view)
        if cache is not None:
            k, v = cache(k, v)
        return self.o(self.attend(q, k, v, view.mask).transpose(1, 2).reshape(B, T, -1))

    def prepared(self, q: Tensor, k: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Returns queries and keys, normed, rotated and scaled."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if view.cos is not None and view.sin is not None:
            q, k = (apply_rope(x, view.cos, view.sin, self.interleaved) for x in (q, k))
        return (q if self.q_factor == 1.0 else q * self.q_factor), k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Calls `attention`. A backend or context parallelism that replaces it replaces `Decoder.visibility` too."""
        return attention(q, k, v, mask, self.softcap)
