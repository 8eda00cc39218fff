"""Turns what a head gives for this rank's part of a batch into `Scores` of whole rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.parallel.context import local_batches, whole_rows
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import Output, Pipeline, inputs_of
from llmtrain.types import Batch, Scores


def scores_of(output: Output, mesh: Mesh) -> Scores:
    """Returns the scores of whole rows, the same on all context-parallel ranks (a collective over them).

    `output` is what the head gives for this rank's part of the rows: (log-probs, entropies), or a tensor of values.
    The backward keeps the gradient of that part alone: summed over the ranks it is there once.
    """
    parts = (output,) if isinstance(output, Tensor) else tuple(output)
    if mesh.sizes["cp"] > 1:
        parts = whole_rows(torch.stack(parts, -1), mesh).unbind(-1)
    return Scores(values=parts[0]) if len(parts) == 1 else Scores(*parts)


@torch.no_grad()
def score(
    parts: Sequence[nn.Module], pipeline: Pipeline | None, mesh: Mesh, microbatches: Sequence[Batch]
) -> list[Scores]:
    """Returns the scores of each microbatch, the same on every pipeline and context-parallel rank."""
    batches = local_batches(microbatches, mesh)
    if pipeline is None:
        outputs = [parts[0](b.input_ids, **inputs_of(b, True)) for b in batches]
    else:
        at_head = pipeline.score(batches)
        scalar = parts[0].config.head == "scalar"
        outputs = [_from_head(None if at_head is None else at_head[i], b, mesh, scalar) for i, b in enumerate(batches)]
    return [scores_of(output, mesh) for output in outputs]


def _from_head(output: Output | None, batch: Batch, mesh: Mesh, scalar: bool) -> Output:
    """Returns on every pipeline rank what the head gives on its own: values of a scalar head, else a pair."""
    if output is None:
        held = torch.zeros(1 if scalar else 2, *batch.labels.shape, device=mesh.device)
    else:
        held = torch.stack([output] if isinstance(output, Tensor) else output)
    dist.broadcast(held, group=mesh.groups["pp"], group_src=mesh.head_pp)
    return held[0] if scalar else (held[0], held[1])
