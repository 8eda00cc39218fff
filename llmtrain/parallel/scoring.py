"""Log-probs of labels through a parallel model, without gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.arch.pipeline import StagePlan
from llmtrain.parallel.context import local_batches, whole_rows
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import Pipeline, inputs_of
from llmtrain.types import Batch


@torch.no_grad()
def score(
    parts: Sequence[nn.Module], pipeline: Pipeline | None, mesh: Mesh, microbatches: Sequence[Batch]
) -> list[tuple[Tensor, Tensor]]:
    """(log-probs, entropies), [B, T] fp32, for each microbatch, the same on every pipeline and context
    rank."""
    batches = local_batches(microbatches, mesh)
    if pipeline is None:
        scores = [parts[0](b.input_ids, **inputs_of(b, True)) for b in batches]
    else:
        at_head = pipeline.score(batches)
        scores = [_from_head(None if at_head is None else at_head[i], b, mesh) for i, b in enumerate(batches)]
    return [(whole_rows(logp, mesh), whole_rows(entropy, mesh)) for logp, entropy in scores]


def _from_head(scores: tuple[Tensor, Tensor] | None, batch: Batch, mesh: Mesh) -> tuple[Tensor, Tensor]:
    pair = torch.zeros(2, *batch.labels.shape, device=mesh.device) if scores is None else torch.stack(scores)
    dist.broadcast(pair, group=mesh.groups["pp"], group_src=mesh.head_pp)
    return pair[0], pair[1]


class FrozenModel:
    """A model that is only scored with: the reference of a KL penalty or a preference loss."""

    def __init__(self, parts: Sequence[nn.Module], plan: StagePlan, mesh: Mesh, dtype: torch.dtype) -> None:
        self.parts, self.mesh = [part.to(dtype).eval().requires_grad_(False) for part in parts], mesh
        self.pipeline = Pipeline(self.parts, plan, mesh) if mesh.sizes["pp"] > 1 else None

    def score(self, microbatches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
        """See `score`."""
        return score(self.parts, self.pipeline, self.mesh, microbatches)
