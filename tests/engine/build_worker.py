"""Trains several engines in turns. Runs on several ranks with a JSON list of jobs and the names of the engines that are
to live; prints, one line a job, a digest of all that every rank saw of each engine."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.schema import EngineConfig, ParallelConfig
from llmtrain.engine.base import Engine, LossFn
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.parallel.plan import trained_of
from llmtrain.types import Batch, Metrics, Scores
from tests.engine.frozen_worker import my_rows
from tests.json_output import print_json
from tests.parity import layouts_worker as parity
from tests.parity.meshes import mesh_of

STEPS = 3


class Seen:
    """Follows one engine: a digest of losses, norms, gradients, scores and weights."""

    def __init__(self, engine: Engine, mesh: Mesh, loss: LossFn) -> None:
        self.engine, self.mesh, self.loss, self.digest = engine, mesh, loss, hashlib.sha256()
        parity.watch_updates(engine, lambda: self.add(self.gradients()))

    def gradients(self) -> Iterable[Tensor]:
        grads = [parity.gradient(self.engine, p) for p in trained_of(self.engine.parts)]
        return [g for g in grads if g is not None]

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.digest.update(tensor.detach().float().contiguous().numpy().tobytes())

    def score(self, step: int) -> None:
        self.add(scores.logprobs for scores in self.engine.score(my_rows(self.mesh, step)[0]))

    def train(self, step: int) -> None:
        stats = self.engine.train_step(my_rows(self.mesh, step)[0], self.loss, my_rows(self.mesh, step)[1])
        self.digest.update(f"{stats.loss!r} {stats.grad_norm!r}".encode())

    def end(self) -> str:
        self.add(weight for _, weight in self.engine.full_weights())
        return self.digest.hexdigest()


def squared(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    return (torch.where(batch.loss_mask, scores.logprobs + 1.0, 0.0) ** 2).sum(), {}


LOSSES = {"token": token_loss, "squared": squared}


def axes(layout: dict) -> str:
    """Returns the mesh axes of a layout: engines of the same axes share a mesh."""
    return parity.settings_of(layout)[0].model_dump_json()


def run(job: dict[str, dict], living: list[str]) -> dict[str, str]:
    with ExitStack() as stack:
        meshes = {}
        for layout in job.values():  # those of engines that do not live, too: groups come in one order in every run
            if axes(layout) not in meshes:
                made = mesh_of(parity.settings_of(layout)[0], EngineConfig(backend="fsdp"))
                meshes[axes(layout)] = stack.enter_context(made)
        seen = {}
        for name in living:
            layout = job[name]
            mesh = meshes[axes(layout)]
            seen[name] = Seen(parity.build(layout, mesh), mesh, LOSSES[layout.get("loss", "token")])
        for step in range(STEPS):
            for name in living:
                seen[name].score(step)
            for name in living if step % 2 == 0 else reversed(living):
                seen[name].train(step + (0 if name == "a" else 10))  # each has rows of its own
                for other in living:
                    seen[other].engine.score(my_rows(seen[other].mesh, step)[0])
        return {name: each.end() for name, each in seen.items()}


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for job in json.loads(sys.argv[1]):
        try:
            result = run(job, sys.argv[2].split("+"))
        except ValueError as error:
            result = {"error": str(error)}
        ranks = mesh.all_gather_json(result)
        if mesh.rank == 0:
            print_json({"job": job, "ranks": ranks})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
