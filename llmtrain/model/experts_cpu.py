"""The experts' feed-forward layers on a CPU: one expert after the other, all of its steps while its rows are in cache.

Gate and up are one product, and only what comes out of it is kept for the backward. Twice as wide products and fewer
passes over memory are what makes it faster there than `model.experts.grouped_product` three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (aten.silu, aten.silu_backward),
    "gelu": (aten.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda x: aten.gelu(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}
"""Name -> the function, and its backward (gradient, input)."""


@torch.library.custom_op("llmtrain::expert_ffn", mutates_args=())
def expert_ffn(
    x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, act: str
) -> tuple[Tensor, Tensor]:
    """x [N, hidden], sorted by expert; weights [N]; gate, up [E, ffn, hidden]; down [E, hidden, ffn]; counts [E] int64
    -> down(act(gate(x)) * up(x) * weights) [N, hidden], rows beyond the last expert 0, and gate(x), up(x) [N, 2 ffn].
    """
    ffn = gate.size(1)
    out, wide = x.new_empty(x.size(0), down.size(1)), x.new_empty(x.size(0), 2 * ffn)
    for e, rows in _spans(counts):
        torch.mm(x[rows], torch.cat([gate[e], up[e]]).t(), out=wide[rows])
        g, u = wide[rows].split(ffn, 1)
        h = ACTIVATIONS[act][0](g).mul_(u).mul_(weights[rows, None])
        torch.mm(h, down[e].t(), out=out[rows])
    out[int(counts.sum()) :] = 0
    return out, wide


@torch.library.custom_op("llmtrain::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    wide: Tensor,
    act: str,
    of_matrices: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate, up and down; the last three are empty unless `of_matrices`."""
    ffn = gate.size(1)
    dx, dweights, matrices = torch.zeros_like(x), torch.zeros_like(weights), (gate, up, down)
    dgate, dup, ddown = (torch.zeros_like(m) if of_matrices else m.new_empty(0) for m in matrices)
    for e, rows in _spans(counts):
        g, u = wide[rows].split(ffn, 1)
        activated, scale = ACTIVATIONS[act][0](g), weights[rows, None]
        both = activated * u
        dh = grad[rows] @ down[e]
        torch.sum(dh * both, 1, out=dweights[rows])
        if of_matrices:
            torch.mm(grad[rows].t(), both * scale, out=ddown[e])
        dh.mul_(scale)
        dwide = torch.cat([ACTIVATIONS[act][1](dh * u, g), dh.mul_(activated)], 1)
        torch.mm(dwide, torch.cat([gate[e], up[e]]), out=dx[rows])
        if of_matrices:
            torch.mm(dwide[:, :ffn].t(), x[rows], out=dgate[e])
            torch.mm(dwide[:, ffn:].t(), x[rows], out=dup[e])
    return dx, dweights, dgate, dup, ddown


def _spans(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    start = 0
    for e, count in enumerate(counts.tolist()):
        if count:
            yield e, slice(start, start + count)
        start += count


@expert_ffn.register_fake
def _(
    x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, act: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.size(0), down.size(1)), x.new_empty(x.size(0), 2 * gate.size(1))


@expert_ffn_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    wide: Tensor,
    act: str,
    of_matrices: bool,
) -> tuple[Tensor, ...]:
    matrices = (torch.empty_like(m) if of_matrices else m.new_empty(0) for m in (gate, up, down))
    return torch.empty_like(x), torch.empty_like(weights), *matrices


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.act = inputs[6]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    of_matrices = any(ctx.needs_input_grad[2:5])
    dx, dweights, *found = expert_ffn_backward(grad.contiguous(), *ctx.saved_tensors, ctx.act, of_matrices)
    return dx, dweights, *(found if of_matrices else (None,) * 3), None, None


expert_ffn.register_autograd(_backward, setup_context=_save)
