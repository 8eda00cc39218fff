"""Gradient norm and clipping over all axes, where the backend has none of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from llmtrain.parallel.mesh import Mesh


def owns(parameter: nn.Parameter, tp_rank: int) -> bool:
    """Whether this rank counts the parameter in sums over the pipeline and tensor axes: each piece exactly once."""
    return (parameter.tp_dim is not None or tp_rank == 0) and not parameter.is_copy


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, mesh: Mesh, group: ProcessGroup
) -> tuple[float, bool]:
    """Scale the gradients so that their norm over `group`, the ranks that hold one copy of all of them together, is at
    most `max_norm` (0: leave them). Returns the norm before, and whether this rank's part of it is finite."""
    parameters = [p for p in parameters if p.grad is not None]
    own = get_total_norm([local(p.grad) for p in parameters if owns(p, mesh.coords["tp"])])
    total = own.square().to(mesh.device)
    dist.all_reduce(total, group=group)
    norm = float(total.sqrt())
    if max_norm and norm > max_norm:
        torch._foreach_mul_([local(p.grad) for p in parameters], max_norm / (norm + 1e-6))
    return norm, bool(own.isfinite())


def local(x: Tensor) -> Tensor:
    """What lies on this rank, sharing memory."""
    return x.to_local() if isinstance(x, DTensor) else x
