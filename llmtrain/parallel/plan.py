"""The one order in which a plain decoder becomes this rank's part of a parallel one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.config.stages import plan_stages
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.parallel.context import context_parallel
from llmtrain.parallel.logprob import ScoringHead
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import keep_stage
from llmtrain.parallel.remat import remat_blocks
from llmtrain.parallel.tensor import shard, tensor_parallel

WeightSource = Callable[[str], Tensor]
"""Canonical name -> whole fp32 tensor."""


def parallelize(
    config: ModelConfig, mesh: Mesh, parallel: ParallelConfig, engine: EngineConfig, source: WeightSource
) -> list[Decoder]:
    """This rank's pipeline stages with their weights, on `mesh.device` (without a pipeline: the one decoder).

    cut stages -> tensor parallel -> context parallel -> scoring head -> remat -> weights. Compilation follows when the
    engine has wrapped them (`compile_blocks`).
    """
    plan = plan_stages(config, parallel)
    parts = []
    for stage in plan.stages_of(mesh.coords["pp"]):
        with torch.device("meta"):
            part = Decoder(config)
        keep_stage(part, plan, stage)
        tensor_parallel(part, mesh.tp_group, parallel.sequence_parallel)
        if mesh.sizes["cp"] > 1:
            context_parallel(part, mesh.groups["cp"], parallel.context)
        scoring_head(part, mesh, engine.logprob_chunk_tokens)
        if engine.remat != "none":
            remat_blocks(part, engine.remat)
        parts.append(part.train())
    if config.tie_embeddings and mesh.has_embedding and mesh.has_head:
        parts[-1].head.weight = parts[0].embed.weight
    materialize(parts, mesh, source)
    return parts


def scoring_head(model: nn.Module, mesh: Mesh, chunk_tokens: int | None) -> None:
    """Let the head compute log-probs in chunks, in place."""
    if model.head is None:
        return
    rows = model.config.vocab_size // mesh.sizes["tp"]
    if chunk_tokens is None:  # on a CPU a chunk that the allocator keeps (2^22 fp32 numbers) beats a larger one
        chunk_tokens = max(64, 2**22 // rows) if mesh.device.type == "cpu" else 1024
    model.head.__class__ = ScoringHead
    model.head.group, model.head.chunk_tokens = mesh.tp_group, chunk_tokens
    model.head.first_id = mesh.coords["tp"] * rows


def materialize(parts: Sequence[Decoder], mesh: Mesh, source: WeightSource) -> None:
    """Replace the meta parameters by this rank's slices, one global tensor at a time.

    Every parameter gets `tp_dim`, `global_shape`, `canonical` (its name in a whole model) and `is_copy` (the second
    copy of a tied embedding, on the last stage).
    """
    shapes = parameter_shapes(parts[0].config)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in parts:
        for prefix, module in part.named_modules():
            for leaf, meta in list(module.named_parameters(recurse=False)):
                if meta not in made:
                    made[meta] = _place(f"{prefix}.{leaf}", meta.tp_dim, shapes, mesh, source)
                setattr(module, leaf, made[meta])


def _place(
    name: str, tp_dim: int | None, shapes: dict[str, tuple[int, ...]], mesh: Mesh, source: WeightSource
) -> nn.Parameter:
    canonical = name if name in shapes else "embed.weight"
    value = shard(source(canonical), tp_dim, mesh.coords["tp"], mesh.sizes["tp"])
    parameter = nn.Parameter(value.to(mesh.device, torch.float32).clone())
    parameter.tp_dim, parameter.global_shape = tp_dim, shapes[canonical]
    parameter.canonical, parameter.is_copy = canonical, canonical != name
    return parameter


def parameters_of(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Each once, in a fixed order."""
    return list(dict.fromkeys(p for part in parts for p in part.parameters()))


def compile_blocks(parts: Sequence[nn.Module]) -> None:
    """torch.compile each block for itself: one graph, compiled once, in place."""
    for part in parts:
        for block in part.layers.values():
            block.compile()
