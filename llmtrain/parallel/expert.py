"""Implements expert parallelism: whole experts lie on different ranks of `ep` and `tp`, and tokens are sent to them.

Experts are split along dim 0 into ep x tp pieces; the rank with coordinates (e, t) has piece e tp + t. The tp ranks
with the same e see the same tokens: each sends those that go to pieces of its own t, over its own ep group, and the
experts' outputs are summed over tp like those of any row-parallel product. No token is dropped, so the parts of a
transfer are unequal and their sizes are sent first.

One layer of one microbatch has N k (token, expert) pairs, of which n go to other ranks. Then a rank sends, in bytes:
forward 2 n hidden e + 4 n (rows there and back, weights) and 8 (ep - 1) E / (ep tp) of counts, backward the same
without the counts. Evenly loaded, n = N k (ep - 1) / (ep tp) (N tokens, e bytes a value).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from llmtrain.model.balance import RouterCounts
from llmtrain.model.experts import Experts
from llmtrain.model.kernels.permute import Collect, Spread, sort_by_expert
from llmtrain.model.moe import MoE
from llmtrain.model.router import Router
from llmtrain.parallel.collectives import all_reduce, copy_to, reduce_from, scatter_sequence
from llmtrain.parallel.mesh import Mesh


class ReplicaRouter(Router):
    """Routes with a weight replicated over tp; each tp rank uses it for its own experts only, so its gradient is
    summed."""

    group: ProcessGroup

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), copy_to(self.weight, self.group).float())


class ParallelMoE(MoE):
    """Computes a mixture of experts: outputs of other ranks' experts come over `ep`, and are summed over `tp`."""

    pieces: ExpertPieces
    group: ProcessGroup | None  # tp
    sequence: bool

    def forward(self, x: Tensor, padding: Tensor | None = None, experts: Tensor | None = None) -> Tensor:
        shared = None if self.shared is None else self.shared(x)
        indices, weights = self.router(x, padding, experts)
        y = exchanged(x.flatten(0, 1), indices, weights, self.experts, self.pieces, self.router.counts).view_as(x)
        y = (scatter_sequence if self.sequence else reduce_from)(y, self.group)
        return y if shared is None else y + shared


class ExpertPieces:
    """Knows where the experts are: `local` on each rank, this rank being (ep_rank, tp_rank)."""

    def __init__(self, num_experts: int, mesh: Mesh) -> None:
        self.ep, self.tp = mesh.ep, mesh.sizes["tp"]
        self.ep_group = mesh.groups["ep"] if mesh.ep > 1 else None
        self.tp_rank = mesh.coords["tp"]
        self.local = num_experts // (self.ep * self.tp)
        self.cut = (mesh.ep_rank * self.tp + self.tp_rank, self.ep * self.tp)

    @property
    def reachable(self) -> int:
        """Returns the number of experts on ranks of this tp coordinate."""
        return self.ep * self.local

    def renumbered(self, indices: Tensor) -> Tensor:
        """Returns the experts' numbers among the reachable ones, in the order of their ranks; `reachable` for all
        others."""
        piece, within = indices // self.local, indices % self.local
        own = (piece % self.tp == self.tp_rank) & (indices < self.ep * self.tp * self.local)
        return torch.where(own, piece // self.tp * self.local + within, self.reachable)


def expert_parallel(model: nn.Module, mesh: Mesh, sequence: bool) -> None:
    """Gives every mixture of experts its parallel form and this rank's experts, in place.

    Also without expert parallelism it makes the load counts of rows that are split over `cp` cover whole rows. Meant
    for parameters on the meta device.
    """
    for module in [m for m in model.modules() if isinstance(m, MoE)]:
        router_counts = module.router.counts
        router_counts.tp_ranks, router_counts.travels = mesh.sizes["tp"], mesh.ep * mesh.sizes["tp"] > 1
        if mesh.sizes["cp"] > 1:
            router_counts.row_sum = partial(all_reduce, group=mesh.groups["cp"])
        if not router_counts.travels:
            continue
        module.__class__ = ParallelMoE
        module.pieces = ExpertPieces(module.experts.gate.size(0), mesh)
        module.group, module.sequence = mesh.tp_group, sequence and mesh.sizes["tp"] > 1
        if mesh.tp_group is not None:
            module.router.__class__ = ReplicaRouter
            module.router.group = mesh.tp_group
        for p in module.experts.parameters():
            index, count = module.pieces.cut
            p.placement = replace(p.placement, tp_dim=0, cut=(index, count), expert=mesh.ep > 1)
            p.data = p.data.chunk(count, 0)[index].contiguous()


@torch._disable_dynamo  # reads sizes from tensors and communicates
def exchanged(
    x: Tensor, indices: Tensor, weights: Tensor, experts: Experts, pieces: ExpertPieces, router_counts: RouterCounts
) -> Tensor:
    """Computes `model.moe.dispatch` over the ranks: x [N, hidden] -> [N, hidden], this tp rank's part of the sum."""
    order, places, counts = sort_by_expert(pieces.renumbered(indices), pieces.reachable)
    rows, scales = Spread.apply(x, order, places), weights.flatten().index_select(0, order)
    if pieces.ep_group is None:
        y, computed = experts(rows, counts, scales), counts
    else:
        y, computed = _through_ranks(rows, scales, counts, experts, pieces)
    y = Collect.apply(y, order, places)
    router_counts.watch(y, computed.sum())
    return y


def _through_ranks(
    rows: Tensor, scales: Tensor, counts: Tensor, experts: Experts, pieces: ExpertPieces
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of the ep group's experts for `rows`, in the same order, and the rows that each expert here
    computed.

    `rows` is [N k, hidden], of which the first counts.sum() go to an expert of the group. The computed rows come from
    any rank.
    """
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=pieces.ep_group)
    sizes = [c.view(pieces.ep, -1).sum(1).tolist() for c in (counts, arriving)]
    sent = sum(sizes[0])
    there, weights = (Exchange.apply(part[:sent], *sizes, pieces.ep_group) for part in (rows, scales))
    by_expert, back = _by_expert(arriving, pieces)
    computed = arriving.view(pieces.ep, -1).sum(0)
    y = experts(there[by_expert], computed, weights[by_expert])
    y = Exchange.apply(y[back], *reversed(sizes), pieces.ep_group)
    return F.pad(y, (0, 0, 0, rows.size(0) - sent)), computed


def _by_expert(arriving: Tensor, pieces: ExpertPieces) -> tuple[Tensor, Tensor]:
    """Returns the order that sorts rows, which arrive by rank and then by expert, by expert, and its inverse."""
    expert = torch.arange(pieces.local, device=arriving.device).repeat(pieces.ep).repeat_interleave(arriving)
    order = expert.argsort(stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


class Exchange(torch.autograd.Function):
    """Exchanges rows in a group: `sending[i]` rows go to rank i, in order, and `receiving[i]` come from it.

    The gradient goes the other way.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, sending: list[int], receiving: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sending, receiving), group
        return _exchange(x, sending, receiving, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sending, receiving = ctx.sizes
        return _exchange(grad, receiving, sending, ctx.group), None, None, None


def _exchange(x: Tensor, sending: list[int], receiving: list[int], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(receiving), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receiving, sending, group=group)
    return out
