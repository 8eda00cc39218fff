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

PLAIN_TOKENS = 512
HIDDEN = -1e30  # a score that softmax turns into 0


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v. q [B, heads, T, head_dim]; k, v [B, kv heads, S, head_dim].

    `mask` is bool, True = may look, broadcastable to [B, heads, T, S]; None = causal.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) > 1 and k.size(2) <= PLAIN_TOKENS:
        return _plain_attention(q, k, v, mask)
    group = q.size(1) // k.size(1)
    if q.size(2) == 1 and group > 1 and mask is not None and mask.size(1) == 1:
        # Decoding: the queries that share a key/value head as one block; on a CPU in bf16 `enable_gqa` is 4x slower.
        folded = q.view(q.size(0), k.size(1), group, -1)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)
    if q.device.type == "cuda" and group > 1 and mask is not None:  # with both, only the unfused kernel takes it
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula as it stands. On a CPU in bf16 its backward is two to four times faster than that of the fused
    kernel, up to PLAIN_TOKENS; in fp32 the fused one wins."""
    B, H, T, D = q.shape
    if mask is None:
        mask = torch.ones(T, k.size(2), dtype=torch.bool).tril(k.size(2) - T)
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, HIDDEN)
    grouped = (q * D**-0.5).reshape(B, k.size(1), -1, D)  # the queries of a key/value head as one block
    scores = (grouped @ k.transpose(-1, -2)).view(B, H, T, -1) + bias  # in place, the backward would copy both
    return (scores.softmax(-1).view(B, k.size(1), -1, k.size(2)) @ v).view(q.shape)


def attention_mask(
    segment_ids: Tensor, branch_ids: Tensor | None, queries: Tensor | None = None, keys: Tensor | None = None
) -> Tensor:
    """Who sees whom, bool [B, 1, Q, K]: earlier, same segment, and on the trunk or the own branch.

    `queries` [Q] and `keys` [K] are places in the row, whose ids are given whole; None = all of them.
    """
    whole = torch.arange(segment_ids.size(1), device=segment_ids.device)
    queries, keys = whole if queries is None else queries, whole if keys is None else keys
    mask = (queries[:, None] >= keys) & (segment_ids[:, queries, None] == segment_ids[:, None, keys])
    if branch_ids is not None:
        branch = branch_ids[:, None, keys]
        mask = mask & ((branch == 0) | (branch_ids[:, queries, None] == branch))
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
        return self.o(self.attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attention`. A plan may replace it, and `Decoder.visibility` with it."""
        return attention(q, k, v, mask)
