"""Implements what both engines do alike in a step and when their weights are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.arch.adapters import without_adapters
from llmtrain.arch.pipeline import StagePlan
from llmtrain.engine.base import Admit
from llmtrain.engine.precision import LossScaler
from llmtrain.engine.tally import Tally
from llmtrain.model.decoder import parameter_shapes
from llmtrain.model.lora import merged
from llmtrain.parallel.collectives import all_gather
from llmtrain.parallel.context import local_batches
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import Output, Pipeline, inputs_of
from llmtrain.parallel.plan import buffers_of, parameters_of
from llmtrain.parallel.scoring import scores_of
from llmtrain.types import Batch, Scores


def backward(
    parts: Sequence[nn.Module],
    pipeline: Pipeline | None,
    mesh: Mesh,
    microbatches: Sequence[Batch],
    loss: Callable[[Scores, Batch, int], Tensor],
) -> None:
    """Runs forward and backward of all microbatches. `loss(scores, batch, i)`, of whole rows on this device, is
    differentiated where the head is."""
    rows = [batch.to(mesh.device) for batch in microbatches]
    batches = local_batches(rows, mesh)

    def of_rows(output: Output, i: int) -> Tensor:
        return loss(scores_of(output, mesh), rows[i], i)

    if pipeline is not None:
        return pipeline.train(batches, of_rows)
    for i, batch in enumerate(batches):
        of_rows(parts[0](batch.input_ids, **inputs_of(batch, True)), i).backward()


def sum_tied_gradients(parts: Sequence[nn.Module], mesh: Mesh, gradient: Callable[[nn.Parameter], Tensor]) -> None:
    """Sums the gradient of a tied embedding that is there twice, on two ranks or in two pipeline stages of one: each
    copy has half of the gradient; afterwards both have the sum."""
    if not parts[0].config.tie_embeddings or parts[0].config.lora is not None:
        return
    held = ([parts[0].embed.weight] if mesh.has_embedding else []) + ([parts[-1].head.weight] if mesh.has_head else [])
    if len(held) == 1:
        total = gradient(held[0]).to(mesh.device)  # offloaded ones lie on the CPU
        dist.all_reduce(total, group=mesh.groups["ends"])
        gradient(held[0]).copy_(total)
    elif len(held) == 2 and held[0] is not held[1]:
        total = gradient(held[0]) + gradient(held[1])
        for p in held:
            gradient(p).copy_(total)


@torch.no_grad()
def full_weights(
    parts: Sequence[nn.Module],
    plan: StagePlan,
    mesh: Mesh,
    dtype: torch.dtype,
    gather: Callable[[nn.Parameter], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yields (canonical name, whole tensor) on every rank, adapters merged; `gather` joins a parameter over the
    data-parallel ranks."""
    mine = {p.placement.name: p for p in parameters_of(parts) if not p.placement.is_copy}
    held, model = buffers_of(parts), parts[0].config

    def whole(name: str) -> Tensor:
        return held[name] if name in held else _join_shards(gather(mine[name]), mine[name], mesh)

    for name, shape in parameter_shapes(without_adapters(model)).items():
        if plan.owner(name) == mesh.coords["pp"]:
            full = merged(name, model, whole)
        else:
            kept = torch.float32 if name.endswith("router.bias") else dtype
            full = torch.empty(shape, dtype=kept, device=mesh.device)
        if plan.pp > 1:
            dist.broadcast(full, group=mesh.groups["pp"], group_src=plan.owner(name))
        yield name, full


def _join_shards(piece: Tensor, p: nn.Parameter, mesh: Mesh) -> Tensor:
    if mesh.tp_group is not None and p.placement.tp_dim is not None:
        piece = all_gather(piece, p.placement.tp_dim, mesh.tp_group)
    return all_gather(piece, 0, mesh.groups["ep"]) if p.placement.expert else piece


def admitted(scaler: LossScaler, tally: Tally, broken: list[int], admit: Admit) -> bool:
    """Tells whether the update is made. An overflow that a smaller loss scale can avoid never reaches `admit`; a loss
    that is not finite does. `broken`: ranks whose gradient or loss is not finite."""
    overflow = bool(broken) and math.isfinite(tally.loss)
    scale, explained = scaler.scale, scaler.explains(overflow)
    if scaler.dynamic:
        tally.metrics |= {"loss_scale": scale, "skipped": float(explained)}
    return not explained and admit(tally.loss, broken)
