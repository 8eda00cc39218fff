"""Computes what a rank sends outside training steps, itemised as in `scaling.communication`: when a model scores
without gradients, and when a generator gets new weights. Starts nothing.

A frozen model (a reference, a teacher) is FSDP2 over all data-parallel ranks and gathers its blocks for each
microbatch, whatever the backend of the trained ones. A trained model scores as its engine's forward does; DeepSpeed's
ZeRO stage 3 gathers for each microbatch what is not PERSISTENT.

New weights are joined parameter by parameter over the ranks that share them, and pipeline ranks broadcast theirs, so
that every trainer has each tensor whole; for rollout workers the first trainer broadcasts it to all ranks of the job.

Not exact are the positions that a tied embedding and head have under ZeRO stage 3 with more than REUSE elements. Left
out are names and shapes beside the weights, prompts and samples as text, and the likeliest tokens of `Batch.top_k`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from llmtrain.arch.adapters import adapter_shapes
from llmtrain.arch.parameters import (
    Shape,
    kinds_of,
    layer_shapes,
    local_shape,
    mtp_shapes,
    numel,
    outer_shapes,
    tp_dim,
)
from llmtrain.arch.resolve import parameter_count
from llmtrain.config.schema import ModelConfig
from llmtrain.scaling.communication import ATTENTION, Item, RankStep
from llmtrain.scaling.parts import PERSISTENT, by_ranks, rank_adapters, rank_shapes, stage_adapters, stage_units

HEADER_BYTES = 32  # shape and dtype in front of the first microbatch that a pipeline rank sends


def frozen_rank(rank: RankStep) -> RankStep:
    """Returns the same rank of a model that is never trained: sharded over all data-parallel ranks."""
    p, lora = rank.parallel, {"lora": None}
    parallel = p.model_copy(update={"dp_replicate": 1, "dp_shard": p.dp_replicate * p.dp_shard})
    engine = rank.engine.model_copy(update={"backend": "fsdp", "reshard": True})
    return replace(rank, model=rank.model.model_copy(update=lora), parallel=parallel, engine=engine)


def scoring(rank: RankStep) -> list[Item]:
    """Returns all messages of a forward without gradients over the microbatches of `rank.step`."""
    weights = _fsdp(rank) if rank.engine.backend == "fsdp" else _zero3(rank)
    shared = [*_pipeline(rank), *_context(rank), *_tensor(rank), *_experts(rank)]
    return [item for item in [*weights, *shared] if item.size_bytes and rank.ranks(item.axis) > 1]


def weight_sync(rank: RankStep) -> list[Item]:
    """Returns all messages by which every trainer gets the whole weights, in the compute precision."""
    sums: Counter[tuple[str, str]] = Counter()
    for axis, kind, _, size in _joined(rank):
        sums[axis, kind] += size
    return [Item(*key, "weights", size) for key, size in sums.items() if size and rank.ranks(key[0]) > 1]


def broadcast_bytes(rank: RankStep) -> int:
    """Returns what the first trainer broadcasts to rollout workers, and with them to all other trainers."""
    return parameter_count(rank.model.model_copy(update={"lora": None})) * rank.value_bytes


def _fsdp(rank: RankStep) -> Iterator[Item]:
    times = rank.step.microbatches if rank.engine.reshard else 1
    for stage in rank.plan.stages_of(rank.pp_rank):
        *blocks, rest = stage_units(rank.model, rank.parallel, stage)
        each = [shape for block in blocks for shape in block]
        apart = by_ranks(each, rank.ranks("shard"), rank.parallel.ep)
        for axis, (some, _) in zip(("shard", "expert_shard"), apart, strict=False):
            yield from _gathered(rank, some, times, axis)
        yield from _gathered(rank, stage_adapters(rank.model, rank.parallel, stage), times, "shard")
        apart = by_ranks(rest, rank.ranks("shard"), rank.parallel.ep)
        for axis, (some, _), gathers in zip(("shard", "expert_shard"), apart, (1, times), strict=False):
            yield from _gathered(rank, some, gathers, axis)


def _gathered(rank: RankStep, shapes: Sequence[Shape], times: int, axis: str) -> Iterator[Item]:
    """Yields the all-gathers of one FSDP unit, its dim 0 padded to a multiple of the ranks."""
    padding = numel((-shape[0] % rank.ranks(axis), *shape[1:]) for shape in shapes)
    yield Item(axis, "all_gather", "weights", numel(shapes) * times * rank.value_bytes)
    yield Item(axis, "all_gather", "padding", padding * times * rank.value_bytes)


def _zero3(rank: RankStep) -> Iterator[Item]:
    if rank.engine.zero_stage < 3:
        return
    shapes = _held(rank)
    large, ranks = [shape for shape in shapes if math.prod(shape) > PERSISTENT], rank.ranks("grad")
    size = sum(math.prod(shape) + -math.prod(shape) % ranks for shape in large)
    yield Item("grad", "all_gather", "weights", size * rank.step.microbatches * rank.value_bytes)


def _held(rank: RankStep) -> list[Shape]:
    own = rank_shapes(rank.model, rank.parallel, rank.pp_rank)
    return [*own, *rank_adapters(rank.model, rank.parallel, rank.pp_rank)]


def _pipeline(rank: RankStep) -> Iterator[Item]:
    """Yields the sends from stage to stage, and the broadcast of what the head gives."""
    p, plan, step = rank.parallel, rank.plan, rank.step
    hidden = rank.hidden_bytes // (p.tp if p.sequence_parallel else 1)
    targets = [stage + 1 for stage in plan.stages_of(rank.pp_rank) if stage + 1 < len(plan.layers)]
    sends = sum(plan.rank_of(target) != rank.pp_rank for target in targets)
    yield Item("pp", "send", "activations forward", sends * (step.microbatches * hidden + HEADER_BYTES))
    yield Item("pp", "broadcast", "scores", _score_bytes(rank) // p.cp)


def _score_bytes(rank: RankStep) -> int:
    """Returns the bytes of log-probs and entropies, or of values, of all rows."""
    numbers = 1 if rank.model.head == "scalar" else 2
    return numbers * 4 * rank.step.microbatches * rank.step.rows * rank.step.tokens


def _context(rank: RankStep) -> Iterator[Item]:
    p, step, m = rank.parallel, rank.step, rank.model
    parts = len(rank.plan.stages_of(rank.pp_rank))
    yield Item("cp", "all_gather", "document ids", step.ids * parts * step.microbatches * step.rows * step.tokens * 8)
    yield Item("cp", "all_gather", "scores", _score_bytes(rank))
    width = step.rows * step.tokens // p.cp * (m.head_dim + (m.mla.v_head_dim if m.mla else m.head_dim))
    q, kv = width * (m.num_heads // p.tp), width * max(1, m.num_kv_heads // p.tp)
    yield from ATTENTION[p.context](q, kv, rank, rank.num_layers * step.microbatches, 0)


def _tensor(rank: RankStep) -> Iterator[Item]:
    halves, size = 2 * rank.num_layers, rank.step.microbatches * rank.hidden_bytes
    enter, leave = halves + rank.has_head, halves + rank.has_embedding
    if rank.parallel.sequence_parallel:
        yield Item("tp", "all_gather", "activations", enter * size)
        yield Item("tp", "reduce_scatter", "activations", leave * size)
    else:
        yield Item("tp", "all_reduce", "activations", leave * size)
    if rank.has_head and rank.model.head == "scalar":
        positions = rank.step.rows * rank.step.tokens // rank.parallel.cp
        yield Item("tp", "all_reduce", "values", rank.step.microbatches * positions * 4)
    elif rank.has_head:
        yield Item("tp", "all_reduce", "log-probs", rank.step.trained_tokens * 4 * 4)


def _experts(rank: RankStep) -> Iterator[Item]:
    e, step = rank.model.moe, rank.step
    if e is None:
        return
    passes = rank.moe_layers * step.microbatches
    rows = 2 * step.pairs * rank.model.hidden_size * rank.value_bytes + step.pairs * 4
    yield Item("ep", "all_to_all", "numbers of rows", passes * (e.num_experts // rank.parallel.tp) * 8)
    yield Item("ep", "all_to_all", "rows", rows)


def _joined(rank: RankStep) -> Iterator[Item]:
    """Yields the messages of `engine.step.full_weights`: those of this pipeline rank's parameters, and every broadcast.
    An adapter is joined too, to be added to its projection."""
    for name, shape, owned, count in _kinds(rank):
        each = _joined_parameter(rank, name, shape) if owned else ()
        yield from (item._replace(size_bytes=item.size_bytes * owned) for item in each)
        if not name.endswith((".lora.a", ".lora.b")):
            value = 4 if name.endswith("router.bias") else rank.value_bytes
            yield Item("pp", "broadcast", "weights", math.prod(shape) * value * count)


def _kinds(rank: RankStep) -> Iterator[tuple[str, Shape, int, int]]:
    """Yields parameters: name, shape, how many of its kind this pipeline rank has, and how many there are. Those of
    blocks of a kind are alike but for their layer."""
    model = rank.model
    own = {layer for stage in rank.plan.stages_of(rank.pp_rank) for layer in rank.plan.layers[stage]}
    alike = {kind[0]: kind for kind in kinds_of(model, range(model.num_layers))}
    for name, shape in {**_base_shapes(model, alike), **adapter_shapes(model)}.items():
        if not name.startswith("layers."):
            yield name, shape, int(rank.plan.owner(name) == rank.pp_rank), 1
        elif (layer := int(name.split(".")[1])) in alike:
            yield name, shape, len(own.intersection(alike[layer])), len(alike[layer])


def _joined_parameter(rank: RankStep, name: str, shape: Shape) -> Iterator[Item]:
    """Yields the messages by which the ranks that share a parameter of this pipeline rank join it."""
    if name.endswith("router.bias"):
        return
    p, value = rank.parallel, rank.value_bytes
    local = local_shape(name, shape, rank.model, p.tp, p.ep)
    yield from _joined_shards(rank, local, is_expert(name))
    if tp_dim(name, rank.model, p.tp) is not None:
        yield Item("tp", "all_gather", "weights", math.prod(local) * p.tp * value)
    if is_expert(name):
        yield Item("ep", "all_gather", "weights", math.prod(shape) * value)


def _joined_shards(rank: RankStep, local: Shape, expert: bool) -> Iterator[Item]:
    """Yields the all-gather of a parameter over the data-parallel ranks that share it."""
    if rank.engine.backend == "fsdp":
        axis = "expert_shard" if expert and rank.parallel.ep > 1 else "shard"
        rows = -(-local[0] // rank.ranks(axis)) * rank.ranks(axis)
        yield Item(axis, "all_gather", "weights", rows * math.prod(local[1:]) * rank.value_bytes)
    elif rank.engine.zero_stage == 3 and math.prod(local) > PERSISTENT:
        ranks = rank.ranks("grad")
        yield Item("grad", "all_gather", "weights", -(-math.prod(local) // ranks) * ranks * rank.value_bytes)


def is_expert(name: str) -> bool:
    """Tells whether a parameter holds the weights of experts, which ranks of ep share."""
    return ".experts." in name


def _base_shapes(model: ModelConfig, layers: Iterable[int]) -> dict[str, Shape]:
    """Returns the shapes that a generator gets, by canonical name, buffers included; of blocks, those of `layers`."""
    front, behind = outer_shapes(model)
    blocks = {f"layers.{layer}.{name}": shape for layer in layers for name, shape in layer_shapes(model, layer).items()}
    return {**front, **blocks, **behind, **mtp_shapes(model)}
