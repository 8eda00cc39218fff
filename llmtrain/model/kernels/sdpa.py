"""Computes scaled dot-product attention of query heads to (fewer) key/value heads, in the form that is fastest on the
device: torch's fused kernels, or the plain formula, which is also the only one with a softcap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PLAIN_TOKENS = 512  # keys up to which the plain formula is the faster on a CPU in bf16
HIDDEN = -1e30  # a score that softmax turns into 0


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None = None) -> Tensor:
    """Returns softmax(q k^T / sqrt(head_dim)) v, [B, heads, T, value width].

    q [B, heads, T, head_dim]; k [B, kv heads, S, head_dim]; v [B, kv heads, S, value width]. `mask` is bool, True = may
    look, broadcastable to [B, heads, T, S]; None = causal. With `softcap` scores s become softcap tanh(s / softcap).
    """
    if softcap is not None or _plain_is_faster(q, k):
        return plain_attention(q, k, v, mask, softcap)
    grouped = q.size(1) > k.size(1)
    if grouped and mask is not None and q.size(2) == 1 and mask.size(1) == 1:
        return _decoded(q, k, v, mask)
    if grouped and mask is not None and q.device.type == "cuda":  # with both, only the unfused kernel takes it
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    """Tells whether `plain_attention` is faster than the fused kernel: on a CPU in bf16, forward and backward, it takes
    half the time at 256 tokens and a little less at PLAIN_TOKENS; beyond, and in fp32, the fused one wins."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) > 1 and k.size(2) <= PLAIN_TOKENS


def _decoded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Returns the attention of one query a head, where the queries that share a key/value head are computed as one
    block: on a CPU in bf16 `enable_gqa` is 4x slower."""
    folded = q.view(q.size(0), k.size(1), q.size(1) // k.size(1), -1)
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(*q.shape[:3], v.size(-1))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """Returns what `attention` does, by the formula as it stands, holding all scores [B, heads, T, S]."""
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
