"""Copies rows into the order of their experts, and sums them back. Forward and backward both gather, which is
deterministic and fast where the usual backward of a gather would scatter."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the order [N k] that sorts `indices` [N, k] (equal ones stay in order), the place [N, k] of each in it,
    and how many each expert has [num_experts]; all int64. An index of num_experts stands for none."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.size(0), device=order.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))
    return order, places.view_as(indices), counts[:num_experts]


def _spread(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    return x.index_select(0, order // places.size(1))


def _collect(rows: Tensor, order: Tensor, places: Tensor) -> Tensor:
    return rows.index_select(0, places.flatten()).view(*places.shape, -1).sum(1)


class Spread(torch.autograd.Function):
    """Copies each row for each of its experts, in sorted order: [N, hidden] -> [N k, hidden]. Its backward is
    `Collect`'s forward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        return _spread(x, order, places)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _collect(grad, *ctx.saved_tensors), None, None


class Collect(torch.autograd.Function):
    """Sums the copies of each row, which are in sorted order: [N k, hidden] -> [N, hidden]. Its backward is `Spread`'s
    forward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        return _collect(rows, order, places)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _spread(grad, *ctx.saved_tensors), None, None
