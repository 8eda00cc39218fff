"""Measures the bubble of sleeping pipeline stages. Runs on several ranks with a JSON list of [schedule, virtual stages,
share].

A pipeline stage sleeps UNIT_S in its forward, in the gradient of its input and in that of its weight, so the processor
is idle. Prints one JSON line a schedule, the smallest share of the steps: a busy machine can only add to a bubble. No
more steps are made once one has a share that is not above that asked for.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from llmtrain.arch.mesh import AXES
from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.schema import ModelConfig, ParallelConfig
from llmtrain.parallel.mesh import Mesh, init_mesh, trainer_mesh
from llmtrain.parallel.pipeline import Pipeline
from llmtrain.types import Batch
from tests.json_output import print_json

UNIT_S, MICROBATCHES, MOST_STEPS = 0.1, 8, 8


class Clock:
    """Measures how long this rank slept: a busy machine wakes it late, which is no bubble."""

    busy_s = 0.0

    def sleep(self) -> None:
        start = time.perf_counter()
        time.sleep(UNIT_S)
        self.busy_s += time.perf_counter() - start


clock = Clock()


class _SlowGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        clock.sleep()
        return grad.contiguous()


class SleepingStage(nn.Module):
    """Computes the sum of an input and a weight, so that each has a gradient of its own. Called as a Decoder is."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.weight, self.first, self.last = nn.Parameter(torch.zeros(())), first, last

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        clock.sleep()
        if self.first:
            x = x.float().requires_grad_()
        y = _SlowGradient.apply(x) + _SlowGradient.apply(self.weight)
        return (y, y.detach()) if self.last else y


def smallest_share(schedule: str, virtual_stages: int, enough: float, pp: int) -> float:
    """Returns the smallest share of idle over busy time of a step."""
    parallel = ParallelConfig(pp=pp, schedule=schedule, virtual_stages=virtual_stages)
    sizes = {axis: pp if axis == "pp" else 1 for axis in AXES}
    mesh = trainer_mesh(sizes, torch.device("cpu"), timedelta(seconds=60), schedule=schedule)
    plan = plan_stages(ModelConfig(num_layers=pp * virtual_stages), parallel)
    last = len(plan.layers) - 1
    parts = [SleepingStage(stage == 0, stage == last) for stage in plan.stages_of(mesh.coords["pp"])]
    pipeline = Pipeline(parts, plan, mesh)
    step_share(pipeline, mesh)  # learns the shapes
    shares = [step_share(pipeline, mesh)]
    while min(shares) > enough and len(shares) < MOST_STEPS:
        shares.append(step_share(pipeline, mesh))
    return min(shares)


def step_share(pipeline: Pipeline, mesh: Mesh) -> float:
    """Returns the share of one step, the same on all ranks."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    batches = [Batch(ids, ids, ids.bool(), ids) for _ in range(MICROBATCHES)]
    mesh.barrier()
    start, clock.busy_s = time.perf_counter(), 0.0
    pipeline.train(batches, lambda scores, i: scores[0].sum())
    mesh.barrier()
    times = mesh.all_gather_json([time.perf_counter() - start, clock.busy_s])
    return sum(step_s for step_s, _ in times) / sum(busy_s for _, busy_s in times) - 1


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 60)
    for schedule, virtual_stages, enough in json.loads(sys.argv[1]):
        share = smallest_share(schedule, virtual_stages, enough, mesh.size)
        if mesh.rank == 0:
            print_json({"schedule": schedule, "share": share})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
