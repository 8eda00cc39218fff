"""Saves checkpoints on some layouts and loads them on others. Runs on several ranks: `save DIRECTORY LAYOUTS` or `load
DIRECTORY PAIRS` (JSON), the layouts all of this many ranks.

save: each layout (a number and its keys) trains, saves a checkpoint, goes on and notes its losses.

load: of each pair (saved number, own number and keys) the own layout starts elsewhere, loads the other's checkpoint and
goes on with the same global samples; prints one JSON line a pair with the largest relative difference of loss and norm.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

import tests.parity.losses_worker  # noqa: F401  its tasks
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import newest_intact
from llmtrain.checkpoint.save import save_checkpoint
from llmtrain.config.schema import ParallelConfig
from llmtrain.engine.base import Engine
from llmtrain.model.decoder import parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.trainer.batches import rank_samples
from tests.json_output import print_json
from tests.parity.layouts_worker import Task, build, model_config, rows_of, settings_of, task_of
from tests.parity.meshes import mesh_of

BEFORE, AFTER = 3, 5  # steps before the save and, where a layout's `after` says nothing else, after it
GLOBAL_SEQS = 48  # divides among 1, 2, 3, 4, 6 and 8 data-parallel ranks


def steps(engine: Engine, mesh: Mesh, task: Task, first: int, count: int) -> list[tuple[float, float]]:
    """Takes the steps; returns (loss, gradient norm) of each. The samples are those of the step, whatever the mesh."""
    micro_seqs = GLOBAL_SEQS // (mesh.dp_size * max(2, mesh.sizes["pp"]))
    history = []
    for step in range(first, first + count):
        batch = task.batch(step, GLOBAL_SEQS)
        offset = step * GLOBAL_SEQS
        samples = [[i - offset for i in each] for each in rank_samples(step, GLOBAL_SEQS, micro_seqs, mesh)]
        stats = engine.train_step([rows_of(batch, each) for each in samples], task.loss, task.denominator(batch))
        history.append((stats.loss, stats.grad_norm))
    return history


def save(directory: str, number: int, layout: dict, mesh: Mesh) -> None:
    engine, task = build(layout, mesh), task_of(layout)
    steps(engine, mesh, task, 0, BEFORE)
    place, state = os.path.join(directory, str(number)), {"step": BEFORE, "layout": layout}
    save_checkpoint(place, engine, state, mesh, 1, parameter_shapes(model_config(layout)))
    uninterrupted = steps(engine, mesh, task, BEFORE, layout.get("after", AFTER))
    if mesh.rank == 0:
        with open(os.path.join(place, "losses.json"), "w", encoding="utf-8") as file:
            json.dump(uninterrupted, file)


def load(directory: str, saved: int, number: int, layout: dict, mesh: Mesh) -> dict:
    place = os.path.join(directory, str(saved))
    engine = build(layout, mesh, factor=0.5)
    reader = CheckpointReader(newest_intact(place, mesh))
    engine.load_fragments(reader.read, BEFORE)
    resumed = steps(engine, mesh, task_of(layout), BEFORE, layout.get("after", AFTER))
    with open(os.path.join(place, "losses.json"), encoding="utf-8") as file:
        expected = json.load(file)
    pairs = [(a, b) for got, want in zip(resumed, expected, strict=True) for a, b in zip(got, want, strict=True)]
    worst = max(abs(a - b) / abs(b) if a == a else float("inf") for a, b in pairs)
    return {"saved": saved, "loaded": number, "error": worst, "from": reader.state["layout"], "to": layout}


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    action, directory, work = sys.argv[1:]
    for job in json.loads(work):
        with mesh_of(*settings_of(job[-1])) as own:
            result = {"save": save, "load": load}[action](directory, *job, own)
        if result and mesh.rank == 0:
            print_json(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
