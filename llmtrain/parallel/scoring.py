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

    `output` is what the head gives for this rank's part of the rows: a tensor of values, or (log-probs, entropies) and
    what is known of candidates. The backward keeps the gradient of that part alone: summed over the ranks it is there
    once.
    """
    if isinstance(output, Tensor):
        return Scores(values=whole_rows(output, mesh) if mesh.sizes["cp"] > 1 else output)
    if mesh.sizes["cp"] > 1:
        floats, *ids = joined(output)
        output = parted(whole_rows(floats, mesh), *(whole_rows(each, mesh) for each in ids))
    logprobs, entropies, *candidates = output
    return Scores(logprobs, entropies, None, *candidates)


def joined(output: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns the fp32 parts of a language model's output as one tensor [B, T, 2 + K], and the ids behind it if there
    are any, so that they travel together."""
    logprobs, entropies, *candidates = output
    return [torch.cat([torch.stack([logprobs, entropies], -1), *candidates[:1]], -1), *candidates[1:]]


def parted(floats: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
    """Undoes `joined`."""
    candidates = [floats[..., 2:]] if floats.size(-1) > 2 else []
    return floats[..., 0], floats[..., 1], *candidates, *ids


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
    """Returns on every pipeline rank what the head gives on its own."""
    if output is None:
        K = batch.top_k if batch.candidates is None else batch.candidates.size(-1)
        shape = batch.labels.shape if scalar else (*batch.labels.shape, 2 + K)
        held = [torch.zeros(shape, device=mesh.device)]
        if batch.top_k and not scalar:
            held.append(torch.zeros((*batch.labels.shape, K), dtype=torch.int64, device=mesh.device))
    else:
        held = [output.contiguous()] if isinstance(output, Tensor) else joined(output)
    for each in held:
        dist.broadcast(each, group=mesh.groups["pp"], group_src=mesh.head_pp)
    return held[0] if scalar else parted(*held)
