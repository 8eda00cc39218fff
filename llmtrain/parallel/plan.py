"""Turns a plain decoder into this rank's part of a parallel one: every change, in the one order in which they go
together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from llmtrain.arch.pipeline import plan_stages
from llmtrain.arch.resolve import chunk_tokens
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.model.heads import LMHead
from llmtrain.model.kernels.backends import kernels_of, set_kernels
from llmtrain.parallel.context import context_parallel
from llmtrain.parallel.expert import expert_parallel
from llmtrain.parallel.float8 import float8_blocks
from llmtrain.parallel.logprob import ScoringHead
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import keep_stage
from llmtrain.parallel.placement import copy_placement, place
from llmtrain.parallel.remat import compile_block, remat_blocks
from llmtrain.parallel.tensor import shard, tensor_parallel
from llmtrain.types import WeightSource

GRAPHS_A_MODEL = 8  # torch's own limit for one: training, scoring, without adapters; fixed and varying lengths


def parallelize(config: ModelConfig, mesh: Mesh, parallel: ParallelConfig, engine: EngineConfig) -> list[Decoder]:
    """Returns this rank's pipeline stages (without a pipeline: the one decoder), on the meta device: without memory.

    The order: cut pipeline stages -> tensor parallel -> experts -> context parallel or attention's kernel -> fp8 ->
    scoring head -> remat. Weights follow: an engine shards them as it takes them in; who keeps this rank's whole part
    calls `materialize`. Compilation comes last (`compile_blocks`).

    Raises ValueError when this device cannot compute `engine.attention`.
    """
    plan, shapes = plan_stages(config, parallel), parameter_shapes(config)
    parts = []
    for stage in plan.stages_of(mesh.coords["pp"]):
        with torch.device("meta"):
            part = Decoder(config)
        keep_stage(part, plan, stage)
        place(part, shapes)
        tensor_parallel(part, mesh.tp_group, parallel.sequence_parallel)
        expert_parallel(part, mesh, parallel.sequence_parallel)
        kernels = kernels_of(config, engine.attention, mesh.device, engine.precision)
        if mesh.sizes["cp"] > 1:
            context_parallel(part, mesh.groups["cp"], parallel.context, kernels)
        else:
            set_kernels(part, kernels)
        if engine.precision == "fp8":
            float8_blocks(part)
        scoring_head(part, mesh, engine)
        if engine.remat != "none":
            remat_blocks(part, engine.remat)
        parts.append(part.train())
    if config.tie_embeddings and mesh.has_embedding and mesh.has_head:
        parts[-1].head.weight = parts[0].embed.weight
    return parts


def scoring_head(model: nn.Module, mesh: Mesh, engine: EngineConfig) -> None:
    """Lets the head of a language model compute log-probs in chunks, in place."""
    if not isinstance(model.head, LMHead):
        return
    rows = model.config.vocab_size // mesh.sizes["tp"]
    model.head.__class__ = ScoringHead
    model.head.group, model.head.chunk_tokens = mesh.tp_group, chunk_tokens(engine, rows, mesh.device.type == "cuda")
    model.head.first_id = mesh.coords["tp"] * rows


def materialize(parts: Sequence[nn.Module], mesh: Mesh, source: WeightSource) -> None:
    """Replaces the meta parameters by this rank's slices, fp32 on `mesh.device`, one global tensor at a time."""
    for _ in materialize_each(parts, mesh, source):
        pass
    fill_buffers(parts, mesh, source)


def materialize_each(parts: Sequence[nn.Module], mesh: Mesh, source: WeightSource) -> Iterator[nn.Parameter]:
    """Replaces the parameters as `materialize` does and yields each when it is in its place: who keeps less of it cuts
    it before the next one is read."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in (module for part in parts for module in part.modules()):
        for leaf, meta in module.named_parameters(recurse=False):
            places.setdefault(meta, []).append((module, leaf))
    for meta in list(places):
        empty = torch.empty_like(meta, dtype=torch.float32, device=mesh.device)
        parameter = nn.Parameter(empty, requires_grad=meta.requires_grad)
        parameter.data.copy_(slice_of(meta, source))
        copy_placement(meta, parameter)
        for module, leaf in places.pop(meta):
            setattr(module, leaf, parameter)
        yield parameter


def buffers_of(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Returns what a model holds beside parameters (biases of routers), by canonical name: whole on every rank of its
    pipeline stage."""
    return {name: buffer for part in parts for name, buffer in part.named_buffers()}


def fill_buffers(parts: Sequence[nn.Module], mesh: Mesh, source: WeightSource) -> None:
    """Gives the buffers memory, fp32 on `mesh.device`, and their values."""
    for part in parts:
        for name, module in part.named_modules():
            for leaf, _ in list(module.named_buffers(recurse=False)):
                value = source(f"{name}.{leaf}").to(mesh.device, torch.float32, copy=True)
                module.register_buffer(leaf, value)


def slice_of(parameter: nn.Parameter, source: WeightSource) -> Tensor:
    """Returns what the rank holds of a parameter's global tensor under tensor or expert parallelism; perhaps a view, do
    not write into it."""
    return shard(source(parameter.placement.name), parameter.placement.tp_dim, *parameter.placement.cut)


def parameters_of(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Returns all parameters, each once, in a fixed order."""
    return list(dict.fromkeys(p for part in parts for p in part.parameters()))


def trained_of(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Returns those of `parameters_of` that have a gradient: all, or only adapters."""
    return [p for p in parameters_of(parts) if p.requires_grad]


def compile_blocks(parts: Sequence[Decoder]) -> None:
    """Compiles each block for itself (torch.compile), and the scoring of the head: one graph, compiled once, in place.

    Models share the code of their blocks, and torch counts the graphs of a piece of code: beyond its limit it compiles
    nothing, without a word. So every model brings its own.
    """
    from torch._dynamo import config  # takes 2 s

    config.recompile_limit += GRAPHS_A_MODEL
    for part in parts:
        for block in part.blocks():
            compile_block(block)
        if isinstance(part.head, ScoringHead):
            part.head.compiled = True
