"""Counts what a step sends on each layout, beside what the formula says. Runs on several ranks with a JSON list of
layouts.

Prints one JSON line a layout and rank where the two differ, and one a layout with rank 0's items.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from layouts_worker import global_rows, model_config, optim_config, rows_of, settings_of

from llmtrain.config.schema import ModelConfig, ParallelConfig
from llmtrain.engine import zero
from llmtrain.engine.auxiliary import routers_of
from llmtrain.engine.base import Engine
from llmtrain.engine.build import Role, build_trained
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.parallel import expert
from llmtrain.parallel.context import local_batches
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.scaling import communication as scaling
from llmtrain.scaling.communication import Item, RankStep, Step, communication
from llmtrain.types import IGNORE, Batch
from tests.json_output import print_json
from tests.parallel.traffic import Traffic
from tests.parity.meshes import mesh_of

WARM_STEPS = 2  # engines learn shapes and the order of modules
ROWS = 2


def shape_of(layout: dict) -> ModelConfig:
    """Returns a small model, with the fields of `layout["model"]`."""
    return model_config(layout)


def shorten_reuse(elements: int) -> None:
    """Lets DeepSpeed's ZeRO stage 3 free what a small model uses again, as it does with one of more than 10^9
    elements."""
    original = zero.deepspeed_config

    def shortened(*args: object) -> dict:
        config = original(*args)
        config["zero_optimization"] |= {"stage3_max_reuse_distance": elements, "stage3_prefetch_bucket_size": 0}
        return config

    zero.deepspeed_config, scaling.REUSE = shortened, elements


def build(layout: dict, model: ModelConfig, mesh: Mesh) -> Engine:
    parallel, engine = settings_of(layout)
    shapes = parameter_shapes(model)
    source = partial(initial, shapes, model)
    return build_trained(Role("policy", model, parallel, engine, source, optim_config(layout), 10), mesh)


def initial(shapes: dict[str, tuple[int, ...]], model: ModelConfig, name: str) -> torch.Tensor:
    return init_tensor(name, shapes[name], model, 0)


def batches_of(layout: dict, mesh: Mesh) -> tuple[list[Batch], torch.Tensor]:
    microbatches = layout.get("microbatches", 2)
    whole = global_rows(0, ROWS * microbatches * mesh.dp_size)
    first = [(a * mesh.dp_size + mesh.dp_rank) * ROWS for a in range(microbatches)]
    return [rows_of(whole, slice(row, row + ROWS)) for row in first], whole.loss_mask.sum()


def watch_reports(mesh: Mesh) -> list[int]:
    """Records the bytes of the longest report of each step."""
    gather, seen = mesh.all_gather_json, []

    def watched(value: object) -> list:
        everyone = gather(value)
        seen.append(max(len(json.dumps(each).encode()) for each in everyone))
        return everyone

    mesh.all_gather_json = watched
    return seen


def watch_pairs() -> list[list[int]]:
    """Records how many rows go to each of the experts that this rank reaches, pass by pass."""
    sort, seen = expert.sort_by_expert, []

    def watched(indices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
        found = sort(indices, num_experts)
        seen.append(found[2].tolist())
        return found

    expert.sort_by_expert = watched
    return seen


def watch_row_sums(engine: Engine, traffic: Traffic) -> None:
    """Counts the sums over `cp` that routers make inside an operation of their own, where the dispatcher's modes do not
    look."""
    for counts in (router.counts for router in routers_of(engine.parts).values()):
        if counts.row_sum is not None:
            counts.row_sum = partial(_counted_sum, counts.row_sum, traffic)


def _counted_sum(row_sum: Callable[[torch.Tensor], torch.Tensor], traffic: Traffic, x: torch.Tensor) -> torch.Tensor:
    traffic.bytes["cp", "all_reduce"] += x.numel() * x.element_size()
    return row_sum(x)


def larger_halves(seen: list[list[int]], mesh: Mesh) -> int:
    """Returns, summed over the passes, the larger of the rows that leave this rank and those that come to it, itself
    counted."""
    everyone = dict(zip(range(mesh.size), mesh.all_gather_json(seen), strict=True))
    peers, total = dist.get_process_group_ranks(mesh.groups["ep"]), 0
    for number, counts in enumerate(seen):
        local = len(counts) // mesh.ep
        mine = slice(mesh.ep_rank * local, (mesh.ep_rank + 1) * local)
        total += max(sum(counts), sum(sum(everyone[peer][number][mine]) for peer in peers))
    return total


def count(layout: dict, mesh: Mesh) -> tuple[dict, dict, list[Item]]:
    """Returns (counted, by formula, items) of this rank; the first two by axis and kind."""
    parallel, settings = settings_of(layout)
    model = shape_of(layout)
    if "reuse" in layout:
        shorten_reuse(layout["reuse"])
    engine = build(layout, model, mesh)
    microbatches, denominator = batches_of(layout, mesh)
    for _ in range(WARM_STEPS):
        engine.train_step(microbatches, token_loss, denominator)
    pairs, reports = watch_pairs(), watch_reports(mesh)
    with Traffic(mesh) as traffic:
        watch_row_sums(engine, traffic)
        engine.train_step(microbatches, token_loss, denominator)
    trained = sum(int((b.labels != IGNORE).sum()) for b in local_batches(microbatches, mesh))
    rows, balance = larger_halves(pairs, mesh), (reports[1:] or [0])[0]
    rows //= 1 if settings.remat == "none" else 2  # a pass that is computed again was seen twice
    step = Step(len(microbatches), ROWS, microbatches[0].input_ids.size(1), trained, 1, reports[0], rows, balance)
    shard_rank = dist.get_rank(mesh.groups["shard"])
    items = communication(RankStep(model, parallel, settings, step, mesh.coords["pp"], shard_rank))
    expected: dict[str, int] = defaultdict(int)
    for axis, kind, _, size in items:
        group = mesh.groups.get(axis)
        expected[f"{axis if group is None else traffic.axes[group.group_name]} {kind}"] += size
    counted = {" ".join(key): size for key, size in traffic.bytes.items()}
    inexact = layout.get("inexact", "no axis")  # see scaling.communication
    exact = ({key: size for key, size in each.items() if not key.startswith(inexact)} for each in (counted, expected))
    return *exact, items


def main(count: Callable[[dict, Mesh], tuple[dict, dict, list[Item]]] = count) -> None:
    """Prints what `count` finds for each layout of the command line: (counted, by formula, items)."""
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for layout in json.loads(sys.argv[1]):
        try:
            with mesh_of(*settings_of(layout)) as own:
                counted, expected, items = count(layout, own)
        except Exception as error:
            if os.environ.get("TRACE"):
                raise
            counted, expected, items = {"error": f"{type(error).__name__}: {error}"}, {}, []
        if mesh.rank == 0 or counted != expected:
            line = {"layout": layout, "rank": mesh.rank, "counted": counted, "formula": expected, "items": items}
            print_json(line)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
