"""Implements ring attention (arXiv 2310.01889): keys and values travel around the cp ranks while each rank computes.

Rank r holds the chunks r and 2 cp - 1 - r of the row (`parallel.zigzag`), so that with the shard of another rank s
    s < r   all its queries see the early half of the keys, and none the late half
    s > r   its late queries see all keys, and its early queries none
and half of the scores need not be computed, the same half of the work on every rank. `parallel.context` says how much
is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import P2POp, ProcessGroup, Work

from llmtrain.model.attention import attention_mask
from llmtrain.model.kernels.sdpa import HIDDEN
from llmtrain.parallel.zigzag import places

TILE_TOKENS = 1024  # queries whose scores exist at one time
Piece = tuple[slice, slice, Tensor | None]


@torch._disable_dynamo  # transfers between two ranks cannot be traced
def attend_ring(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, group: ProcessGroup) -> Tensor:
    """Returns the attention of this rank's queries [B, heads, T / cp, D] to the keys and values of all ranks.

    Each rank holds keys and values [B, kv heads, T / cp, D]. `ids` [1 or 2, B, T]: segment and branch ids of whole
    rows; None = causal over the row. Scores and sums are in fp32. Masks exist for one tile of queries and one shard of
    keys at a time.
    """
    return _Ring.apply(q, k, v, ids, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, group: ProcessGroup) -> Tensor:
        out = torch.zeros(*q.shape[:3], v.size(3), device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        for source, (keys, values) in _circulate([k.contiguous(), v.contiguous()], group):
            for rows, cols, mask in _pieces(q, ids, source, group):
                block = _attend(q[:, :, rows], keys[:, :, cols], values[:, :, cols], mask)
                _merge(out[:, :, rows], lse[:, :, rows], *block)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, ids, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ids, out, lse = ctx.saved_tensors
        delta = (grad.float() * out.float()).sum(-1)
        grad_q = torch.zeros(q.shape, device=q.device)
        passed: list[Tensor] = []
        requests: list[Work] = []
        for source, (keys, values) in _circulate([k.contiguous(), v.contiguous()], ctx.group):
            # The gradients of a shard follow it around the ring and reach its owner after the last step.
            grads = [torch.zeros(x.shape, device=x.device) for x in (k, v)]
            for rows, cols, mask in _pieces(q, ids, source, ctx.group):
                saved = (lse[:, :, rows], delta[:, :, rows], grad[:, :, rows])
                parts = _attend_backward(q[:, :, rows], keys[:, :, cols], values[:, :, cols], mask, *saved)
                for total, part in zip((grad_q[:, :, rows], *(g[:, :, cols] for g in grads)), parts, strict=True):
                    total.add_(part)
            _wait(requests)
            for own, before in zip(grads, passed, strict=False):  # none before the first step
                own.add_(before)
            passed, requests = _pass_on(grads, ctx.group)
        _wait(requests)
        return grad_q.to(q.dtype), passed[0].to(k.dtype), passed[1].to(v.dtype), None, None


def _circulate(tensors: Sequence[Tensor], group: ProcessGroup) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Yields (rank, its tensors), this rank's first; the next ones arrive while the caller computes."""
    rank, size = group.rank(), group.size()
    for step in range(size):
        incoming, requests = _pass_on(tensors, group) if step < size - 1 else ([], [])
        yield (rank - step) % size, tensors
        _wait(requests)
        tensors = incoming


def _pass_on(tensors: Sequence[Tensor], group: ProcessGroup) -> tuple[list[Tensor], list[Work]]:
    """Starts sending to the next rank. Returns what the previous one sends, valid once the requests are done."""
    rank, size = group.rank(), group.size()
    incoming = [torch.empty_like(x) for x in tensors]
    sends = [P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size) for x in tensors]
    receives = [P2POp(dist.irecv, x, group=group, group_peer=(rank - 1) % size) for x in incoming]
    return incoming, dist.batch_isend_irecv(sends + receives)


def _wait(requests: Sequence[Work]) -> None:
    for request in requests:
        request.wait()


def halves_seen(rank: int, source: int, shard_tokens: int) -> tuple[slice, slice]:
    """Returns (queries of `rank`, keys of `source`) between which scores are computed, as slices of their shards."""
    everything, half = slice(0, shard_tokens), shard_tokens // 2
    if source == rank:
        return everything, everything
    return (everything, slice(0, half)) if source < rank else (slice(half, shard_tokens), everything)


def _pieces(q: Tensor, ids: Tensor | None, source: int, group: ProcessGroup) -> Iterator[Piece]:
    """Yields the work with one shard of keys: a tile of queries, the keys, and their mask (None = all attend to
    all)."""
    rank, tokens = group.rank(), q.size(2)
    rows, cols = halves_seen(rank, source, tokens)
    queries, keys = (places(r, group.size(), tokens, q.device) for r in (rank, source))
    for start in range(rows.start, rows.stop, TILE_TOKENS):
        tile = slice(start, min(start + TILE_TOKENS, rows.stop))
        if ids is not None:
            mask = attention_mask(ids[0], ids[1] if len(ids) > 1 else None, queries[tile], keys[cols])
        else:
            mask = queries[tile, None] >= keys[cols] if source == rank else None
        yield tile, cols, mask


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (output, logsumexp of the scores), fp32."""
    scores = _scores(q, k, mask)
    lse = scores.logsumexp(-1)
    probs = _by_kv_head(scores.sub_(lse[..., None]).exp_(), k)
    return (probs @ v.float()).view(*q.shape[:3], -1), lse


def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor, delta: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v, fp32, from those of the output.

    `lse` is that of the whole row, so the probabilities are the final ones; so is delta = sum(grad * output).
    """
    probs = _by_kv_head(_scores(q, k, mask).sub_(lse[..., None]).exp_(), k)
    grad = _by_kv_head(grad.float(), k)
    grad_scores = (grad @ v.float().mT).sub_(_by_kv_head(delta[..., None], k)).mul_(probs).mul_(q.size(3) ** -0.5)
    grad_q = (grad_scores @ k.float()).view(q.shape)
    return grad_q, grad_scores.mT @ _by_kv_head(q.float(), k), probs.mT @ grad


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the scores [B, heads, queries, keys], fp32."""
    scores = (_by_kv_head(q.float(), k) @ k.float().mT).mul_(q.size(3) ** -0.5).view(*q.shape[:3], -1)
    return scores if mask is None else scores.masked_fill_(~mask, HIDDEN)


def _by_kv_head(x: Tensor, k: Tensor) -> Tensor:
    """Groups the queries of each key/value head: [B, heads, T, D] -> [B, kv heads, heads / kv heads * T, D]."""
    return x.reshape(x.size(0), k.size(1), -1, x.size(3))


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merges a block of keys into the softmax over the earlier blocks, in place."""
    total = torch.logaddexp(lse, block_lse)
    out.mul_((lse - total).exp()[..., None]).add_(block_out.mul_((block_lse - total).exp()[..., None]))
    lse.copy_(total)
