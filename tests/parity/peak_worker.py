"""Measures the most bytes that a rank holds in a step, of states and of what torch's allocator gives, beside the plan's
sum. Runs on several ranks with a JSON list of layouts, of which "tokens" is the length of a row.

Prints one JSON line a layout, in bytes, of the fullest rank. DeepSpeed's communication bucket, which the plan does not
count, is left out.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from memory_worker import states
from torch.profiler import ProfilerActivity, profile

from benchmarks.long_rows import row_of
from llmtrain.config.schema import Config, ParallelConfig, TrainConfig
from llmtrain.engine.base import Engine
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.scaling.plan import plan
from tests.json_output import print_json
from tests.parity.layouts_worker import build, model_config, settings_of
from tests.parity.meshes import mesh_of

BUCKET = 4 * 500_000_000  # bytes of DeepSpeed's reduce_bucket_size, in fp32


def planned(layout: dict, mesh: Mesh) -> int:
    parallel, engine = settings_of(layout)
    rows = layout["microbatches"] * mesh.dp_size
    train = TrainConfig(seq_len=layout["tokens"], micro_batch_seqs=1, global_batch_seqs=rows)
    return plan(
        Config(model=model_config(layout), parallel=parallel, engine=engine, train=train), mesh.size
    ).memory_bytes


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
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if abs(e.nbytes()) != BUCKET]
    return held["weights"] + held["optimizer"] + int(torch.tensor(sizes).cumsum(0).max())


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for layout in json.loads(sys.argv[1]):
        with mesh_of(*settings_of(layout), mesh.device) as each:
            measured = max(each.all_gather_json(peak(build(layout, each), layout)))
            if mesh.rank == 0:
                print_json({"layout": layout, "measured": measured, "planned": planned(layout, each)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
