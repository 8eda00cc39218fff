"""Computes the gradient norm and clips over all axes, where the backend has no clipping of its own."""

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
    """Tells whether this rank counts the parameter in sums over the pipeline and tensor axes: each piece exactly
    once."""
    return (parameter.placement.tp_dim is not None or tp_rank == 0) and not parameter.placement.is_copy


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, mesh: Mesh, group: ProcessGroup, experts_apart: bool = False
) -> tuple[float, bool]:
    """Scales the gradients so that their norm over `group`, the ranks that hold one copy of all of them together, is at
    most `max_norm` (0: leaves them). Returns the norm before, and whether this rank's part of it is finite.

    `experts_apart`: the group holds one copy of all but the experts, which lie on the ranks of `ep`.
    """
    parameters = [p for p in parameters if p.grad is not None]
    counted = [p for p in parameters if owns(p, mesh.coords["tp"])]
    kinds = [[local(p.grad) for p in counted if p.placement.expert == expert] for expert in (False, True)]
    own = torch.stack([get_total_norm(grads).to(mesh.device) for grads in kinds])
    totals = own.square()
    if experts_apart and mesh.ep > 1:
        dist.all_reduce(totals[1], group=mesh.groups["ep"])
    dist.all_reduce(totals, group=group)
    norm = float(totals.sum().sqrt())
    if max_norm and norm > max_norm:
        torch._foreach_mul_([local(p.grad) for p in parameters], max_norm / (norm + 1e-6))
    return norm, bool(own.isfinite().all())


def local(x: Tensor) -> Tensor:
    """Returns what lies on this rank, sharing memory."""
    return x.to_local() if isinstance(x, DTensor) else x
