"""Weights of the experts and their products: rows sorted by expert, each times the matrix of its own.

A product is one operation to autograd, to the compiler and to rematerialisation. It runs as one grouped product
(`torch.nn.functional.grouped_mm`) where device, dtype and widths allow it, else expert by expert, with the same result.
On a CPU all three products of an expert are one operation, `model.experts_cpu`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.schema import ModelConfig
from llmtrain.model.experts_cpu import expert_ffn
from llmtrain.model.feedforward import ACTIVATIONS

ALIGNED_BYTES = 16  # of every row, or the grouped kernels refuse


class Experts(nn.Module):
    """down(act(gate(x)) * up(x)) of each expert here: gate, up [E, ffn, hidden], down [E, hidden, ffn]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e = config.moe
        assert e is not None
        wide = (e.num_experts, e.expert_ffn_size, config.hidden_size)
        self.gate = nn.Parameter(torch.empty(wide))
        self.up = nn.Parameter(torch.empty(wide))
        self.down = nn.Parameter(torch.empty(e.num_experts, config.hidden_size, e.expert_ffn_size))
        self.activation = config.activation

    @property
    def num_experts(self) -> int:
        """Here: fewer where experts are divided over ranks."""
        return self.gate.size(0)

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """x [N, hidden], sorted by expert, of which the first counts[0] go to expert 0, the next counts[1] to expert 1
        and so on; rows beyond their sum give zeros. counts [E] int64.

        `weights` [N] multiply the outputs. They are applied in front of `down`, so that the backward does not need
        what `down` gives.
        """
        weights = weights.to(x.dtype)
        if x.device.type == "cpu":
            return expert_ffn(x, weights, self.gate, self.up, self.down, counts, self.activation)[0]
        return self.by_grouped_products(x, counts, weights)

    def by_grouped_products(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """`forward` on a GPU."""
        act = ACTIVATIONS[self.activation]
        h = act(grouped_product(x, self.gate, counts)) * grouped_product(x, self.up, counts)
        return grouped_product(h * weights[:, None], self.down, counts)


@torch.library.custom_op("llmtrain::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [N, in], rows sorted by group; weight [G, out, in]; counts [G] int64 -> [N, out], row n being
    weight[group of n] x[n]; rows beyond the last group are 0."""
    if not _grouped(x, weight.size(1), weight.size(2)):
        return _product_loop(x, weight, counts)
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=_ends(counts))
    return _zero_rest(y, counts)


@torch.library.custom_op("llmtrain::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """The sum over the rows of each group of the outer product: y [N, out], x [N, in] -> [G, out, in]."""
    if not _grouped(x, y.size(1), x.size(1)):
        return _outer_loop(y, x, counts)
    return F.grouped_mm(y.t(), x, offs=_ends(counts))


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.size(0), weight.size(1))


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.size(0), y.size(1), x.size(1))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()  # the grouped kernels take nothing else
    dx = grouped_product(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    return dx, grouped_outer(grad, x, counts) if ctx.needs_input_grad[1] else None, None


grouped_product.register_autograd(_backward, setup_context=_save)


# How a product is done


def _grouped(x: Tensor, rows: int, columns: int) -> bool:
    fits = rows * x.itemsize % ALIGNED_BYTES == 0 and columns * x.itemsize % ALIGNED_BYTES == 0
    return fits and x.size(0) > 0 and grouped_mm_runs(x.device.type, x.dtype)


@cache
def grouped_mm_runs(device: str, dtype: torch.dtype) -> bool:
    """Whether this build of torch has a grouped product there. Tried once."""
    try:
        x, w = torch.ones(32, 16, dtype=dtype, device=device), torch.ones(2, 32, 16, dtype=dtype, device=device)
        ends = torch.tensor([8, 32], dtype=torch.int32, device=device)
        y = F.grouped_mm(x, w.transpose(1, 2), offs=ends)
        F.grouped_mm(y, w, offs=ends)
        outer = F.grouped_mm(y.t(), x, offs=ends)
        return bool((y == 16).all() and (outer[0] == 16 * 8).all())
    except (RuntimeError, AttributeError):  # no kernel; no such function
        return False


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


def _zero_rest(y: Tensor, counts: Tensor) -> Tensor:
    """Rows of no group are 0, in place; the kernels leave there what was in memory."""
    rest = torch.arange(y.size(0), device=y.device) >= counts.sum()  # without waiting for the device
    return y.masked_fill_(rest[:, None], 0)


def _product_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y, start = x.new_empty(x.size(0), weight.size(1)), 0
    for w, count in zip(weight, counts.tolist(), strict=True):
        if count:
            torch.mm(x[start : start + count], w.t(), out=y[start : start + count])
        start += count
    y[start:] = 0
    return y


def _outer_loop(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    outer, start = x.new_empty(counts.size(0), y.size(1), x.size(1)), 0
    for group, count in zip(outer, counts.tolist(), strict=True):
        torch.mm(y[start : start + count].t(), x[start : start + count], out=group)  # no rows: zeros
        start += count
    return outer
