"""Trains two equal engines on each layout, one of which waits on the host between its steps. Runs on several ranks with
a JSON list of layouts; prints one JSON line a layout with what every rank saw."""

from __future__ import annotations

import gc
import json
import sys

import torch
import torch.distributed as dist

from llmtrain.checkpoint.files import safetensors_chunks
from llmtrain.config.schema import EngineConfig, ParallelConfig
from llmtrain.engine.base import Engine
from llmtrain.engine.movable import storages
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import Mesh, init_mesh
from tests.engine.frozen_worker import my_rows, refuses
from tests.json_output import print_json
from tests.parity import layouts_worker as parity
from tests.parity.meshes import mesh_of

STEPS = 3


def living_bytes() -> int:
    """Returns the bytes of all tensors of this process that Python knows."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    return sum(size for _, size in storages(tensors, torch.device("cpu")))


def one_step(engine: Engine, mesh: Mesh, step: int) -> list:
    batches, count = my_rows(mesh, step)
    scores = engine.score(batches)
    stats = engine.train_step(batches, token_loss, count)
    return [stats.loss, stats.grad_norm, *(float(s.logprobs.double().sum()) for s in scores)]


def same_state(one: Engine, two: Engine) -> bool:
    pairs = zip(one.fragments(), two.fragments(), strict=True)
    return all(
        a.address == b.address and all(a.tensors[key].equal(b.tensors[key]) for key in a.tensors) for a, b in pairs
    )


def case(layout: dict, mesh: Mesh) -> dict:
    before = living_bytes()
    moved = parity.build(layout, mesh)
    history, sizes = [], {}
    for step in range(STEPS):
        history.append(one_step(moved, mesh, step))
        for fragment in moved.fragments():  # as a save does, after which the storages must still be movable
            assert b"".join(map(bytes, safetensors_chunks(fragment.tensors)))
        if step == 0:
            here = living_bytes() - before
            moved.to_host()
            away = living_bytes() - before - moved.host.numel()
            sizes = {"here": here, "away": away, "refused": refuses(moved, my_rows(mesh, 0)[0])}
            still = parity.build(layout, mesh)
        else:
            moved.to_host()
            moved.to_host()  # nothing to do
        one_step(still, mesh, step)
        moved.to_device()
    again = parity.build(layout, mesh)
    expected = [one_step(again, mesh, step) for step in range(STEPS)]
    return {**sizes, "same": history == expected and same_state(moved, again)}


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for layout in json.loads(sys.argv[1]):
        with mesh_of(parity.settings_of(layout)[0], EngineConfig(backend="fsdp")) as own:
            ranks = mesh.all_gather_json(case(layout, own))
        if mesh.rank == 0:
            print_json({"layout": layout, "ranks": ranks})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
