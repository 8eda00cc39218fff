"""Estimates how long a training step takes on given hardware: products, memory traffic, messages, the bubble.

    busy  = products + memory traffic + messages of tp, cp and ep            of the slowest pipeline rank
    step  = busy (1 + bubble) + filling the pipeline + exposed messages of data parallelism + update

Products run at a share of the peak (REACHED, ATTENTION), everything else between them at the memory's bandwidth,
messages at a share of their link's (LINK). These shares are calibrated on published runs, see docs/plan.md; none is
fitted to a single machine of ours. Messages of tp, cp and ep are taken to wait for the products before and after them.
Those of data parallelism hide behind computation: those of each microbatch behind all, those of a step behind one
microbatch, and the weights that DeepSpeed gathers after the update behind nothing. Latencies are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from llmtrain.arch.hardware import peak_flops
from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.scaling.activations import block_activations
from llmtrain.scaling.communication import Item, RankStep, Step, communication, evenly_loaded
from llmtrain.scaling.links import link_seconds
from llmtrain.scaling.states import States
from llmtrain.scaling.work import Work, work_of

REACHED = 0.62  # share of the peak that products with weights reach; calibrated
ATTENTION = 0.45  # share of the peak that attention reaches; calibrated
PASSES = 8  # times that each activation is written or read in a step, forward and backward; by hand
COMPILED = 5  # the same with fused kernels; by hand
LOGIT_PASSES = 6  # times that fp32 logits are written or read; by hand
AXES = {"tp": "tensor", "cp": "context", "ep": "expert", "pp": "pipeline"}  # of messages; all others are data's


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of a step, by what they are spent on, of the slowest pipeline rank."""

    products_s: float
    memory_s: float  # activations and logits between the products
    tensor_s: float
    context_s: float
    expert_s: float
    bubble_s: float
    pipeline_s: float  # filling the pipeline, and sends that computation does not hide
    data_s: float  # what computation does not hide
    update_s: float

    @property
    def total_s(self) -> float:
        return sum(vars(self).values())


def score_time(
    rank: RankStep, items: Sequence[Item], bubble: float, hardware: HardwareConfig, gathers: bool
) -> StepTime:
    """Returns the time of forwards without gradients over the microbatches of `rank.step`, which send these `items`.
    `gathers`: each microbatch gathers weights, behind the products of all.

    A forward takes a third of what a step passes through memory, as the one that recomputation adds.
    """
    sums = dict.fromkeys((*AXES.values(), "data"), 0.0)
    for item in items:
        sums[AXES.get(item.axis, "data")] += link_seconds(item, rank, hardware)
    products = products_seconds(rank, hardware, forward=True)
    memory = memory_seconds(rank, hardware, forward=True)
    busy = products + memory + sums["tensor"] + sums["context"] + sums["expert"]
    return StepTime(
        products_s=products,
        memory_s=memory,
        tensor_s=sums["tensor"],
        context_s=sums["context"],
        expert_s=sums["expert"],
        bubble_s=busy * bubble,
        pipeline_s=max(0.0, sums["pipeline"] - busy) + fill_seconds(rank, hardware) / 2,
        data_s=max(0.0, sums["data"] - (busy if gathers else 0.0)),
        update_s=0.0,
    )


def summed(times: Sequence[StepTime], factors: Sequence[float]) -> StepTime:
    """Returns the times of several passes, each so many times, one after the other."""
    pairs = list(zip(times, factors, strict=True))
    return StepTime(*(sum(getattr(time, f.name) * factor for time, factor in pairs) for f in fields(StepTime)))


def step_time(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    step: Step,
    states: States,
    bubble: float,
    hardware: HardwareConfig,
) -> StepTime:
    """Returns the time of a step. `model` is resolved, `parallel.dp_shard` is not -1, `bubble` is a share of the ideal
    time.

    Raises ValueError where the hardware does not compute in the precision.
    """
    rank = evenly_loaded(RankStep(model, parallel, engine, step, slowest_rank(model, parallel, step, engine)))
    products, memory = products_seconds(rank, hardware), memory_seconds(rank, hardware)
    sums = dict.fromkeys((*AXES.values(), "data", "after"), 0.0)
    for item in communication(rank):
        sums[_kind(item, engine)] += link_seconds(item, rank, hardware)
    busy = products + memory + sums["tensor"] + sums["context"] + sums["expert"]
    hidden = busy if repeats_gathers(parallel, engine) else busy / step.microbatches
    return StepTime(
        products_s=products,
        memory_s=memory,
        tensor_s=sums["tensor"],
        context_s=sums["context"],
        expert_s=sums["expert"],
        bubble_s=busy * bubble,
        pipeline_s=max(0.0, sums["pipeline"] - busy) + fill_seconds(rank, hardware),
        data_s=max(0.0, sums["data"] - hidden) + sums["after"],
        update_s=2 * (states.weights + states.gradients + states.optimizer) / (hardware.memory_gb_per_s * 1e9),
    )


def _kind(item: Item, engine: EngineConfig) -> str:
    """Returns what a message's seconds count as. The weights that ZeRO stages 1 and 2 gather follow the update."""
    if item.axis in AXES:
        return AXES[item.axis]
    late = engine.backend == "deepspeed" and engine.zero_stage in (1, 2) and item.kind == "all_gather"
    return "after" if late and item.axis in ("grad", "expert_grad") else "data"


def repeats_gathers(parallel: ParallelConfig, engine: EngineConfig) -> bool:
    """Tells whether weights are gathered for each microbatch, not once a step."""
    if engine.backend == "deepspeed":
        return engine.zero_stage == 3
    return engine.reshard and parallel.pp == 1


def slowest_rank(model: ModelConfig, parallel: ParallelConfig, step: Step, engine: EngineConfig) -> int:
    """Returns the pipeline rank with the most FLOPs."""
    work, plan = work_of(model, step.tokens, engine), plan_stages(model, parallel)
    each = (work.hardware_blocks + work.hardware_attention) / model.num_layers
    last = plan.rank_of(len(plan.layers) - 1)

    def flops(rank: int) -> float:
        layers = sum(len(plan.layers[stage]) for stage in plan.stages_of(rank))
        return layers * each + (work.hardware_head if rank == last else 0)

    return max(range(parallel.pp), key=flops)


def tokens_of(rank: RankStep) -> int:
    """Returns the tokens that a rank computes in a step."""
    return rank.step.microbatches * rank.step.rows * rank.step.tokens // rank.parallel.cp


def products_seconds(rank: RankStep, hardware: HardwareConfig, forward: bool = False) -> float:
    """Returns the seconds of all products of a rank in a step, or in its forwards without gradients. Those with weights
    take at least as long as reading the weights of a token, in each microbatch: a roofline."""
    blocks, attention, head = _flops(work_of(rank.model, rank.step.tokens, rank.engine), forward)
    peak = peak_flops(hardware, rank.engine.precision)
    slow = peak_flops(hardware, "bf16") if rank.engine.precision == "fp8" else peak  # all but the blocks' products
    share, scale = rank.num_layers / rank.model.num_layers, hardware.reached_share or REACHED
    computed = tokens_of(rank) * share * blocks / (peak * scale)
    read = share * blocks / 2 * rank.value_bytes / (hardware.memory_gb_per_s * 1e9)  # a weight: 2 FLOPs
    others = share * attention / (slow * scale * ATTENTION / REACHED)
    others += (head if rank.has_head else 0.0) / (slow * scale)
    return (max(computed, rank.step.microbatches * read) + tokens_of(rank) * others) / rank.parallel.tp


def _flops(work: Work, forward: bool) -> tuple[float, float, float]:
    """Returns the FLOPs of a token in blocks, attention and head: of a step, or of a forward."""
    if forward:
        return work.blocks, work.attention, work.head
    return work.hardware_blocks, work.hardware_attention, work.hardware_head


def memory_seconds(rank: RankStep, hardware: HardwareConfig, forward: bool = False) -> float:
    """Returns the seconds of reading and writing activations and logits between the products of a step, or of its
    forwards without gradients."""
    p, engine = rank.parallel, rank.engine
    passes = (COMPILED if engine.compile else PASSES) * (4 / 3 if engine.remat != "none" and not forward else 1)
    each = block_activations(rank.model, p.tp, p.sequence_parallel) * rank.value_bytes * passes
    logits = rank.model.vocab_size / p.tp * 4 * LOGIT_PASSES if rank.has_head and rank.model.head == "lm" else 0
    whole = tokens_of(rank) * (rank.num_layers * each + logits) / (hardware.memory_gb_per_s * 1e9)
    return whole / 3 if forward else whole


def fill_seconds(rank: RankStep, hardware: HardwareConfig) -> float:
    """Returns the seconds of the sends, one behind the other, that fill the pipeline and empty it."""
    p = rank.parallel
    if p.pp == 1:
        return 0.0
    size = rank.hidden_bytes // (p.tp if p.sequence_parallel else 1)
    return 2 * (p.pp - 1) * link_seconds(Item("pp", "send", "one microbatch", size), rank, hardware)
