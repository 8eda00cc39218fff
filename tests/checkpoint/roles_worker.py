"""Trains a policy and a critic on each layout, from the newest checkpoint if there is one, and saves where the case
says. Runs on several ranks with a JSON list of cases and a run directory; prints one JSON line a case."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from llmtrain.config.recipes.pretrain import RECIPE
from llmtrain.config.schema import CheckpointConfig, Config, EngineConfig, OptimConfig, ParallelConfig
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.trainer.job import Job
from llmtrain.trainer.resume import load_newest, make_saver, save
from tests.json_output import print_json
from tests.parity import layouts_worker as parity
from tests.parity.meshes import mesh_of

ROWS, TURNS = 16, 4  # rows of all ranks; microbatches of each
ROLES = {
    "policy": {"tied": True, "num_layers": 3},
    "critic": {"tied": False, "num_layers": 2, "lr": 3e-3, "model": {"hidden_size": 48, "ffn_size": 64}},
}


def job_of(case: dict, mesh: Mesh, directory: str) -> Job:
    engines = {role: parity.build({**each, **case["mesh"], **case[role]}, mesh) for role, each in ROLES.items()}
    engines = {role: engines[role] for role in case.get("roles", ROLES)}
    config = Config(run_dir=directory, optim=OptimConfig(), checkpoint=CheckpointConfig(background=False))
    return Job(config, RECIPE, engines["policy"].parts[0].config, mesh, None, None, engines)


def train(job: Job, step: int) -> list[float]:
    """Takes one step of each; the critic leaves step 1 out, so that the two count different updates."""
    mesh, seen = job.mesh, []
    for number, (role, engine) in enumerate(job.engines.items()):
        if role == "critic" and step == 1:
            continue
        whole, width = parity.global_rows(step + 10 * number, ROWS), ROWS // mesh.dp_size // TURNS
        firsts = [(turn * mesh.dp_size + mesh.dp_rank) * width for turn in range(TURNS)]
        rows = [parity.rows_of(whole, slice(first, first + width)) for first in firsts]
        stats = engine.train_step(rows, token_loss, whole.loss_mask.sum())
        seen += [stats.loss, stats.grad_norm]
    return seen


def run(case: dict, mesh: Mesh, directory: str) -> dict:
    job = job_of(case, mesh, directory)
    path, seen = load_newest(job), []
    for step in range(job.step, case["until"]):
        seen.append(train(job, step))
        job.step += 1
        if job.step == case.get("save"):
            job.engines["critic"].to_host()  # comes back by itself
            job.saver = make_saver(job)
            save(job)
    weights = [sum(w.double().abs().sum().item() for _, w in engine.full_weights()) for engine in job.engines.values()]
    return {"from": path, "seen": seen, "weights": weights, "steps": [engine.step for engine in job.engines.values()]}


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for case in json.loads(sys.argv[1]):
        with mesh_of(parity.settings_of(case["mesh"])[0], EngineConfig(backend="fsdp")) as own:
            try:
                result = run(case, own, sys.argv[2])
            except ValueError as error:
                result = {"error": str(error)}
        if mesh.rank == 0:
            print_json({"case": case, **result})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
