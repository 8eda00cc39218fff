"""Computes which parameter shapes a rank has before data-parallel sharding, one pipeline stage after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmtrain.arch.adapters import adapter_shapes
from llmtrain.arch.parameters import Shape, in_block, kinds_of, layer_shapes, local_shape, mtp_shapes, outer_shapes
from llmtrain.arch.pipeline import StagePlan, plan_stages
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig

PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: parameters not larger stay whole between steps
REUSE = 1_000_000_000  # its stage3_max_reuse_distance: parameters used again within so many elements stay whole


def value_bytes(engine: EngineConfig) -> int:
    """Returns the bytes of an activation, and of a weight in the compute precision."""
    return 4 if engine.precision == "fp32" else 2


def block_shapes(model: ModelConfig, layer: int, tp: int, ep: int = 1) -> list[Shape]:
    """Returns one block's shapes on one of `tp` tensor-parallel (and `ep` expert-parallel) ranks, in module order.

    `model` is resolved. The bias of a router, which is not trained, does not count.
    """
    names = {name: shape for name, shape in layer_shapes(model, layer).items() if not name.endswith("router.bias")}
    return [local_shape(f"layers.{layer}.{name}", shape, model, tp, ep) for name, shape in names.items()]


def stage_units(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[list[Shape]]:
    """Returns the shapes of each block of a pipeline stage and, last, of its parameters outside blocks.

    These are embedding, final norm, head (a tied one on a later pipeline stage is a second copy) and multi-token
    prediction modules.
    """
    layers, tp = plan_stages(model, parallel).layers, parallel.tp
    front, behind = (
        [local_shape(name, shape, model, tp) for name, shape in shapes.items()] for shapes in outer_shapes(model)
    )
    rest = front if stage == 0 else []
    if stage == len(layers) - 1:
        further = {name: shape for name, shape in mtp_shapes(model).items() if not name.endswith("router.bias")}
        rest = rest + behind + [local_shape(n, shape, model, tp, parallel.ep) for n, shape in further.items()]
        rest += [front[0]] if stage > 0 and model.tie_embeddings else []
    alike = [(kind, block_shapes(model, kind[0], tp, parallel.ep)) for kind in kinds_of(model, layers[stage])]
    blocks = {layer: shapes for kind, shapes in alike for layer in kind}
    return [list(blocks[layer]) for layer in layers[stage]] + [rest]


def rank_shapes(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[Shape]:
    """Returns the shapes on a pipeline rank, each parameter once, in module order: the embedding first, the head
    last."""
    plan, shapes = plan_stages(model, parallel), []
    for stage in plan.stages_of(pp_rank):
        *blocks, rest = stage_units(model, parallel, stage)
        lookup = len(outer_shapes(model)[0]) if stage == 0 else 0
        shapes += rest[:lookup] + [shape for block in blocks for shape in block] + rest[lookup:]
    return shapes[:-1] if model.tie_embeddings and holds_both_ends(plan, pp_rank) else shapes


def stage_adapters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[Shape]:
    """Returns the shapes of the adapters of a pipeline stage, in module order; with `model.lora` only these are
    trained."""
    names = adapter_shapes(model)
    here = [f"layers.{layer}." for layer in plan_stages(model, parallel).layers[stage]]
    return [local_shape(n, shape, model, parallel.tp) for n, shape in names.items() if n.startswith(tuple(here))]


def rank_adapters(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[Shape]:
    """Returns the shapes of the adapters on a pipeline rank."""
    stages = plan_stages(model, parallel).stages_of(pp_rank)
    return [shape for stage in stages for shape in stage_adapters(model, parallel, stage)]


def holds_both_ends(plan: StagePlan, pp_rank: int) -> bool:
    """Returns whether the rank has the embedding and, on another pipeline stage, the head."""
    last = len(plan.layers) - 1
    return last > 0 and plan.rank_of(0) == pp_rank == plan.rank_of(last)


def block_matrices(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[Shape]:
    """Returns the matrices of a pipeline rank's blocks, which Muon updates, those of the experts of a layer as one."""
    plan = plan_stages(model, parallel)
    layers = [layer for stage in plan.stages_of(pp_rank) for layer in plan.layers[stage]]
    shapes = [shape for layer in layers for shape in block_shapes(model, layer, parallel.tp, parallel.ep)]
    further = {name: shape for name, shape in mtp_shapes(model).items() if in_block(name) and parallel.pp == 1}
    shapes += [local_shape(name, shape, model, parallel.tp, parallel.ep) for name, shape in further.items()]
    return [shape for shape in shapes if len(shape) > 1]


def by_ranks(shapes: Sequence[Shape], ranks: int, ep: int) -> list[tuple[list[Shape], int]]:
    """Returns (shapes, number of ranks that share their state) for dense parameters and for experts.

    Experts, which have three dims, are on 1 / ep of the `ranks`. Without expert parallelism there is one entry for all.
    """
    if ep == 1:
        return [(list(shapes), ranks)]
    dense = [shape for shape in shapes if len(shape) < 3]
    return [(dense, ranks), ([shape for shape in shapes if len(shape) == 3], ranks // ep)]


def optimizer_groups(shapes: Sequence[Shape], muon: Sequence[Shape] = ()) -> list[list[Shape]]:
    """Returns the groups of the optimizer: the matrices of `muon`, other matrices, and vectors, which have no weight
    decay."""
    left, taken, rest = Counter(muon), [], []
    for shape in shapes:
        (taken if left[shape] else rest).append(shape)
        left[shape] -= bool(left[shape])
    groups = [taken, *([shape for shape in rest if (len(shape) > 1) == matrix] for matrix in (True, False))]
    return [group for group in groups if group]
