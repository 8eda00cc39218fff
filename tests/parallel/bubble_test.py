"""The formula of the pipeline's bubble against torch's own tables of actions, and against the clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import _Action, _ComputationType

from llmtrain.config.schema import ParallelConfig
from llmtrain.parallel.schedules import SCHEDULES
from llmtrain.scaling.activations import in_flight
from llmtrain.scaling.plan import bubble_share
from tests.parallel import bubble_worker

WORKER = Path(__file__).with_name("bubble_worker.py")
FORWARD, INPUT, WEIGHT = _ComputationType.FORWARD, _ComputationType.BACKWARD_INPUT, _ComputationType.BACKWARD_WEIGHT
BOTH = _ComputationType.FULL_BACKWARD
KINDS = [
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 3),
    ("interleaved_zero_bubble", 2),
    ("interleaved_zero_bubble", 3),
    ("zbv", 2),
]
CLOSE = 0.03
Orders = list[list[_Action]]


def orders(schedule: str, pp: int, virtual_stages: int, microbatches: int) -> Orders:
    """What each rank does, in order; idle slots left out. (torch's table of 1F1B counts the last rank's microbatches
    from 1; its runtime does not use it.)"""
    if schedule == "1f1b":
        return [one_forward_one_backward(rank, pp, microbatches) for rank in range(pp)]
    stages = [
        SimpleNamespace(stage_index=i * pp, num_stages=virtual_stages * pp, group_size=pp, group_rank=0, submod=None)
        for i in range(virtual_stages)
    ]
    table = SCHEDULES[schedule](stages, microbatches).pipeline_order
    return [[action for action in table[rank] if action is not None] for rank in range(pp)]


def one_forward_one_backward(rank: int, pp: int, microbatches: int) -> list[_Action]:
    warmup = min(pp - 1 - rank, microbatches)
    forwards = [_Action(rank, FORWARD, i) for i in range(microbatches)]
    backwards = [_Action(rank, BOTH, i) for i in range(microbatches)]
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return forwards[:warmup] + steady + backwards[microbatches - warmup :]


def waits_for(action: _Action, last: int) -> tuple:
    """(stage, what, microbatch) that must be over before; `what` is forward or the gradient of the input."""
    stage, kind, i = action.stage_index, action.computation_type, action.microbatch_index
    if kind == FORWARD:
        return (stage - 1, "forward", i)
    return (
        (stage, "gradient", i)
        if kind == WEIGHT
        else (stage + 1, "gradient", i)
        if stage < last
        else (last, "forward", i)
    )


def lengths(action: _Action) -> int:
    """In units of a forward. torch leaves the whole backward of the first stage to its weights."""
    if action.stage_index == 0 and action.computation_type in (INPUT, WEIGHT):
        return 0 if action.computation_type == INPUT else 2
    return 2 if action.computation_type == BOTH else 1


def makespan(orders: Orders) -> int:
    """When the last rank ends, each doing its actions in order as soon as what they wait for is there."""
    last = max(action.stage_index for order in orders for action in order)
    over: dict[tuple, int] = {(-1, "forward", i): 0 for i in range(len(orders[0]))}
    clocks, places = [0] * len(orders), [0] * len(orders)
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        before = list(places)
        for rank, order in enumerate(orders):
            while places[rank] < len(order) and (needed := waits_for(action := order[places[rank]], last)) in over:
                clocks[rank] = max(clocks[rank], over[needed]) + lengths(action)
                what = {FORWARD: "forward", WEIGHT: "weight"}.get(action.computation_type, "gradient")
                over[(action.stage_index, what, action.microbatch_index)] = clocks[rank]
                places[rank] += 1
        assert places != before, "the ranks wait for each other"
    return max(clocks)


def most_held(order: list[_Action]) -> int:
    """Of the passes through a stage whose activations a rank keeps."""
    held = most = 0
    for action in order:
        held += action.computation_type == FORWARD
        most = max(most, held)
        held -= action.computation_type in (BOTH, WEIGHT)
    return most


def cases() -> Iterator[tuple[str, int, int, int]]:
    for schedule, virtual_stages in KINDS:
        for pp in (2, 3, 4):
            for microbatches in range(pp, 4 * pp + 1):
                if not schedule.startswith("interleaved") or microbatches % (microbatches // pp) == 0:
                    yield schedule, pp, virtual_stages, microbatches


def test_formula_is_that_of_the_schedules() -> None:
    for schedule, pp, virtual_stages, microbatches in cases():
        ideal = 3 * virtual_stages * microbatches  # a stage's forward, its input's and its weight's gradient
        span = makespan(orders(schedule, pp, virtual_stages, microbatches))
        expected = bubble_share(schedule, pp, virtual_stages, microbatches)
        assert span / ideal - 1 == pytest.approx(expected), (schedule, pp, virtual_stages, microbatches)


def test_activations_held() -> None:
    for schedule, pp, virtual_stages, microbatches in cases():
        if microbatches % pp == 0:
            most = max(most_held(order) for order in orders(schedule, pp, virtual_stages, microbatches))
            parallel = ParallelConfig(pp=pp, schedule=schedule, virtual_stages=virtual_stages)
            assert most / virtual_stages == pytest.approx(in_flight(parallel, microbatches)), (
                schedule,
                pp,
                microbatches,
            )


@pytest.mark.slow
def test_measured_bubble(forked: Callable) -> None:
    """Within 3 percentage points of the formula, on four ranks with eight microbatches, each stage sleeping as long in
    its forward as for each of its two gradients."""
    kinds = [("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2), ("zbv", 2)]
    expected = [bubble_share(schedule, 4, virtual, bubble_worker.MICROBATCHES) for schedule, virtual in kinds]
    asked = [[*kind, share + CLOSE] for kind, share in zip(kinds, expected, strict=True)]
    result = forked(4, WORKER, json.dumps(asked), timeout_s=200)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"schedule"')]
    assert len(lines) == len(kinds), result.stdout[-3000:]
    for line, share in zip(lines, expected, strict=True):
        print(f"{line['schedule']}: measured {line['share']:.1%}, formula {share:.1%}")
        assert abs(line["share"] - share) <= CLOSE, line
