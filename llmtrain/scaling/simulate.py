"""Simulates pipelines event by event, where the closed form assumes equal stages.

A pipeline rank works off its schedule in order; each forward waits for the one before it to arrive, each backward for
the one behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from llmtrain.arch.pipeline import StagePlan, plan_stages
from llmtrain.config.schema import ModelConfig, ParallelConfig
from llmtrain.scaling.work import Work

ROUNDS = 6  # of pp microbatches that are played; those behind are taken to last as long as the last of them


class Op(NamedTuple):
    """Describes one piece of work of a pipeline rank."""

    backward: bool
    stage: int
    microbatch: int


def plain_order(rank: int, pp: int, microbatches: int) -> list[Op]:
    """Returns the work of a rank under 1F1B (arXiv 2104.04473, figure 4): a warmup of forwards, then by turns."""
    warmup = min(microbatches, pp - 1 - rank)
    forwards = [Op(False, rank, m) for m in range(microbatches)]
    backwards = [Op(True, rank, m) for m in range(microbatches)]
    return _alternated(forwards, backwards, warmup)


def interleaved_order(rank: int, pp: int, virtual_stages: int, microbatches: int) -> list[Op]:
    """Returns the work of a rank under interleaved 1F1B (arXiv 2104.04473, section 2.2): equal rounds of at least pp
    microbatches pass the rank's first stage, then its second, and so on.

    Raises ValueError where the rounds are not equal.
    """
    rounds = max(1, microbatches // pp)
    if microbatches % rounds:
        raise ValueError(f"microbatches={microbatches}: must be equal rounds of at least pp={pp} when interleaved")
    v, each, total = virtual_stages, microbatches // rounds, microbatches * virtual_stages
    forwards, backwards = [], []
    for k in range(total):
        chunk, microbatch = k // each % v, k // (each * v) * each + k % each
        forwards.append(Op(False, chunk * pp + rank, microbatch))
        backwards.append(Op(True, (v - 1 - chunk) * pp + rank, microbatch))
    return _alternated(forwards, backwards, min(total, 2 * (pp - rank - 1) + (v - 1) * each))


def _alternated(forwards: list[Op], backwards: list[Op], warmup: int) -> list[Op]:
    steady = [op for pair in zip(forwards[warmup:], backwards, strict=False) for op in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]


def pipeline_seconds(
    plan: StagePlan, microbatches: int, forward_s: Sequence[float], backward_s: Sequence[float], send_s: float
) -> float:
    """Returns the time from the start of the first rank to the end of the last, given the seconds of each stage's
    forward and backward and of a send between ranks.

    Raises ValueError for a schedule other than 1f1b and interleaved_1f1b.
    """
    pp, stages = plan.pp, len(plan.layers)
    if plan.schedule not in ("1f1b", "interleaved_1f1b"):
        raise ValueError(f"parallel.schedule={plan.schedule}: is not simulated; use 1f1b or interleaved_1f1b")
    plain = plan.schedule == "1f1b"
    orders = [
        plain_order(rank, pp, microbatches) if plain else interleaved_order(rank, pp, stages // pp, microbatches)
        for rank in range(pp)
    ]
    ends: dict[Op, float] = {}
    free, place = [0.0] * pp, [0] * pp
    waiting = set(range(pp))
    while waiting:
        moved = False
        for rank in sorted(waiting):
            while place[rank] < len(orders[rank]):
                op = orders[rank][place[rank]]
                ready = _ready(op, ends, plan, send_s)
                if ready is None:
                    break
                duration = (backward_s if op.backward else forward_s)[op.stage]
                free[rank] = ends[op] = max(free[rank], ready) + duration
                place[rank], moved = place[rank] + 1, True
            if place[rank] == len(orders[rank]):
                waiting.discard(rank)
        assert moved, "the schedule waits for itself"
    return max(free)


def _ready(op: Op, ends: dict[Op, float], plan: StagePlan, send_s: float) -> float | None:
    """Returns when what an operation needs has arrived; None while that is not known."""
    last = len(plan.layers) - 1
    if op.backward and op.stage == last:
        return ends.get(Op(False, last, op.microbatch))
    if not op.backward and op.stage == 0:
        return 0.0
    source = op._replace(stage=op.stage + (1 if op.backward else -1))
    if source not in ends:
        return None
    return ends[source] + (send_s if plan.rank_of(source.stage) != plan.rank_of(op.stage) else 0.0)


def is_simulated(parallel: ParallelConfig, microbatches: int) -> bool:
    """Tells whether the schedule is one of those that are simulated, with so many microbatches."""
    if parallel.schedule == "interleaved_1f1b":
        return microbatches % max(1, microbatches // parallel.pp) == 0
    return parallel.schedule == "1f1b"


def simulated_bubble(model: ModelConfig, parallel: ParallelConfig, work: Work, microbatches: int) -> float:
    """Returns the idle share of the pipeline with its stages as uneven as they are, over the time of the slowest rank:
    layers take equally long, the head as its products do, backwards twice a forward. `model` is resolved.

    Many rounds of microbatches are not all played (ROUNDS), which leaves an error below half a point.

    Raises ValueError for a schedule that is not simulated.
    """
    plan, pp = plan_stages(model, parallel), parallel.pp
    head = work.hardware_head * model.num_layers / (work.hardware_blocks + work.hardware_attention)
    played = microbatches if microbatches % pp and plan.schedule != "1f1b" else _played(microbatches, pp)
    seconds, slowest = _played_seconds(plan, head, played)
    if played < microbatches:
        more = seconds - _played_seconds(plan, head, played - pp)[0]
        seconds += (microbatches - played) / pp * more
    return seconds / (microbatches * slowest) - 1


def _played(microbatches: int, pp: int) -> int:
    """Returns how many microbatches are simulated, which leave whole rounds of pp."""
    return min(microbatches, ROUNDS * pp + microbatches % pp)


@lru_cache(maxsize=4096)
def _played_seconds(plan: StagePlan, head: float, microbatches: int) -> tuple[float, float]:
    """Returns the time of the pipeline, and of a microbatch on the slowest rank, in units of a layer, of which the head
    takes `head`."""
    seconds = [float(len(layers)) for layers in plan.layers]
    seconds[-1] += head
    slowest = max(sum(seconds[stage] for stage in plan.stages_of(rank)) for rank in range(plan.pp))
    return pipeline_seconds(plan, microbatches, [s / 3 for s in seconds], [2 * s / 3 for s in seconds], 0.0), slowest


def forward_bubble(model: ModelConfig, parallel: ParallelConfig, work: Work, microbatches: int) -> float:
    """Returns the idle share of a pipeline that only scores, over the time of its slowest rank: each rank passes all
    microbatches through its first stage, then through its next one. `model` is resolved."""
    plan = plan_stages(model, parallel)
    head = work.head * model.num_layers / (work.blocks + work.attention)
    seconds = [float(len(layers)) for layers in plan.layers]
    seconds[-1] += head
    slowest = max(sum(seconds[stage] for stage in plan.stages_of(rank)) for rank in range(plan.pp))
    played = min(microbatches, ROUNDS * plan.pp)  # those behind arrive while the slowest rank is busy
    return (_forward_seconds(plan, seconds, played) + (microbatches - played) * slowest) / (microbatches * slowest) - 1


def _forward_seconds(plan: StagePlan, seconds: Sequence[float], microbatches: int) -> float:
    """Returns the time from the first stage's start to the end of the last rank."""
    arrived, free = [0.0] * microbatches, [0.0] * plan.pp
    for stage in range(len(plan.layers)):
        rank = plan.rank_of(stage)
        for microbatch in range(microbatches):
            free[rank] = arrived[microbatch] = max(free[rank], arrived[microbatch]) + seconds[stage]
    return max(free)
