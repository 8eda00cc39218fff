"""Computes attention tile by tile (see `tile_plan`), in memory linear in the tokens of a row, forward and backward.

The softmax over several tiles is merged by the logsumexp of each (arXiv 2205.14135, section 3.1); the backward gets
that of all tiles together, so that the probabilities of each are the final ones. On a CPU a tile is one call of the
fused kernel behind `scaled_dot_product_attention`, 5 to 20 times faster than the formula written out, which serves
elsewhere and where scores have a softcap.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from llmtrain.model.kernels.sdpa import HIDDEN
from llmtrain.model.kernels.tile_plan import Span, Tile, Tiles

SIDE_TOKENS = 1024  # the most queries and keys whose scores exist at one time, where the formula is written out
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tile_side(device: torch.device, softcap: float | None) -> int | None:
    """Returns the most queries and keys that a tile may have; None = any, scores are never stored."""
    return None if is_fused(device, softcap) else SIDE_TOKENS


def is_fused(device: torch.device, softcap: float | None) -> bool:
    return device.type == "cpu" and softcap is None


# `torch.compiler.disable` would import the compiler (2 s) when this file is imported; this one does when called.
@torch._disable_dynamo  # the tiles are others in every batch
def attend_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, softcap: float | None = None) -> Tensor:
    """Returns what `model.kernels.sdpa.attention` does; what a query in no tile gets is 0."""
    return _Tiled.apply(q, k, v, tiles, softcap)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, softcap: float | None) -> Tensor:
        out, lse = nothing_seen(q, v)
        add_tiles(out, lse, q, k, v, tiles, softcap)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.softcap = tiles, softcap
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros(x.shape, device=x.device) for x in (q, k, v)]
        add_gradients(grads, grad, q, k, v, out, lse, ctx.tiles, ctx.softcap)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None


def nothing_seen(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output [B, heads, T, value width] and logsumexp [B, heads, T] of no tiles, fp32, to be added to."""
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
    return torch.zeros(*q.shape[:3], v.size(3), device=q.device), lse


def add_tiles(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, softcap: float | None = None
) -> None:
    """Merges the tiles into the softmax over those before, in place."""
    for tile in tiles.tiles:
        queries, keys, mask = _at(tile.row, tile.queries), _at(tile.row, tile.keys), tiles.mask(tile, q.device)
        if is_fused(q.device, softcap):
            found = _fused(q[queries], k[keys], v[keys], mask, tile.causal)
        else:
            found = _written_out(q[queries], k[keys], v[keys], _with_diagonal(mask, tile, q.device), softcap)
        _merge(out[queries], lse[queries], *found)


def add_gradients(
    grads: list[Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tiles,
    softcap: float | None = None,
) -> None:
    """Adds what the tiles give to the gradients of q, k and v, in place; `grad` is that of the output."""
    for tile in tiles.tiles:
        queries, keys, mask = _at(tile.row, tile.queries), _at(tile.row, tile.keys), tiles.mask(tile, q.device)
        given = (grad[queries], q[queries], k[keys], v[keys], out[queries], lse[queries])
        if is_fused(q.device, softcap):
            parts = _fused_backward(*given, mask, tile.causal)
        else:
            parts = _written_out_backward(*given, _with_diagonal(mask, tile, q.device), softcap)
        for total, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
            total[where].add_(part)


def _at(row: int, span: Span) -> tuple[slice, slice, slice]:
    """Returns the index of [B, heads, T, ...] that gives these tokens, [1, heads, tokens, ...]."""
    return slice(row, row + 1), slice(None), slice(span.index, span.index + span.stop - span.first)


def _merge(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    # The tile's own tensors stay as they are: selective rematerialisation may have kept them.
    total = torch.logaddexp(lse, tile_lse)
    out.mul_((lse - total).exp()[..., None]).add_(tile_out * (tile_lse - total).exp()[..., None])
    lse.copy_(total)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Returns (output, logsumexp of the scores, fp32)."""
    out, lse = FUSED(*_alike(q, k, v), 0.0, causal, attn_mask=_bias(mask, q.dtype), scale=q.size(3) ** -0.5)
    return out[..., : v.size(3)], lse


def _fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = max(q.size(3), v.size(3))
    grad, out = (F.pad(x, (0, width - x.size(3))) for x in (grad, out))
    options = {"attn_mask": _bias(mask, q.dtype), "scale": q.size(3) ** -0.5}
    parts = FUSED_BACKWARD(grad, *_alike(q, k, v), out, lse, 0.0, causal, **options)
    of_q, of_k, of_v = (g[..., : x.size(3)] for g, x in zip(parts, (q, k, v), strict=True))
    return of_q, *(g.unflatten(1, (k.size(1), -1)).sum(2) for g in (of_k, of_v))


def _alike(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Returns q, k and v with the heads of q and one width, as the fused kernel wants them; zeros change nothing."""
    width, copies = max(q.size(3), v.size(3)), q.size(1) // k.size(1)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    return [x if x.size(3) == width else F.pad(x, (0, width - x.size(3))) for x in (q, k, v)]


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    # HIDDEN is finite: a query may see nothing of this tile.
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, HIDDEN)


def _with_diagonal(mask: Tensor | None, tile: Tile, device: torch.device) -> Tensor | None:
    """Returns the mask of a tile, also where `tile.causal` says it."""
    tokens = tile.queries.stop - tile.queries.first
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril() if tile.causal else mask


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Returns (output, logsumexp of the scores), fp32."""
    scores = _hidden(_scores(q, k, softcap), mask)
    lse = scores.logsumexp(-1)
    probs = _by_kv_head(scores.sub_(lse[..., None]).exp_(), k)
    return (probs @ v.float()).view(*q.shape[:3], -1), lse


def _written_out_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v, fp32."""
    scores = _scores(q, k, softcap)
    slope = None if softcap is None else _by_kv_head((scores / softcap).square_().neg_().add_(1), k)
    probs = _by_kv_head(_hidden(scores, mask).sub_(lse[..., None]).exp_(), k)
    delta = _by_kv_head((grad.float() * out.float()).sum(-1, keepdim=True), k)
    grad = _by_kv_head(grad.float(), k)
    grad_scores = (grad @ v.float().mT).sub_(delta).mul_(probs).mul_(q.size(3) ** -0.5)
    if slope is not None:
        grad_scores.mul_(slope)
    grad_q = (grad_scores @ k.float()).view(q.shape)
    return grad_q, grad_scores.mT @ _by_kv_head(q.float(), k), probs.mT @ grad


def _scores(q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
    """Returns the scores [B, heads, queries, keys], fp32."""
    scores = (_by_kv_head(q.float(), k) @ k.float().mT).mul_(q.size(3) ** -0.5).view(*q.shape[:3], -1)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _hidden(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill_(~mask, HIDDEN)


def _by_kv_head(x: Tensor, k: Tensor) -> Tensor:
    """Groups the queries of each key/value head: [B, heads, T, D] -> [B, kv heads, heads / kv heads * T, D]."""
    return x.reshape(x.size(0), k.size(1), -1, x.size(3))
