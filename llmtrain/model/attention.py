"""Attention of query heads to (fewer) key/value heads, and the grouped-query layer (arXiv 2305.13245)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.arch.mup import score_factor
from llmtrain.config.schema import ModelConfig
from llmtrain.model.linear import Linear
from llmtrain.model.norm import head_norm
from llmtrain.model.rope import apply_rope

LayerCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the new keys and values [B, kv heads, T, head_dim], returns those to attend to."""

PLAIN_TOKENS = 512
HIDDEN = -1e30  # a score that softmax turns into 0


class View(NamedTuple):
    """What the layers of one kind are told about a row."""

    cos: Tensor | None  # [B, 1, T, rotated dims / 2]; None = positions are learned
    sin: Tensor | None
    mask: Tensor | None  # as `Attention.attend` takes it; None = causal
    padding: Tensor | None = None  # [B, T] bool, True = no token; None = all are tokens


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v. q [B, heads, T, head_dim]; k, v [B, kv heads, S, head_dim], where values may
    be of another width.

    `mask` is bool, True = may look, broadcastable to [B, heads, T, S]; None = causal. With `softcap` scores s become
    softcap tanh(s / softcap).
    """
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) > 1 and k.size(2) <= PLAIN_TOKENS
    if on_cpu or softcap is not None:
        return plain_attention(q, k, v, mask, softcap)
    group = q.size(1) // k.size(1)
    if q.size(2) == 1 and group > 1 and mask is not None and mask.size(1) == 1:
        # Decoding: the queries that share a key/value head as one block; on a CPU in bf16 `enable_gqa` is 4x slower.
        folded = q.view(q.size(0), k.size(1), group, -1)
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(*q.shape[:3], v.size(-1))
    if q.device.type == "cuda" and group > 1 and mask is not None:  # with both, only the unfused kernel takes it
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """The formula as it stands. On a CPU in bf16, forward and backward, it is twice as fast as the fused kernel at 256
    tokens, a little faster at PLAIN_TOKENS, and slower beyond; in fp32 the fused one wins."""
    B, H, T, D = q.shape
    if mask is None:
        mask = torch.ones(T, k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - T)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, HIDDEN)
    grouped = (q * D**-0.5).reshape(B, k.size(1), -1, D)  # the queries of a key/value head as one block
    scores = (grouped @ k.transpose(-1, -2)).view(B, H, T, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias  # in place, the backward would copy both
    return (scores.softmax(-1).view(B, k.size(1), -1, k.size(2)) @ v).view(B, H, T, v.size(-1))


def attention_mask(
    segment_ids: Tensor,
    branch_ids: Tensor | None,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Who sees whom, bool [B, 1, Q, K]: earlier, same segment, and on the trunk or the own branch; with a `window`,
    of `positions` [B, T], no further back than that.

    `queries` [Q] and `keys` [K] are places in the row, whose ids are given whole; None = all of them.
    """
    whole = torch.arange(segment_ids.size(1), device=segment_ids.device)
    queries, keys = whole if queries is None else queries, whole if keys is None else keys
    mask = (queries[:, None] >= keys) & (segment_ids[:, queries, None] == segment_ids[:, None, keys])
    if branch_ids is not None:
        branch = branch_ids[:, None, keys]
        mask = mask & ((branch == 0) | (branch_ids[:, queries, None] == branch))
    if window is not None:
        assert positions is not None
        mask = mask & (positions[:, queries, None] - positions[:, None, keys] < window)
    return mask[:, None]


class Attention(nn.Module):
    """q, k, v, o projections around `attention`. x [B, T, hidden] -> the same shape. Head counts are read from the
    weights, so shards run unchanged."""

    kv_heads: slice | None = None  # of all K/V heads, those that this rank's query heads share (see parallel.tensor)

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
        # `attention` divides by sqrt(head_dim) whatever the published scale is
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
        """Normed, rotated and scaled."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if view.cos is not None and view.sin is not None:
            q, k = (apply_rope(x, view.cos, view.sin, self.interleaved) for x in (q, k))
        return (q if self.q_factor == 1.0 else q * self.q_factor), k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attention`. A plan may replace it, and `Decoder.visibility` with it."""
        return attention(q, k, v, mask, self.softcap)
