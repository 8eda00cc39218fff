"""Computes the matrix products of blocks in 8-bit floats (arXiv 2209.05433).

Activations and weights are e4m3, gradients e5m2, each tensor scaled by its current largest absolute value. Sums and
results have a higher precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from llmtrain.model.decoder import Decoder
from llmtrain.model.linear import Linear
from llmtrain.parallel.tensor import RowLinear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TINY = 1e-12  # keeps the factor of an all-zero tensor above 0


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (8-bit values, fp32 factor) of x, with x = values * factor up to rounding."""
    factor = x.abs().amax().float().clamp(min=TINY) / torch.finfo(dtype).max
    return (x.float() / factor).to(dtype), factor


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Returns a [n, k] times b [k, m]; the kernel needs a row-major and b column-major.

    `fast` lets a GPU keep fewer bits in the sums within a tile; gradients, whose values differ more in size, need them.
    """
    columns = b[0].t().contiguous().t()
    factors = {"scale_a": a[1], "scale_b": b[1]}
    return torch._scaled_mm(a[0].contiguous(), columns, **factors, out_dtype=dtype, use_fast_accum=fast)


class _Float8Product(torch.autograd.Function):
    """Computes x [n, in], weight [out, in] -> x weight^T [n, out]. All sizes are multiples of 16."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        (a, a_factor), (w, w_factor) = quantize(x, E4M3), quantize(weight, E4M3)
        ctx.save_for_backward(a, a_factor, w, w_factor)
        return _product((a, a_factor), (w.t(), w_factor), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, a_factor, w, w_factor = ctx.saved_tensors
        g, g_factor = quantize(grad, E5M2)
        grad_x = _product((g, g_factor), (w, w_factor), grad.dtype)
        return grad_x, _product((g.t(), g_factor), (a, a_factor), grad.dtype)


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns F.linear(x, weight, bias) for x [..., in], computed in 8-bit floats."""
    y = _Float8Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class Float8Linear(Linear):
    """Computes a whole or column-parallel projection in 8-bit floats."""

    def weighted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return float8_linear(x, self.weight, bias)


class Float8RowLinear(RowLinear):
    """Computes a row-parallel projection in 8-bit floats; partial products are rounded before the sum over the
    group."""

    def weighted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return float8_linear(x, self.weight, bias)


def float8_blocks(model: Decoder) -> None:
    """Switches the projections of all blocks to 8-bit floats, in place. Embedding, head, norms and attention are
    unchanged."""
    swap = {Linear: Float8Linear, RowLinear: Float8RowLinear}
    for block in model.blocks():
        for module in block.modules():
            module.__class__ = swap.get(type(module), type(module))
