"""The one order in which a plain decoder becomes this rank's part of a parallel one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.parallel.logprob import ScoringHead
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import split_stage
from llmtrain.parallel.remat import remat_blocks
from llmtrain.parallel.tensor import shard, tensor_parallel

WeightSource = Callable[[str], Tensor]
"""Canonical name -> whole fp32 tensor."""


def parallelize(
    config: ModelConfig, mesh: Mesh, parallel: ParallelConfig, engine: EngineConfig, source: WeightSource
) -> Decoder:
    """This rank's part of the decoder with its weights, on `mesh.device`: split stage -> tensor parallel -> scoring
    head -> remat -> weights. Compilation follows when the engine has wrapped it (`compile_blocks`)."""
    with torch.device("meta"):
        model = Decoder(config)
    split_stage(model, mesh.coords["pp"], mesh.sizes["pp"])
    tensor_parallel(model, mesh.tp_group, parallel.sequence_parallel)
    scoring_head(model, mesh, engine.logprob_chunk_tokens)
    if engine.remat == "full":
        remat_blocks(model)
    materialize(model, mesh, source)
    return model.train()


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


def materialize(model: nn.Module, mesh: Mesh, source: WeightSource) -> None:
    """Replace the meta parameters by this rank's slices, one global tensor at a time.

    Every parameter gets `tp_dim`, `global_shape`, `canonical` (its name in a whole model) and `is_copy` (the second
    copy of a tied embedding, on the last stage).
    """
    shapes = parameter_shapes(model.config)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, meta in list(module.named_parameters(recurse=False)):
            if meta not in made:
                name = f"{prefix}.{leaf}"
                canonical = name if name in shapes else "embed.weight"
                value = shard(source(canonical), meta.tp_dim, mesh.coords["tp"], mesh.sizes["tp"])
                made[meta] = parameter = nn.Parameter(value.to(mesh.device, torch.float32).clone())
                parameter.tp_dim, parameter.global_shape = meta.tp_dim, shapes[canonical]
                parameter.canonical, parameter.is_copy = canonical, canonical != name
            setattr(module, leaf, made[meta])


def compile_blocks(model: nn.Module) -> None:
    """torch.compile each block for itself: one graph, compiled once, in place."""
    for block in model.layers.values():
        block.compile()
