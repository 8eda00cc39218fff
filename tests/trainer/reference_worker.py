"""Trains adapters on each layout and scores with the reference between updates. Runs on several ranks with a JSON list
of layouts; prints one JSON line a layout with what every rank saw."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from llmtrain.arch.adapters import without_adapters
from llmtrain.config.schema import EngineConfig, ParallelConfig
from llmtrain.engine.build import Role, build_frozen
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.trainer.reference import WithoutAdapters, build_reference
from llmtrain.types import Batch, Scores
from tests.json_output import print_json
from tests.parity import layouts_worker as parity
from tests.parity.meshes import mesh_of

ROWS = 2


def base_of(layout: dict) -> Role:
    """Returns the model that the adapters are put on."""
    config = without_adapters(parity.model_config(layout))
    shapes = parameter_shapes(config)
    return Role("base", config, *parity.settings_of(layout), lambda n: parity.initial(n, shapes[n], config))


def my_rows(mesh: Mesh, layout: dict, step: int) -> tuple[list[Batch], torch.Tensor]:
    turns = max(2, mesh.sizes["pp"] * layout.get("virtual_stages", 1))
    whole = parity.global_rows(step, ROWS * turns * mesh.dp_size)
    firsts = [ROWS * (turn * mesh.dp_size + mesh.dp_rank) for turn in range(turns)]
    return [parity.rows_of(whole, slice(first, first + ROWS)) for first in firsts], whole.loss_mask.sum()


def difference(one: list[Scores], two: list[Scores]) -> float:
    return max((a.logprobs - b.logprobs).abs().max().item() for a, b in zip(one, two, strict=True))


def case(layout: dict, mesh: Mesh) -> dict:
    engine, alone = parity.build(layout, mesh), parity.build(layout, mesh)
    base = build_frozen(base_of(layout), mesh)
    reference = build_reference(SimpleNamespace(model=parity.model_config(layout), engine=engine), wanted=True)
    assert isinstance(reference, WithoutAdapters)
    error, moved = 0.0, []
    for step in range(3):
        rows, count = my_rows(mesh, layout, step)
        error = max(error, difference(reference.score(rows), base.score(rows)))
        moved.append(difference(engine.score(rows), base.score(rows)))
        for each in (engine, alone):
            each.train_step(rows, token_loss, count)
    weights = zip(engine.full_weights(), alone.full_weights(), strict=True)
    same = all(torch.equal(a, b) for (_, a), (_, b) in weights)
    reference.to_host()  # the policy stays where it is
    return {
        "error": error,
        "moved": min(moved),
        "same": same,
        "left": difference(engine.score(rows), alone.score(rows)),
    }


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
