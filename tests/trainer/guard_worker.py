"""Checks on each layout that a step that is left out changes nothing, that the next one is right, and that a flipped
bit is named.

Runs on several ranks with a JSON list of layouts and an empty directory; prints one JSON line a layout, from rank 0.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from llmtrain.arch.mesh import AXES
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.saver import Saver
from llmtrain.config.schema import CheckpointConfig, ParallelConfig
from llmtrain.engine.base import Engine
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh, trainer_mesh
from llmtrain.parallel.plan import parameters_of
from llmtrain.parallel.replicas import differing
from tests.json_output import print_json
from tests.parity.layouts_worker import ROWS, build, global_rows, model_config, rows_of, settings_of

NAN = float("nan")


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Returns copies of all that this rank owns, and of its working weights."""
    owned = {f"{f.address.name} {key}": t.clone() for f in engine.fragments() for key, t in f.tensors.items()}
    return owned | {name: full.clone() for name, full in engine.full_weights()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def one_step(engine: Engine, mesh: Mesh, step: int, scale: float = 1.0) -> float:
    rows = global_rows(step, ROWS * 2 * mesh.dp_size)
    starts = [(a * mesh.dp_size + mesh.dp_rank) * ROWS for a in range(2)]
    batches = [rows_of(rows, slice(start, start + ROWS)) for start in starts]

    def loss(scores: tuple, batch: object) -> tuple:
        total, metrics = token_loss(scores, batch)
        return total * scale, metrics

    return engine.train_step(batches, loss, rows.loss_mask.sum()).grad_norm


def leave_out(layout: dict, mesh: Mesh, directory: str) -> dict:
    """Compares the steps 0, (1: spike, 2: NaN: left out), 3, then back behind step 0 and 3 again, with the steps 0,
    3."""
    engine, asked = build(layout, mesh), []

    def admit(loss: float, broken: list[int]) -> bool:
        asked.append((loss, broken))
        return not broken and loss < 100

    engine.admit = admit
    one_step(engine, mesh, 0)
    before = state_of(engine)
    Saver(directory, engine, parameter_shapes(model_config(layout)), CheckpointConfig(), mesh).save({"step": 1})
    poison = NAN if mesh.dp_rank == mesh.dp_size - 1 else 1.0  # on one data-parallel rank, and so in all gradients
    norms = [one_step(engine, mesh, 1, 1e4), one_step(engine, mesh, 2, poison)]
    unchanged = equal(before, state_of(engine)) and engine.step == 1
    norms.append(one_step(engine, mesh, 3))
    after = state_of(engine)
    engine.load_fragments(CheckpointReader(f"{directory}/step-00000001").read, 1)
    back = equal(before, state_of(engine))
    again = one_step(engine, mesh, 3)
    plain = build(layout, mesh)
    expected = [one_step(plain, mesh, 0), one_step(plain, mesh, 3)]
    return {
        "unchanged": unchanged,
        "next": equal(state_of(plain), after) and norms[2] == expected[1] and engine.step == 2,
        "rewound": back and again == norms[2] and equal(after, state_of(engine)) and engine.step == 2,
        "norms": norms[:2],
        "broken": [broken for _, broken in asked],
        "flip": flip(engine, mesh),
    }


def flip(engine: Engine, mesh: Mesh) -> list[str]:
    """Returns what the replica check says with whole weights, and with the lowest bit of one number changed on rank
    1."""
    said = []
    p = next(p for p in parameters_of(engine.parts) if p.placement.name == "layers.1.attention_norm.weight")
    held = getattr(p, "ds_tensor", p.data)
    held = held.to_local() if hasattr(held, "to_local") else held
    for bit in (0, 1 if mesh.rank == 1 else 0):
        held.view(torch.int32).flatten()[3] ^= bit
        said.append("; ".join(differing(engine.replicas(), mesh)))
    return said


def main() -> None:
    torch.set_num_threads(1)
    base = init_mesh(ParallelConfig(), None, 60)
    for number, layout in enumerate(json.loads(sys.argv[1])):
        parallel = settings_of(layout)[0]
        mesh = trainer_mesh({a: getattr(parallel, a) for a in AXES}, torch.device("cpu"), timedelta(seconds=60))
        results = mesh.all_gather_json(leave_out(layout, mesh, f"{sys.argv[2]}/{number}"))
        same = all(r["broken"] == results[0]["broken"] and r["flip"] == results[0]["flip"] for r in results)
        merged = {key: all(r[key] for r in results) for key in ("unchanged", "next", "rewound")}
        if base.rank == 0:
            print_json({"layout": layout, **results[0], **merged, "same": same})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
