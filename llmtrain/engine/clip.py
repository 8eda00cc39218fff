"""Gradient norm and clipping over all axes, where the backend has none of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup


def owns(parameter: nn.Parameter, tp_rank: int) -> bool:
    """Whether this rank counts the parameter in sums over the pipeline and tensor axes: each piece exactly once."""
    return (parameter.tp_dim is not None or tp_rank == 0) and not parameter.is_copy


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, tp_rank: int, model: ProcessGroup) -> float:
    """Scale whole (unsharded over data parallel) gradients so that their norm over the `model` group (pp x tp) is at
    most `max_norm` (0: leave them). Returns the norm before."""
    parameters = [p for p in parameters if p.grad is not None]
    squares = [p.grad.float().square().sum() for p in parameters if owns(p, tp_rank)]
    total = torch.stack(squares).sum() if squares else parameters[0].grad.new_zeros(())
    dist.all_reduce(total, group=model)
    norm = total.sqrt()
    if max_norm and norm > max_norm:
        for p in parameters:
            p.grad.mul_(max_norm / (norm + 1e-6))
    return float(norm)
