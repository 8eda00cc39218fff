"""Which parameters a rank has before data-parallel sharding: shapes, stage by stage, by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llmtrain.config.schema import ModelConfig, ParallelConfig
from llmtrain.config.stages import StagePlan, plan_stages

Shape = tuple[int, ...]
PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: parameters not larger stay whole between steps
REUSE = 1_000_000_000  # its stage3_max_reuse_distance: what is used again within so many elements stays whole till then


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
    """Of everything on a pipeline rank, each parameter once, in module order: the embedding first, the head last."""
    plan, shapes = plan_stages(model, parallel), []
    for stage in plan.stages_of(pp_rank):
        *blocks, rest = stage_units(model, parallel, stage)
        lookup = 1 if stage == 0 else 0
        shapes += rest[:lookup] + [shape for block in blocks for shape in block] + rest[lookup:]
    return shapes[:-1] if model.tie_embeddings and holds_both_ends(plan, pp_rank) else shapes


def holds_both_ends(plan: StagePlan, pp_rank: int) -> bool:
    """Does the rank have the embedding and, on another stage, the head?"""
    last = len(plan.layers) - 1
    return last > 0 and plan.rank_of(0) == pp_rank == plan.rank_of(last)


def block_matrices(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[Shape]:
    """Of a pipeline rank's blocks: what Muon updates."""
    plan = plan_stages(model, parallel)
    layers = sum(len(plan.layers[stage]) for stage in plan.stages_of(pp_rank))
    return [shape for shape in block_shapes(model, parallel.tp) if len(shape) > 1] * layers


def optimizer_groups(shapes: Sequence[Shape]) -> list[list[Shape]]:
    """Matrices and vectors: they differ in weight decay."""
    groups = [[shape for shape in shapes if (len(shape) > 1) == matrix] for matrix in (True, False)]
    return [group for group in groups if group]


def numel(shapes: Iterable[Shape]) -> int:
    """Elements of all of them."""
    return sum(math.prod(shape) for shape in shapes)
