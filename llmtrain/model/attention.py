"""Grouped-query attention (arXiv 2305.13245). Head counts are read from the weights, so shards run unchanged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.schema import ModelConfig
from llmtrain.model.rope import apply_rope

LayerCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the new keys and values [B, kv heads, T, head_dim], returns those to attend to."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v. q [B, heads, T, head_dim]; k, v [B, kv heads, S, head_dim].

    `mask` is bool, True = may look, broadcastable to [B, heads, T, S]; None = causal.
    """
    group = q.size(1) // k.size(1)
    if q.size(2) == 1 and group > 1 and mask is not None and mask.size(1) == 1:
        # Decoding: the queries that share a key/value head as one block; on a CPU in bf16 `enable_gqa` is 4x slower.
        folded = q.view(q.size(0), k.size(1), group, -1)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).view(q.shape)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )


def attention_mask(segment_ids: Tensor, branch_ids: Tensor | None) -> Tensor:
    """Who sees whom, bool [B, 1, T, T]: earlier, same segment, and on the trunk or the own branch."""
    T = segment_ids.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=segment_ids.device).tril()
    mask = causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if branch_ids is not None:
        mask = mask & ((branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :]))
    return mask[:, None]


class Attention(nn.Module):
    """q, k, v, o projections around `attention`. x [B, T, hidden] -> the same shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim or config.hidden_size // config.num_heads
        self.q = nn.Linear(config.hidden_size, config.num_heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.num_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.num_kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(config.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache(k, v)
        return self.o(attention(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))
