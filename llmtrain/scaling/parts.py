"""Which parameters a rank has before data-parallel sharding: shapes, stage by stage, by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmtrain.config.schema import ModelConfig, ParallelConfig
from llmtrain.config.stages import StagePlan, plan_stages

Shape = tuple[int, ...]


def block_shapes(model: ModelConfig, tp: int) -> list[Shape]:
    """Of one block on one of `tp` ranks, in module order. `model` is resolved."""
    m = model
    assert m.head_dim is not None
    hidden, ffn = m.hidden_size, m.ffn_size // tp
    q, kv = m.num_heads * m.head_dim // tp, m.num_kv_heads * m.head_dim // tp
    attention = [(hidden,), (q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    return [*attention, (hidden,), (ffn, hidden), (ffn, hidden), (hidden, ffn)]


def stage_units(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[list[Shape]]:
    """Of each block of a pipeline stage and, last, of what it has beside blocks: embedding, final norm, head (a tied
    one on a later stage is a second copy)."""
    layers = plan_stages(model, parallel).layers
    matrix, rest = (model.vocab_size // parallel.tp, model.hidden_size), []
    if stage == 0:
        rest.append(matrix)
    if stage == len(layers) - 1:
        rest += [(model.hidden_size,)] + ([matrix] if stage > 0 or not model.tie_embeddings else [])
    return [block_shapes(model, parallel.tp) for _ in layers[stage]] + [rest]


def rank_shapes(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[Shape]:
    """Of everything on a pipeline rank, each parameter once."""
    plan = plan_stages(model, parallel)
    shapes = [s for stage in plan.stages_of(pp_rank) for unit in stage_units(model, parallel, stage) for s in unit]
    if model.tie_embeddings and holds_both_ends(plan, pp_rank):
        shapes.remove((model.vocab_size // parallel.tp, model.hidden_size))
    return shapes


def holds_both_ends(plan: StagePlan, pp_rank: int) -> bool:
    """Does the rank have the embedding and, on another stage, the head?"""
    last = len(plan.layers) - 1
    return last > 0 and plan.rank_of(0) == pp_rank == plan.rank_of(last)


def numel(shapes: Iterable[Shape]) -> int:
    """Elements of all of them."""
    return sum(math.prod(shape) for shape in shapes)
