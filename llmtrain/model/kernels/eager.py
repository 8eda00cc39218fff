"""Computes RMSNorm and rotary embedding in fp32 on a CPU without a compiler: the same values in fewer passes over
memory, with less kept for the backward. Elsewhere torch's own operations are fused, or round differently."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


def is_eager_cpu_fp32(x: Tensor) -> bool:
    """Tells whether the functions of this file are to be used for x."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight, over the last dim."""
    return RmsNorm.apply(x, weight, eps) if is_eager_cpu_fp32(x) else F.rms_norm(x, (x.size(-1),), weight, eps)


class RmsNorm(torch.autograd.Function):
    """Computes n weight with n = x / rms(x) (arXiv 1910.07467, equation 4), x [..., H], weight [H]."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Returns dx = (g weight - n mean(g n weight)) / rms(x) and dweight = the sum of g n over rows, g = `grad`."""
        x, weight, inverse = ctx.saved_tensors
        n = (x * inverse).flatten(0, -2)
        grad = grad.reshape(n.shape)
        product = grad * n
        mean = torch.mv(product, weight).div_(weight.numel())[:, None]
        of_weight = product.sum(0) if ctx.needs_input_grad[1] else None
        dx = torch.mul(grad, weight, out=product).addcmul_(n, mean, value=-1).mul_(inverse.view(-1, 1))
        return dx.view_as(x), of_weight, None


class Rotation(torch.autograd.Function):
    """Computes `model.rope.apply_rope`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        (a, b), out = pairs(x, interleaved), torch.empty_like(x)
        first, second = pairs(out, False)
        torch.mul(a, cos, out=first).sub_(b * sin)  # `addcmul_` would round once less than the formula
        torch.mul(b, cos, out=second).add_(a * sin)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        (a, b), dx = pairs(grad, False), torch.empty_like(grad)
        first, second = pairs(dx, ctx.interleaved)
        torch.mul(a, cos, out=first).addcmul_(b, sin)
        torch.mul(b, cos, out=second).addcmul_(a, sin, value=-1)
        return dx, None, None, None


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Returns the first and the second values of all pairs, as views of x."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
