"""Measures the most that torch's allocator holds during a step beyond what was there before it, beside what the plan
says. Runs on several ranks with a JSON list of layouts, of which "tokens" is the length of a row.

Prints one JSON line a layout, in bytes, of the fullest rank.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from benchmarks.long_rows import allocated, row_of
from llmtrain.config.schema import Config, DataConfig, TrainConfig
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.scaling.plan import plan
from tests.json_output import print_json
from tests.parity.layouts_worker import ParallelConfig, build, model_config, settings_of
from tests.parity.meshes import mesh_of


def planned(layout: dict, ranks: int) -> dict:
    parallel, engine = settings_of(layout)
    train = TrainConfig(seq_len=layout["tokens"], micro_batch_seqs=1, global_batch_seqs=1)
    data = DataConfig(mask_documents=layout["rows"] == "documents")
    p = plan(Config(model=model_config(layout), parallel=parallel, engine=engine, train=train, data=data), ranks)
    return {"moment": p.memory.moment, "planned": p.memory.total - p.memory.weights - p.memory.optimizer}


def measure(layout: dict, mesh: Mesh) -> dict:
    engine, batch = build(layout, mesh), row_of(layout["rows"], layout["tokens"], vocabulary=64)

    def step() -> None:
        engine.train_step([batch], token_loss, torch.tensor(layout["tokens"]))

    step()
    everyone = mesh.all_gather_json(allocated(step))
    return {"measured": max(everyone), **planned(layout, mesh.size)}


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for layout in json.loads(sys.argv[1]):
        with mesh_of(*settings_of(layout), mesh.device) as each:
            result = measure(layout, each)
        if mesh.rank == 0:
            print_json({"layout": layout, **result})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
