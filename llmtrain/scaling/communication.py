"""Computes what one training step sends, itemised, on every mesh axis. Starts nothing.

Bytes are those of whole messages, as tests/parallel/traffic.py counts them: what an all-gather returns, what a
reduce-scatter, an all-to-all, an all-reduce or a send takes. A ring moves an all-reduce twice and the others once, less
1 / ranks. The ZeRO stages weigh 2, 2, 2 and 3 (arXiv 1910.02054, section 7), in messages and with one microbatch:
    ZeRO stage 0     all-reduce of gradients
    ZeRO stage 1, 2  all-reduce of gradients (the paper: reduce-scatter), all-gather of weights
    ZeRO stage 3     reduce-scatter of gradients, all-gather of weights for the forward, and again for the backward
DeepSpeed 0.19 all-reduces at ZeRO stages 1 and 2, one bucket for all ranks; its alternative is a reduction to each
owner in turn. At ZeRO stage 3 it keeps parameters of at most PERSISTENT elements whole between the steps, and gathers
the others once a microbatch rather than twice if they are used again within REUSE elements: all of them in a model of
up to REUSE / 2. FSDP2 gathers a block for every forward and backward (`reshard`), or all of them once a step.

Not exact are tensor-parallel biases, norms of heads and latents, and routers, whose gradients are summed over tp;
multi-token prediction modules over tp, which are left out; K/V heads and latents that every tp rank computes; ZeRO-3
with experts on several ranks; ZeRO-3 on any pipeline stage but the last (DeepSpeed expects forward and backward to
alternate, and where they do not it gathers up to twice a microbatch more); ZeRO-3 with more than REUSE / 2 elements, by
an embedding or two blocks a step; FSDP2 with `reshard` and more than three pipeline stages a rank.
Left out are Muon's exchange of matrices, and a byte by which DeepSpeed's fp16 agrees on overflows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmtrain.arch.adapters import adapter_shapes
from llmtrain.arch.mesh import AXES
from llmtrain.arch.parameters import Shape, has_experts, numel, tp_dim
from llmtrain.arch.pipeline import StagePlan, plan_stages
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.scaling.parts import (
    PERSISTENT,
    REUSE,
    by_ranks,
    optimizer_groups,
    rank_adapters,
    rank_shapes,
    stage_adapters,
    stage_units,
    value_bytes,
)

GROUPS = {  # as in parallel.mesh
    **{axis: (axis,) for axis in AXES},
    "grad": ("dp_replicate", "dp_shard", "cp"),
    "shard": ("dp_shard", "cp"),
    "model": ("pp", "tp"),
    "replica": ("pp", "dp_shard", "cp", "tp"),
    "ends": ("pp",),
    "ep": (),
    "expert_grad": ("dp_replicate", "dp_shard", "cp"),
    "expert_shard": ("dp_shard", "cp"),
    "world": AXES,
}
CONTROL = ("norm", "report")  # items of a few bytes


class Item(NamedTuple):
    """Describes one kind of message. Example: Item("tp", "all_gather", "activations forward", 65536)"""

    axis: str  # a name of `Mesh.groups`, or world
    kind: str  # all_reduce | all_gather | reduce_scatter | all_to_all | send
    what: str
    size_bytes: int


class Step(NamedTuple):
    """Holds the size of one rank's work in one step."""

    microbatches: int
    rows: int  # a microbatch
    tokens: int  # in a whole row
    trained_tokens: int  # labels that are not IGNORE, on this rank in all microbatches
    ids: int = 1  # id fields that masks are made of: segment ids (1), with ends (2)
    report_bytes: int = 0  # of the longest report in engine.tally, JSON
    pairs: int = 0  # (token, expert): the larger of those sent and received, over MoE layers and microbatches
    balance_bytes: int = 0  # of the longest report in engine.auxiliary, JSON


@dataclass(frozen=True)
class RankStep:
    """Describes one rank's place and work in a step. `model` is resolved and `parallel.dp_shard` is not -1."""

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    step: Step
    pp_rank: int = 0
    shard_rank: int = 0  # its rank in the group `shard`

    @property
    def plan(self) -> StagePlan:
        return plan_stages(self.model, self.parallel)

    @property
    def value_bytes(self) -> int:
        """Returns the bytes of an activation, and of a weight in the compute precision."""
        return value_bytes(self.engine)

    @property
    def num_layers(self) -> int:
        return sum(len(self.plan.layers[stage]) for stage in self.plan.stages_of(self.pp_rank))

    @property
    def has_embedding(self) -> bool:
        return self.plan.rank_of(0) == self.pp_rank

    @property
    def has_head(self) -> bool:
        return self.plan.rank_of(len(self.plan.layers) - 1) == self.pp_rank

    @property
    def hidden_bytes(self) -> int:
        """Returns the bytes of the hidden states of a microbatch, [rows, tokens / cp, hidden]."""
        tokens = self.step.rows * self.step.tokens // self.parallel.cp
        return tokens * self.model.hidden_size * self.value_bytes

    def ranks(self, group: str) -> int:
        """Returns the number of ranks in a group."""
        ranks, ep = math.prod(getattr(self.parallel, axis) for axis in GROUPS[group]), self.parallel.ep
        return ep if group == "ep" else ranks // ep if group.startswith("expert_") else ranks

    @property
    def moe_layers(self) -> int:
        """Returns the number of this rank's layers with experts, multi-token prediction modules (never in a pipeline)
        included."""
        layers = [layer for stage in self.plan.stages_of(self.pp_rank) for layer in self.plan.layers[stage]]
        further = range(self.model.num_layers, self.model.num_layers + self.model.mtp_layers)
        return sum(has_experts(self.model, layer) for layer in (*layers, *further))


def communication(rank: RankStep) -> list[Item]:
    """Returns all messages of this rank in one step (after the first few); receives count at their senders."""
    engine = _fsdp(rank) if rank.engine.backend == "fsdp" else _zero(rank)
    shared = [*_tied(rank), *_pipeline(rank), *_context(rank), *_tensor(rank), *_experts(rank), *_control(rank)]
    items = [*engine, *shared]
    return [item for item in items if item.size_bytes and rank.ranks(item.axis) > 1]


def moved_bytes(items: Iterable[Item]) -> int:
    """Returns what a ring moves over each rank's link, but for the factor 1 - 1 / ranks: all-reduces count twice."""
    return sum(item.size_bytes * (2 if item.kind == "all_reduce" else 1) for item in items)


def _zero(rank: RankStep) -> Iterator[Item]:
    shapes, ranks = rank_shapes(rank.model, rank.parallel, rank.pp_rank), rank.ranks("grad")
    adapters = rank_adapters(rank.model, rank.parallel, rank.pp_rank)
    trained = shapes if rank.model.lora is None else adapters
    if rank.engine.zero_stage == 3:
        yield from _zero3(rank, [*shapes, *adapters], trained)
    else:
        apart = by_ranks(trained, ranks, rank.parallel.ep)
        for axis, (some, over) in zip(("grad", "expert_grad"), apart, strict=False):
            yield from _zero12(rank, some, axis, over)
    groups = optimizer_groups(trained)
    if rank.engine.zero_stage == 0:
        yield Item("model", "all_reduce", "norm", 8)
        yield Item("ep", "all_reduce", "norm", 4)
    elif rank.parallel.ep > 1 and rank.engine.zero_stage < 3:
        yield Item("world", "all_reduce", "norm", 4)
    else:
        in_fp64 = rank.engine.zero_stage == 3 and rank.engine.offload == "none"
        for axis in ("grad", "model"):
            yield Item(axis, "all_reduce", "norm", len(groups) * (8 if in_fp64 else 4))


def _zero12(rank: RankStep, shapes: Sequence[Shape], axis: str, ranks: int) -> Iterator[Item]:
    value = rank.value_bytes
    yield Item(axis, "all_reduce", "gradients", numel(shapes) * value)
    if rank.engine.zero_stage:
        padded = sum(_up(numel(group), 2 * ranks) for group in optimizer_groups(shapes))
        yield Item(axis, "all_gather", "weights", numel(shapes) * value)
        yield Item(axis, "all_gather", "padding", (padded - numel(shapes)) * value)


def _zero3(rank: RankStep, shapes: Sequence[Shape], trained: Sequence[Shape]) -> Iterator[Item]:
    ranks, value, microbatches = rank.ranks("grad"), rank.value_bytes, rank.step.microbatches
    padding = sum(-math.prod(shape) % ranks for shape in trained)
    yield Item("grad", "reduce_scatter", "gradients", numel(trained) * value)
    yield Item("grad", "reduce_scatter", "padding", padding * value)
    for kept in (True, False):
        some = [shape for shape in shapes if (math.prod(shape) <= PERSISTENT) == kept]
        times = 1 if kept else microbatches
        what = "weights after the update" if kept else "weights forward"
        yield Item("grad", "all_gather", what, numel(some) * times * value)
        yield Item("grad", "all_gather", "padding", sum(-math.prod(shape) % ranks for shape in some) * times * value)
    again = _gathered_again(rank, shapes)
    yield Item("grad", "all_gather", "weights backward", again * microbatches * value)


def _gathered_again(rank: RankStep, shapes: Sequence[Shape]) -> int:
    """Returns the elements that are freed between two uses, because REUSE others come between, without their padding.

    The backward of an embedding does not read its weight; a tied one is used again by the head.
    """
    after, total = numel(shapes), 0
    for i, shape in enumerate(shapes):
        after -= math.prod(shape)
        between = 2 * after
        if i == 0 and rank.has_embedding:
            between = after if rank.model.tie_embeddings and rank.has_head else 0
        if math.prod(shape) > PERSISTENT and between >= REUSE:
            total += math.prod(shape)
    return total


def _fsdp(rank: RankStep) -> Iterator[Item]:
    for stage in rank.plan.stages_of(rank.pp_rank):
        *blocks, rest = stage_units(rank.model, rank.parallel, stage)
        each, adapters = [s for block in blocks for s in block], stage_adapters(rank.model, rank.parallel, stage)
        trains_all = rank.model.lora is None
        apart = by_ranks(each, rank.ranks("shard"), rank.parallel.ep)
        for axis, (some, _) in zip(("shard", "expert_shard"), apart, strict=False):
            yield from _fsdp_unit(rank, some, _block_gathers(rank), axis, trains_all)
        yield from _fsdp_unit(rank, adapters, _block_gathers(rank), "shard")
        apart = by_ranks(rest, rank.ranks("shard"), rank.parallel.ep)
        gathers = (_root_gathers(rank), _block_gathers(rank))  # experts of multi-token modules are sharded like others
        for axis, (some, _), times in zip(("shard", "expert_shard"), apart, gathers, strict=False):
            yield from _fsdp_unit(rank, some, times, axis, trains_all)
    yield Item("replica", "all_reduce", "norm", 8)


def _fsdp_unit(
    rank: RankStep, shapes: Sequence[Shape], gathers: int, axis: str, trained: bool = True
) -> Iterator[Item]:
    """Yields the messages of one FSDP unit, its dim 0 padded to a multiple of the ranks: weights in the compute
    precision, gradients in fp32."""
    ranks = rank.ranks(axis)
    padding = numel((-shape[0] % ranks, *shape[1:]) for shape in shapes)
    for what, elements in (("weights", numel(shapes)), ("padding", padding)):
        yield Item(axis, "all_gather", what, elements * gathers * rank.value_bytes)
    if not trained:
        return
    for what, elements in (("gradients", numel(shapes)), ("padding", padding)):
        yield Item(axis, "reduce_scatter", what, elements * 4)
    yield Item("dp_replicate", "all_reduce", "gradients", (numel(shapes) + padding) // ranks * 4)


def _block_gathers(rank: RankStep) -> int:
    """Returns how often a step gathers a block. In a pipeline only forwards free it: one gather precedes all, one
    follows each."""
    if not rank.engine.reshard:
        return 1
    return 2 * rank.step.microbatches if rank.parallel.pp == 1 else rank.step.microbatches + 1


def _root_gathers(rank: RankStep) -> int:
    return rank.step.microbatches if rank.engine.reshard and rank.parallel.pp == 1 else 1


def _tied(rank: RankStep) -> Iterator[Item]:
    """Yields the all-reduce of the gradients of a tied embedding's two copies."""
    if not rank.model.tie_embeddings or rank.has_embedding == rank.has_head or rank.model.lora is not None:
        return
    rows, value = rank.model.vocab_size // rank.parallel.tp, rank.value_bytes
    if rank.engine.backend == "fsdp":
        width = -(-rows // rank.ranks("shard"))
        rows, value = max(0, min(width, rows - rank.shard_rank * width)), 4
    yield Item("ends", "all_reduce", "tied gradient", rows * rank.model.hidden_size * value)


def _pipeline(rank: RankStep) -> Iterator[Item]:
    p, plan = rank.parallel, rank.plan
    hidden = rank.hidden_bytes // (p.tp if p.sequence_parallel else 1)
    for what, step in (("activations forward", 1), ("activations backward", -1)):
        targets = [stage + step for stage in plan.stages_of(rank.pp_rank) if 0 <= stage + step < len(plan.layers)]
        sends = sum(plan.rank_of(target) != rank.pp_rank for target in targets)
        yield Item("pp", "send", what, sends * rank.step.microbatches * hidden)


def _context(rank: RankStep) -> Iterator[Item]:
    p, step = rank.parallel, rank.step
    parts = len(rank.plan.stages_of(rank.pp_rank))
    yield Item("cp", "all_gather", "document ids", step.ids * parts * step.microbatches * step.rows * step.tokens * 8)
    if rank.has_head:  # what a loss is given: log-prob and entropy, or a value, fp32
        numbers = 1 if rank.model.head == "scalar" else 2
        yield Item("cp", "all_gather", "scores", numbers * 4 * step.microbatches * step.rows * step.tokens)
    m = rank.model
    width = step.rows * step.tokens // p.cp * (m.head_dim + (m.mla.v_head_dim if m.mla else m.head_dim))
    q, kv = width * (m.num_heads // p.tp), width * max(1, m.num_kv_heads // p.tp)  # Q and output; K and V
    times = rank.num_layers * step.microbatches
    forwards = times * (1 if rank.engine.remat == "none" else 2)
    yield from ATTENTION[p.context](q, kv, rank, forwards, times)


def _ring(q: int, kv: int, rank: RankStep, forwards: int, backwards: int) -> Iterator[Item]:
    """Yields the sends of ring attention: K and V go to all others; in the backward also their fp32 gradients, back
    home."""
    cp = rank.parallel.cp
    keys = (cp - 1) * kv * rank.value_bytes
    yield Item("cp", "send", "attention forward", forwards * keys)
    yield Item("cp", "send", "attention backward", backwards * (keys + cp * kv * 4))


def _alltoall(q: int, kv: int, rank: RankStep, forwards: int, backwards: int) -> Iterator[Item]:
    """Yields the all-to-alls of Q, K, V and the output between rows and heads; K and V are repeated to a multiple of cp
    heads."""
    heads = max(1, rank.model.num_kv_heads // rank.parallel.tp)
    each = (q + kv * math.lcm(heads, rank.parallel.cp) // heads) * rank.value_bytes
    yield Item("cp", "all_to_all", "attention forward", forwards * each)
    yield Item("cp", "all_to_all", "attention backward", backwards * each)


def _allgather(q: int, kv: int, rank: RankStep, forwards: int, backwards: int) -> Iterator[Item]:
    whole = rank.parallel.cp * kv * rank.value_bytes
    yield Item("cp", "all_gather", "attention forward", forwards * whole)
    yield Item("cp", "reduce_scatter", "attention backward", backwards * whole)


ATTENTION = {"ring": _ring, "alltoall": _alltoall, "allgather": _allgather}


def _tensor(rank: RankStep) -> Iterator[Item]:
    """Yields the messages around attention and around the feed-forward layer of each block.

    They are Megatron's f and g (arXiv 1909.08053), or with sequence parallelism g and g-bar (arXiv 2205.05198); the
    embedding has only the second of a pair, the final norm only the first.
    """
    halves = 2 * rank.num_layers
    enter, leave = halves + rank.has_head, halves + rank.has_embedding
    again_enter = halves if rank.engine.remat != "none" else 0
    again_leave = rank.num_layers if rank.engine.remat == "full" else 0  # outputs that only the residual reads are not
    size = rank.step.microbatches * rank.hidden_bytes
    back_enter, back_leave = enter - _spared(rank), leave - _spared(rank)
    if rank.parallel.sequence_parallel:
        yield Item("tp", "all_gather", "activations forward", (enter + again_enter) * size)
        yield Item("tp", "reduce_scatter", "activations forward", (leave + again_leave) * size)
        yield Item("tp", "all_gather", "activations backward", back_leave * size)
        yield Item("tp", "reduce_scatter", "activations backward", back_enter * size)
        norms = enter * rank.step.microbatches * rank.model.hidden_size * rank.value_bytes
        yield Item("tp", "all_reduce", "gradients of norms", 0 if rank.model.lora else norms)
    else:
        yield Item("tp", "all_reduce", "activations forward", (leave + again_leave) * size)
        yield Item("tp", "all_reduce", "activations backward", back_enter * size)
    adapters = rank.step.microbatches * _whole_adapters(rank) * rank.value_bytes
    yield Item("tp", "all_reduce", "gradients of adapters", adapters)
    if rank.has_head and rank.model.head == "scalar":
        positions = rank.step.rows * rank.step.tokens // rank.parallel.cp
        yield Item("tp", "all_reduce", "values", rank.step.microbatches * positions * 4)
    elif rank.has_head:  # the largest logit and three sums of each trained token
        yield Item("tp", "all_reduce", "log-probs", rank.step.trained_tokens * 4 * 4)


def _spared(rank: RankStep) -> int:
    """Returns how many halves of blocks, the embedding counted as one, the backward of adapters does not reach."""
    lora = rank.model.lora
    if lora is None or not rank.has_embedding:
        return 0
    return 1 if any(".attention." in name for name in adapter_shapes(rank.model)) else 2


def _whole_adapters(rank: RankStep) -> int:
    """Returns the elements of this rank's adapters that every tp rank holds whole, so that their gradients are
    summed."""
    m, tp = rank.model, rank.parallel.tp
    here = {layer for stage in rank.plan.stages_of(rank.pp_rank) for layer in rank.plan.layers[stage]}
    names = {n: shape for n, shape in adapter_shapes(m).items() if int(n.split(".")[1]) in here}
    return numel(shape for n, shape in names.items() if tp_dim(n, m, tp) is None)


def _experts(rank: RankStep) -> Iterator[Item]:
    """Yields the messages of expert parallelism (parallel.expert): counts, then rows with their weights, and the rows
    back."""
    e, p, step = rank.model.moe, rank.parallel, rank.step
    if e is None:
        return
    again = 2 if rank.engine.remat != "none" else 1
    passes = rank.moe_layers * step.microbatches
    rows, weights = 2 * step.pairs * rank.model.hidden_size * rank.value_bytes, step.pairs * 4
    yield Item("ep", "all_to_all", "numbers of rows", again * passes * (e.num_experts // p.tp) * 8)
    yield Item("ep", "all_to_all", "rows forward", again * (rows + weights))
    yield Item("ep", "all_to_all", "rows backward", rows + weights)
    yield Item("grad", "all_reduce", "loads of experts", rank.moe_layers * ((e.num_experts + 2) * 8 + 8))
    yield Item("tp", "all_reduce", "rows computed", rank.moe_layers * 8)
    yield Item("cp", "all_reduce", "loads of rows", passes * step.rows * (e.num_experts + 1) * 8)
    yield Item("world", "all_gather", "loads of experts", rank.ranks("world") * (8 + step.balance_bytes))


def evenly_loaded(rank: RankStep) -> RankStep:
    """Returns the same with as many pairs of tokens and experts as there are when all experts get equally many."""
    e, step = rank.model.moe, rank.step
    if e is None:
        return rank
    tokens = step.rows * step.tokens // rank.parallel.cp
    pairs = rank.moe_layers * step.microbatches * tokens * e.top_k // rank.parallel.tp
    return replace(rank, step=step._replace(pairs=pairs))


def _control(rank: RankStep) -> Iterator[Item]:
    ranks = rank.ranks("world")
    yield Item("world", "all_gather", "report", ranks * (8 + rank.step.report_bytes))
    yield Item("grad", "all_reduce", "loss of further tokens", 16 if rank.model.mtp_layers else 0)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
