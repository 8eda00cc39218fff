"""Implements ring attention (arXiv 2310.01889): keys and values travel around the cp ranks while each rank computes.

Rank r holds the chunks r and 2 cp - 1 - r of the row (`parallel.zigzag`), so that with the shard of another rank s
    s < r   all its queries see the early half of the keys, and none the late half
    s > r   its late queries see all keys, and its early queries none
and half of the scores need not be computed, the same half of the work on every rank. In rows of documents only tiles
in which something is seen are computed (`model.kernels.tile_plan`). `parallel.context` says how much is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import P2POp, ProcessGroup, Work
from torch.utils._python_dispatch import _disable_current_modes

from llmtrain.model.kernels.backends import Kernels
from llmtrain.model.kernels.tile_plan import Tiles
from llmtrain.model.kernels.tiles import add_gradients, add_tiles, nothing_seen


@torch._disable_dynamo  # transfers between two ranks cannot be traced
def attend_ring(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tiles], group: ProcessGroup, kernels: Kernels
) -> Tensor:
    """Returns the attention of this rank's queries [B, heads, T / cp, D] to the keys and values of all ranks.

    Each rank holds keys and values [B, kv heads, T / cp, D]. `tiles`: for the keys of each rank. Sums are in fp32.
    """
    return _Ring.apply(q, k, v, tiles, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tiles], group: ProcessGroup
    ) -> Tensor:
        out, lse = nothing_seen(q, v)
        for source, (keys, values) in _circulate([k.contiguous(), v.contiguous()], group):
            with _disable_current_modes():  # selective rematerialisation would keep the output of every tile
                add_tiles(out, lse, q, keys, values, tiles[source])
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.group = tiles, group
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_q = torch.zeros(q.shape, device=q.device)
        passed: list[Tensor] = []
        requests: list[Work] = []
        for source, (keys, values) in _circulate([k.contiguous(), v.contiguous()], ctx.group):
            # The gradients of a shard follow it around the ring and reach its owner after the last step.
            grads = [torch.zeros(x.shape, device=x.device) for x in (k, v)]
            add_gradients([grad_q, *grads], grad, q, keys, values, out, lse, ctx.tiles[source])
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
