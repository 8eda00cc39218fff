"""Measures the most bytes that a rank holds in a step, of states and of what torch's allocator gives, beside the plan's
sum. Runs on several ranks with a JSON list of layouts, of which "tokens" is the length of a row.

Prints one JSON line a layout, in bytes, of the fullest rank. DeepSpeed's communication bucket, which the plan does not
count, is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from memory_worker import states
from torch.profiler import ProfilerActivity, profile

from benchmarks.long_rows import row_of
from llmtrain.config.schema import Config, ParallelConfig, TrainConfig
from llmtrain.engine.base import Engine
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.scaling.memory import Memory
from llmtrain.scaling.plan import plan
from tests.json_output import print_json
from tests.parity.layouts_worker import build, model_config, settings_of
from tests.parity.meshes import mesh_of

BUCKET = 4 * 500_000_000  # bytes of DeepSpeed's reduce_bucket_size, in fp32


def planned(layout: dict, mesh: Mesh) -> Memory:
    parallel, engine = settings_of(layout)
    rows = layout["microbatches"] * mesh.dp_size
    train = TrainConfig(seq_len=layout["tokens"], micro_batch_seqs=1, global_batch_seqs=rows)
    return plan(Config(model=model_config(layout), parallel=parallel, engine=engine, train=train), mesh.size).memory


def peak(engine: Engine, layout: dict) -> int:
    """Returns the peak of the third step: weights and optimizer state, and what the step allocates beside them."""
    batch, count = row_of("causal", layout["tokens"], vocabulary=64), layout["microbatches"]

    def step() -> None:
        engine.train_step([batch] * count, token_loss, torch.tensor(count * layout["tokens"]))

    step()
    step()
    held = states(engine)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    return held["weights"] + held["optimizer"] + most_held(record)


def most_held(record: profile) -> int:
    """Returns the most bytes of what was allocated while it was recorded. A block that another thread has freed, which
    is not recorded (those of collectives), counts until its address is given out again."""
    live: dict[int, int] = {}
    held = most = 0
    for event in sorted(allocations(record), key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if abs(size) == BUCKET:
            continue
        held += size - (live.pop(address, 0) if size > 0 else 0)
        if size > 0:
            live[address] = size
        else:
            live.pop(address, None)
        most = max(most, held)
    return most


def allocations(record: profile) -> Iterator:
    """Yields the events of the allocator."""
    waiting = list(record.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            yield event


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for layout in json.loads(sys.argv[1]):
        with mesh_of(*settings_of(layout), mesh.device) as each:
            measured = max(each.all_gather_json(peak(build(layout, each), layout)))
            if mesh.rank == 0:
                plan_of = planned(layout, each)
                print_json({"layout": layout, "measured": measured, "planned": plan_of.total, "moment": plan_of.moment})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
