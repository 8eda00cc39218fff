"""Mixture of experts in place of the feed-forward layer (arXiv 2101.03961, 2401.06066). No token is ever dropped.

Tokens are sorted by expert once, the experts' products run on the sorted rows, and what the chosen experts of a token
give is summed: x' = sum_k w_k E_k(x) + shared(x).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.model.experts import Experts
from llmtrain.model.feedforward import FeedForward
from llmtrain.model.router import Router


class MoE(nn.Module):
    """A router, the experts it chooses from, and an expert that every token takes, if there is one."""

    routes = True  # called with the padding too

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.moe.shared_ffn_size
        self.shared = FeedForward(config, shared) if shared else None

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x [B, T, hidden] -> the same shape. `padding` [B, T] bool: True = no token, goes to no routed expert."""
        shared = None if self.shared is None else self.shared(x)
        indices, weights = self.router(x, padding)
        y = self.routed(x.flatten(0, 1), indices, weights).view_as(x)
        return y if shared is None else y + shared

    def routed(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over the chosen experts. x [N, hidden]; indices, weights [N, k] as the router gives them:
        an index that is no expert here counts as none. Parallel forms replace this method."""
        return dispatch(x, indices, weights, self.experts)


def dispatch(x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """x [N, hidden] -> [N, hidden]: each row to the experts in `indices` [N, k] (one beyond the last: to none), what
    they give times `weights` [N, k], summed."""
    order, places, counts = sort_by_expert(indices, experts.gate.size(0))
    rows = Spread.apply(x, order, places)
    y = experts(rows, counts, weights.flatten().index_select(0, order))
    return Collect.apply(y, order, places)


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of indices [N, k], in 0 .. num_experts, where the last stands for none: the order [N k] that sorts them (equal
    ones stay in order), the place [N, k] of each in it, and how many each expert has [num_experts]. All int64."""
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
    """A copy of each row for each of its experts, in sorted order: [N, hidden] -> [N k, hidden]. Its transpose is
    `Collect`; both gather, which is deterministic and fast where the usual backward would scatter."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        return _spread(x, order, places)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _collect(grad, *ctx.saved_tensors), None, None


class Collect(torch.autograd.Function):
    """The sum of the copies of each row, given in sorted order: [N k, hidden] -> [N, hidden]."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order, places)
        return _collect(rows, order, places)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _spread(grad, *ctx.saved_tensors), None, None
