"""Provides collectives with gradients, on a plain tensor of this rank; compilable. With group None they do nothing.

They are the pairs of Megatron-LM (arXiv 1909.08053) and of its sequence parallelism (arXiv 2205.05198).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

# torch 2.13 renamed these functions
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter_sum = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor

SEQUENCE = 1  # the dim that sequence parallelism splits


def all_reduce(x: Tensor, group: ProcessGroup, op: str = "sum") -> Tensor:
    """Returns the sum (or the maximum) over the group, without gradient."""
    if torch.compiler.is_compiling():
        return _wait(functional.all_reduce(x.contiguous(), op, group))
    x = x.clone(memory_format=torch.contiguous_format)  # half the time of the functional form, which wraps its result
    dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
    return x


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Returns the tensors of the group concatenated along `dim`, without gradient."""
    return _wait(_all_gather(x.contiguous(), dim, group))


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return _wait(_reduce_scatter_sum(x.contiguous(), "sum", dim, group))


def _wait(x: Tensor) -> Tensor:
    return x.wait() if hasattr(x, "wait") else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, SEQUENCE, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, SEQUENCE, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, SEQUENCE, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, SEQUENCE, ctx.group), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def gather_sequence(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Gathers the sequence, [B, T / tp, ...] -> [B, T, ...]; the gradient is reduce-scattered."""
    return x if group is None else _Gather.apply(x, group)


def scatter_sequence(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Reduce-scatters partial sums [B, T, ...] -> [B, T / tp, ...]; the gradient is gathered."""
    return x if group is None else _Scatter.apply(x, group)


def copy_to(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns x; the gradient is summed over the group (for a replicated input of sharded weights)."""
    return x if group is None else _Copy.apply(x, group)


def reduce_from(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns the sum of the group's partial sums; the gradient passes unchanged."""
    return x if group is None else _Reduce.apply(x, group)
