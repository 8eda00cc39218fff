"""Computes grouped matrix products: rows sorted by group, each times the matrix of its group.

A product is one operation to autograd, to the compiler and to rematerialisation. It runs as one grouped product
(`torch.nn.functional.grouped_mm`) where device, dtype and widths allow it and it is the fastest, else group by group,
with the same result.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED_BYTES = 16  # the grouped kernels refuse rows whose size is no multiple of it
KERNEL_ROWS = 32  # on a CPU in bf16, see `_rows`


@torch.library.custom_op("llmtrain::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Returns [N, out], row n being weight[group of n] x[n]; rows beyond the last group are 0.

    x [N, in], rows sorted by group; weight [G, out, in]; counts [G] int64, the rows of each group.
    """
    return product(x, weight, counts)


@torch.library.custom_op("llmtrain::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Returns the outer products y[n] x[n] summed over the rows of each group, [G, out, in]; y [N, out], x [N, in]."""
    return outer(y, x, counts)


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.size(0), weight.size(1))


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.size(0), y.size(1), x.size(1))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()  # the grouped kernels take nothing else
    dx = grouped_product(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    return dx, grouped_outer(grad, x, counts) if ctx.needs_input_grad[1] else None, None


grouped_product.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("llmtrain::grouped_pair", mutates_args=())
def grouped_pair(x: Tensor, first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Returns `grouped_product` with two matrices a group, both [G, out, in], as one product of twice the width, for
    which they are copied side by side: [N, 2 out]."""
    return product(x, torch.cat([first, second], 1), counts)


@grouped_pair.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.size(0), 2 * first.size(1))


def _pair_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, first, second, counts = ctx.saved_tensors
    grad, dx = grad.contiguous(), None
    if ctx.needs_input_grad[0]:
        dx = grouped_product(grad, torch.cat([first, second], 1).transpose(1, 2), counts)
    if not any(ctx.needs_input_grad[1:3]):
        return dx, None, None, None
    return dx, *grouped_outer(grad, x, counts).chunk(2, 1), None


grouped_pair.register_autograd(_pair_backward, setup_context=_save)


# Products without autograd


def product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Returns `grouped_product`, without autograd."""
    if not _grouped(x, weight.size(1), weight.size(2)):
        return _product_loop(x, weight, counts)
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=_ends(counts))
    return _zero_rest(y, counts)


def outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Returns `grouped_outer`, without autograd."""
    if not _grouped(x, y.size(1), x.size(1)):
        return _outer_loop(y, x, counts)
    return F.grouped_mm(y.t(), x, offs=_ends(counts))


def _grouped(x: Tensor, rows: int, columns: int) -> bool:
    fits = rows * x.itemsize % ALIGNED_BYTES == 0 and columns * x.itemsize % ALIGNED_BYTES == 0
    return fits and not _makes_kernels(x) and x.size(0) > 0 and grouped_mm_runs(x.device.type, x.dtype)


@cache
def grouped_mm_runs(device: str, dtype: torch.dtype) -> bool:
    """Tells whether this build of torch has a grouped product for device and dtype, by trying it once."""
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
    """Sets the rows of no group to 0, in place; the kernels leave there what was in memory."""
    if y.device.type == "cpu":
        y[int(counts.sum()) :] = 0
        return y
    rest = torch.arange(y.size(0), device=y.device) >= counts.sum()  # without waiting for the device
    return y.masked_fill_(rest[:, None], 0)


def _product_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y, start = x.new_empty(x.size(0), weight.size(1)), 0
    for w, count in zip(weight, counts.tolist(), strict=True):
        rows = _rows(x, count)
        if start + rows > x.size(0):
            y[start : start + count] = (_padded(x[start : start + count], rows) @ w.t())[:count]
        elif count:  # surplus rows belong to the next groups, which overwrite them
            torch.mm(x[start : start + rows], w.t(), out=y[start : start + rows])
        start += count
    y[start:] = 0
    return y


def _outer_loop(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    found, start = x.new_empty(counts.size(0), y.size(1), x.size(1)), 0
    for group, count in zip(found, counts.tolist(), strict=True):
        a, b = (_padded(each[start : start + count], _rows(x, count)) for each in (y, x))
        torch.mm(a.t(), b, out=group)  # no rows: zeros
        start += count
    return found


def _makes_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _rows(x: Tensor, count: int) -> int:
    """Returns how many rows to compute for a group of `count`. On a CPU in bf16 torch makes a kernel for each new
    number of rows, which takes longer than the product, so numbers are rounded up to a few."""
    return -(-count // KERNEL_ROWS) * KERNEL_ROWS if _makes_kernels(x) else count


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if rows == x.size(0) else F.pad(x, (0, 0, 0, rows - x.size(0)))
