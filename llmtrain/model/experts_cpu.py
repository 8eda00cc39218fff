"""The experts' feed-forward layers on a CPU: one expert after the other, all of its steps while its rows are in cache.

Of what is computed on the way only gate(x) and up(x) are kept for the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from llmtrain.model.feedforward import ACTIVATIONS

aten = torch.ops.aten
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of ACTIVATIONS: (gradient, input) -> gradient
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"),
}


@torch.library.custom_op("llmtrain::expert_ffn", mutates_args=())
def expert_ffn(
    x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, hidden], sorted by expert; weights [N]; gate, up [E, ffn, hidden]; down [E, hidden, ffn]; counts [E] int64
    -> down(act(gate(x)) * up(x) * weights) [N, hidden], rows beyond the last expert 0; gate(x) and up(x) [N, ffn]."""
    out, g, u = (x.new_empty(x.size(0), m.size(1)) for m in (down, gate, up))
    for e, rows in _spans(counts):
        torch.mm(x[rows], gate[e].t(), out=g[rows])
        torch.mm(x[rows], up[e].t(), out=u[rows])
        h = ACTIVATIONS[act](g[rows]).mul_(u[rows]).mul_(weights[rows, None])
        torch.mm(h, down[e].t(), out=out[rows])
    out[int(counts.sum()) :] = 0
    return out, g, u


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
    """Gradients of x, weights, gate, up and down; the last three are empty unless `of_matrices`."""
    dx, dweights = torch.zeros_like(x), torch.zeros_like(weights)
    dgate, dup, ddown = (torch.zeros_like(m) if of_matrices else m.new_empty(0) for m in (gate, up, down))
    for e, rows in _spans(counts):
        activated, scale = ACTIVATIONS[act](g[rows]), weights[rows, None]
        both, dh = activated * u[rows], grad[rows] @ down[e]
        torch.sum(dh * both, 1, out=dweights[rows])
        dh.mul_(scale)
        dg, du = GRADIENTS[act](dh * u[rows], g[rows]), dh.mul_(activated)
        torch.mm(dg, gate[e], out=dx[rows]).addmm_(du, up[e])
        if of_matrices:
            torch.mm(grad[rows].t(), both * scale, out=ddown[e])
            torch.mm(dg.t(), x[rows], out=dgate[e])
            torch.mm(du.t(), x[rows], out=dup[e])
    return dx, dweights, dgate, dup, ddown


def _spans(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    start = 0
    for e, count in enumerate(counts.tolist()):
        if count:
            yield e, slice(start, start + count)
        start += count


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
