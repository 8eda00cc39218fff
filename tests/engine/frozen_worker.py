"""Builds a frozen model on each layout, some beside a trained one, and compares it with the unsharded model. Runs on
several ranks with a JSON list of layouts; prints one JSON line a layout with what every rank saw."""

from __future__ import annotations

import json
import sys
from dataclasses import fields

import torch
import torch.distributed as dist

from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.schema import EngineConfig, ParallelConfig
from llmtrain.engine.base import Scorer
from llmtrain.engine.build import Role, build_frozen
from llmtrain.engine.movable import storages
from llmtrain.engine.precision import compute_dtype
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.parallel.pipeline import Pipeline
from llmtrain.parallel.plan import materialize, parallelize, parameters_of
from llmtrain.parallel.scoring import score
from llmtrain.types import Batch, Scores
from tests.json_output import print_json
from tests.parity import layouts_worker as parity
from tests.parity.meshes import mesh_of


def role_of(layout: dict) -> Role:
    config = parity.model_config(layout)
    shapes = parameter_shapes(config)
    return Role("reference", config, *parity.settings_of(layout), lambda n: parity.initial(n, shapes[n], config))


def my_rows(mesh: Mesh, step: int) -> tuple[list[Batch], torch.Tensor]:
    """Returns this rank's microbatches, and how many tokens are trained in all of them."""
    turns = max(2, mesh.sizes["pp"] * 2)
    whole = parity.global_rows(step, 2 * turns * mesh.dp_size)
    firsts = [2 * (turn * mesh.dp_size + mesh.dp_rank) for turn in range(turns)]
    return [parity.rows_of(whole, slice(first, first + 2)) for first in firsts], whole.loss_mask.sum()


class Unsharded:
    """Holds every weight of this rank's pipeline stages whole."""

    def __init__(self, role: Role, mesh: Mesh) -> None:
        self.parts, self.mesh = parallelize(role.model, mesh, role.parallel, role.engine), mesh
        materialize(self.parts, mesh, role.source)
        for p in parameters_of(self.parts):
            p.data = p.data.to(compute_dtype(role.engine.precision))
        plan = plan_stages(role.model, role.parallel)
        self.pipeline = Pipeline(self.parts, plan, mesh) if mesh.sizes["pp"] > 1 else None

    def score(self, batches: list[Batch]) -> list[Scores]:
        return score([part.eval() for part in self.parts], self.pipeline, self.mesh, batches)


def bytes_of(model: Scorer) -> int:
    return sum(size for _, size in storages(parameters_of(model.parts), torch.device("cpu")))


def equal(one: list[Scores], two: list[Scores]) -> bool:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for a, b in zip(one, two, strict=True) for f in fields(Scores))
    return all(a is b if b is None else a.equal(b) for a, b in pairs)


def plain_error(role: Role, batches: list[Batch], scores: list[Scores]) -> float:
    """Returns the largest difference of a log-prob or value to that of a decoder in one process, in fp32."""
    plain = Decoder(role.model)
    for name, held in [*plain.named_parameters(), *plain.named_buffers()]:
        held.data.copy_(role.source(name))
    with torch.no_grad():
        expected = [parity.scores_of(plain, batch) for batch in batches]
    name = "values" if role.model.head == "scalar" else "logprobs"
    pairs = ((getattr(a, name), getattr(b, name)) for a, b in zip(scores, expected, strict=True))
    return max((a - b).abs().max().item() for a, b in pairs)


def refuses(model: Scorer, batches: list[Batch]) -> bool:
    try:
        model.score(batches)
    except RuntimeError as error:
        return "to_device()" in str(error)
    return False


def case(layout: dict, mesh: Mesh) -> dict:
    role, batches = role_of(layout), my_rows(mesh, 0)[0]
    whole = Unsharded(role, mesh)
    trained = parity.build({**layout, **layout["beside"]}, mesh) if "beside" in layout else None
    frozen = build_frozen(role, mesh)
    scores = [frozen.score(batches)]
    for step in range(2):
        frozen.to_host()
        left, refused = bytes_of(frozen), refuses(frozen, batches)
        if trained is not None:
            rows, count = my_rows(mesh, step)
            trained.train_step(rows, token_loss, count)
        frozen.to_device()
        scores.append(frozen.score(batches))
    expected = whole.score(batches)
    return {
        "equal": all(equal(each, expected) for each in scores),
        "error": plain_error(role, batches, scores[0]),
        "held": bytes_of(frozen),
        "whole": bytes_of(whole),
        "left": left,
        "refused": refused,
        "gradients": sum(p.requires_grad or p.grad is not None for p in parameters_of(frozen.parts)),
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
