"""What both engines do alike in a step and when their weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.stages import StagePlan
from llmtrain.engine.base import Scores
from llmtrain.model.decoder import parameter_shapes
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import Pipeline, inputs_of
from llmtrain.parallel.plan import parameters_of
from llmtrain.types import Batch


def backward(
    parts: Sequence[nn.Module],
    pipeline: Pipeline | None,
    batches: Sequence[Batch],
    loss: Callable[[Scores, int], Tensor],
) -> None:
    """Forward and backward of all microbatches; `loss(scores, i)` is differentiated where the head is."""
    if pipeline is not None:
        return pipeline.train(batches, loss)
    for i, batch in enumerate(batches):
        loss(parts[0](batch.input_ids, **inputs_of(batch, True)), i).backward()


def sum_tied_gradients(parts: Sequence[nn.Module], mesh: Mesh, gradient: Callable[[nn.Parameter], Tensor]) -> None:
    """A tied embedding whose copies lie on two ranks: each has half of the gradient; afterwards both have the sum."""
    if not parts[0].config.tie_embeddings or mesh.has_embedding == mesh.has_head:
        return
    p = parts[0].embed.weight if mesh.has_embedding else parts[-1].head.weight
    dist.all_reduce(gradient(p), group=mesh.groups["ends"])


@torch.no_grad()
def full_weights(
    parts: Sequence[nn.Module], plan: StagePlan, mesh: Mesh, dtype: torch.dtype, whole: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, whole tensor) on every rank; `whole` gathers a parameter over the ranks that share it."""
    mine = {p.canonical: p for p in parameters_of(parts) if not p.is_copy}
    for name, shape in parameter_shapes(parts[0].config).items():
        if plan.owner(name) == mesh.coords["pp"]:
            full = whole(mine[name])
        else:
            full = torch.empty(shape, dtype=dtype, device=mesh.device)
        if plan.pp > 1:
            dist.broadcast(full, group=mesh.groups["pp"], group_src=plan.owner(name))
        yield name, full
