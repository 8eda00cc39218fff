"""Computes the experts' feed-forward layers on a CPU, as one operation that keeps only gate(x) and up(x) of its
intermediate results for the backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from llmtrain.model.feedforward import ACTIVATIONS
from llmtrain.model.kernels.grouped import outer, product

aten = torch.ops.aten
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # derivatives: (gradient, input) -> gradient
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"),
}


@torch.library.custom_op("llmtrain::expert_ffn", mutates_args=())
def expert_ffn(
    x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns down(act(gate(x)) * up(x) * weights) [N, hidden], where rows beyond the last expert are 0, and gate(x)
    and up(x) [N, ffn].

    x [N, hidden], sorted by expert; weights [N]; gate, up [E, ffn, hidden]; down [E, hidden, ffn]; counts [E] int64.
    """
    g, u = product(x, gate, counts), product(x, up, counts)
    h = ACTIVATIONS[act](g).mul_(u).mul_(weights[:, None])
    return product(h, down, counts), g, u


@torch.library.custom_op("llmtrain::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    g: Tensor,
    u: Tensor,
    act: str,
    of_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weights, gate, up and down; the last three are empty unless `of_matrices`."""
    activated, scale = ACTIVATIONS[act](g), weights[:, None]
    both, dh = activated * u, product(grad, down.transpose(1, 2), counts)
    dweights = (dh * both).sum(1)
    dh.mul_(scale)
    dg, du = GRADIENTS[act](dh * u, g), dh.mul_(activated)
    dx = product(dg, gate.transpose(1, 2), counts).add_(product(du, up.transpose(1, 2), counts))
    if not of_matrices:
        return dx, dweights, *(m.new_empty(0) for m in (gate, up, down))
    return dx, dweights, outer(dg, x, counts), outer(du, x, counts), outer(grad, both.mul_(scale), counts)


@expert_ffn.register_fake
def _(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.size(0), m.size(1)) for m in (down, gate, up))


@expert_ffn_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, *rest: object) -> tuple:
    *_, of_matrices = rest
    matrices = (torch.empty_like(m) if of_matrices else m.new_empty(0) for m in (gate, up, down))
    return torch.empty_like(x), torch.empty_like(weights), *matrices


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    of_matrices = any(ctx.needs_input_grad[2:5])
    dx, dweights, *found = expert_ffn_backward(grad.contiguous(), *ctx.saved_tensors, ctx.act, of_matrices)
    return dx, dweights, *(found if of_matrices else (None,) * 3), None, None


expert_ffn.register_autograd(_backward, setup_context=_save)
