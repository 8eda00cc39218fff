"""Implements context parallelism: each rank of `cp` has a part of every row, and attention looks at the whole row.

How a row is cut: `parallel.zigzag`. Ring and allgather need that order to have the same work everywhere; for alltoall,
where a rank sees whole rows, any would do, and one order for all leaves a single way to cut a batch.

What a rank receives for one layer of one microbatch, forward + backward, in bytes. A K or V shard has
kv = B (T/cp) (kv heads / tp) head_dim e bytes, a Q shard q = B (T/cp) (heads / tp) head_dim e, e bytes an element:
    allgather   2 (cp - 1) kv  +  2 (cp - 1) kv                        K and V gathered; their gradients scattered
    alltoall    2 (q + kv) (cp - 1) / cp  +  the same                  Q, K, V and the output; kv times
                                                                       lcm(kv heads / tp, cp) / (kv heads / tp)
    ring        2 (cp - 1) kv  +  2 (cp - 1) kv + 2 cp kv 4 / e        K and V; their gradients travel in fp32
Rematerialisation adds one more forward. Beside that a row with documents has its segment ids (and ends) gathered
once a microbatch and pipeline stage: (cp - 1) B (T/cp) 8 bytes each.

After the exchange allgather and alltoall compute what one rank would, by the kernels of `engine.attention`; ring
computes tiles. Only sdpa, on a GPU and for short rows, has a mask of B T T entries for alltoall, B (T/cp) T for
allgather.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from llmtrain.model.kernels.backends import Kernels, Mask, attend, visibility
from llmtrain.model.kernels.tile_plan import Tiles, plan_tiles
from llmtrain.model.kernels.tiles import tile_side
from llmtrain.parallel.collectives import all_gather, gather_sequence
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.ring import attend_ring
from llmtrain.parallel.zigzag import from_shards, shard, spans, to_shards
from llmtrain.types import Batch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def local_batches(microbatches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """Returns the batches on `mesh.device`, every [B, T] field cut to this rank's [B, T / cp]. All cp ranks give the
    same rows.

    Raises ValueError when T is not a multiple of 2 cp.
    """
    return [_local(batch.to(mesh.device), mesh.sizes["cp"], mesh.coords["cp"]) for batch in microbatches]


def _local(batch: Batch, cp: int, rank: int) -> Batch:
    if cp == 1:
        return batch
    T = batch.input_ids.size(1)
    if T % (2 * cp):
        raise ValueError(f"rows of {T} tokens: must be a multiple of 2 x parallel.cp = {2 * cp}; pad them or lower cp")

    def cut(value: object) -> object:
        return shard(value, 1, rank, cp) if isinstance(value, Tensor) else value

    own = {f.name: cut(getattr(batch, f.name)) for f in fields(batch)}
    return replace(batch, **{**own, "extra": {name: cut(x) for name, x in batch.extra.items()}})


def whole_rows(x: Tensor, mesh: Mesh) -> Tensor:
    """Returns [B, T, ...] on all cp ranks, of the [B, T / cp, ...] of each (a collective).

    The backward gives each rank the gradient of its own part: all of them compute the same from the whole rows, so a
    sum over them counts it once.
    """
    return _WholeRows.apply(x, mesh.groups["cp"])


class _WholeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return shard(grad, 1, ctx.group.rank(), ctx.group.size()), None


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    return from_shards(all_gather(x, 1, group), 1, group.size())


def context_parallel(model: nn.Module, group: ProcessGroup, method: str, kernels: Kernels) -> None:
    """Lets the attention of a decoder look over the group's parts of the rows, in place."""
    attend, visibility = METHODS[method]
    model.visibility = partial(visibility, group=group, kernels=kernels)
    for block in model.layers.values():
        block.attention.attend = partial(attend, group=group, kernels=kernels)


def attend_allgather(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, group: ProcessGroup, kernels: Kernels
) -> Tensor:
    """Returns the attention of this rank's queries to the gathered keys and values."""
    gathered = gather_sequence(torch.cat([k, v], -1).transpose(1, 2), group)
    k, v = from_shards(gathered, 1, group.size()).transpose(1, 2).split([k.size(-1), v.size(-1)], -1)
    if mask is None or isinstance(mask, Tensor):
        return _attend_halves(q, k, v, mask, group, kernels)
    return attend(q, k, v, mask, kernels)


def _attend_halves(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: ProcessGroup, kernels: Kernels
) -> Tensor:
    """Returns the attention of this rank's two chunks to the keys that are not later; `mask` [B, 1, T / cp, T]."""
    cp, rank, n = group.size(), group.rank(), q.size(2) // 2
    outputs = []
    for rows, end in ((slice(0, n), (rank + 1) * n), (slice(n, 2 * n), (2 * cp - rank) * n)):
        if mask is None:
            seen = torch.ones(n, end, dtype=torch.bool, device=q.device).tril(end - n)
        else:
            seen = mask[:, :, rows, :end]
        outputs.append(attend(q[:, :, rows], k[:, :, :end], v[:, :, :end], seen, kernels))
    return torch.cat(outputs, 2)


def _visibility_allgather(
    segment_ids: Tensor | None,
    ends: Tensor | None,
    positions: Tensor,
    window: int | None,
    group: ProcessGroup,
    kernels: Kernels,
) -> Mask | BlockMask | None:
    own = spans(group.rank(), group.size(), positions.size(1))
    ids = _whole_ids(segment_ids, ends, positions, window, group)
    return visibility(*ids, window, kernels, own)


def attend_alltoall(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | BlockMask | None, group: ProcessGroup, kernels: Kernels
) -> Tensor:
    """Returns the attention over whole rows of heads / cp heads (Ulysses, arXiv 2309.14509).

    K/V heads are repeated where they do not divide by cp; query heads must.
    """
    copies = math.lcm(k.size(1), group.size()) // k.size(1)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    return _rows_to_heads(attend(*(_heads_to_rows(x, group) for x in (q, k, v)), mask, kernels), group)


def _visibility_alltoall(
    segment_ids: Tensor | None,
    ends: Tensor | None,
    positions: Tensor,
    window: int | None,
    group: ProcessGroup,
    kernels: Kernels,
) -> Mask | BlockMask | None:
    return visibility(*_whole_ids(segment_ids, ends, positions, window, group), window, kernels)


def _whole_ids(
    segment_ids: Tensor | None, ends: Tensor | None, positions: Tensor, window: int | None, group: ProcessGroup
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Returns segments, ends and positions of whole rows. Positions are asked for with a window only; else they
    are the places."""
    B, T = positions.size(0), positions.size(1) * group.size()
    wanted = (segment_ids, ends, None if window is None else positions)
    segments, ends, whole = (None if ids is None else _gathered(ids, group) for ids in wanted)
    return segments, ends, torch.arange(T, device=positions.device).expand(B, T) if whole is None else whole


def _heads_to_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Exchanges [B, heads, T / cp, D] for [B, heads / cp, T, D]."""
    parts = _Exchange.apply(x.unflatten(1, (group.size(), -1)).movedim(1, 0), group)
    return from_shards(parts.movedim(0, 2).flatten(2, 3), 2, group.size())


def _rows_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """Exchanges [B, heads / cp, T, D] for [B, heads, T / cp, D]."""
    parts = to_shards(x, 2, group.size()).unflatten(2, (group.size(), -1))
    return _Exchange.apply(parts.movedim(2, 0), group).movedim(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """Exchanges the parts of [cp, ...]: part i goes to rank i, and what rank i sent becomes part i. It is its own
    inverse and gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_to_all_single(x.contiguous(), None, None, group))


def _visibility_ring(
    segment_ids: Tensor | None,
    ends: Tensor | None,
    positions: Tensor,
    window: int | None,
    group: ProcessGroup,
    kernels: Kernels,
) -> list[Tiles]:
    """Returns the tiles of this rank's queries and the keys of each rank."""
    assert window is None and kernels.softcap is None, "a rule of the configuration"
    ids = _whole_ids(segment_ids, ends, positions, None, group)
    own, *sources = (spans(rank, group.size(), positions.size(1)) for rank in (group.rank(), *range(group.size())))
    side = tile_side(positions.device, None)
    return [plan_tiles(*ids, None, own, keys, side) for keys in sources]


METHODS = {
    "ring": (attend_ring, _visibility_ring),
    "allgather": (attend_allgather, _visibility_allgather),
    "alltoall": (attend_alltoall, _visibility_alltoall),
}
