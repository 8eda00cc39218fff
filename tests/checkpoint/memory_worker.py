"""Measures the memory of reading and writing weights, under torchrun on 2 ranks: a Hugging Face directory onto tp=2, a
checkpoint of it, and its export; then the directory and the checkpoint into states that are sharded over the ranks.
Prints JSON.

What each takes is the peak of resident memory less what was resident before, over the bytes of the whole fp32 model.
"""

from __future__ import annotations

import gc
import math
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.fsdp import fully_shard

from llmtrain.arch.mesh import AXES
from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.save import save_checkpoint
from llmtrain.checkpoint.source import weight_source
from llmtrain.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from llmtrain.engine import zero
from llmtrain.engine.build import Role, build_trained
from llmtrain.engine.clip import owns
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh, shutdown, trainer_mesh
from llmtrain.parallel.plan import materialize, parallelize
from llmtrain.types import Fragment
from tests.json_output import print_json


class Weights:
    """Provides as much of an engine as a save needs."""

    def __init__(self, model: Decoder, rank: int) -> None:
        self.model, self.rank = model, rank

    def fragments(self) -> Iterator[Fragment]:
        for p in self.model.parameters():
            if owns(p, self.rank):
                address = p.placement.address(0, p.numel())
                yield Fragment(address, {"weight": p.detach().flatten()})


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def growth(action: Callable[[], object]) -> tuple[object, int]:
    """Returns the result of an action, and the bytes by which the peak of memory grew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    return action(), resident("VmHWM") - before


class Taken(Exception):
    """Says that the weights are in, and ends there: DeepSpeed would add masters and moments."""


def sharded(path: str, config: ModelConfig, mesh: Mesh, backend: str) -> object:
    """Builds an engine on 2 shards of the weights of `path`."""
    parallel, settings = ParallelConfig(dp_shard=2), EngineConfig(backend=backend, zero_stage=3, precision="fp32")
    role = Role("policy", config, parallel, settings, weight_source(path, config, mesh), OptimConfig(), 1)
    with mock.patch.object(zero.deepspeed, "initialize", side_effect=Taken) as initialize:
        try:
            return build_trained(role, mesh)
        except Taken:
            model = initialize.call_args.kwargs["model"]
    assert all(p.numel() == 0 for p in model.parameters())  # what there is lies in `ds_tensor`
    return model


def main(directory: str, config_json: str) -> None:
    config, parallel = ModelConfig.model_validate_json(config_json), ParallelConfig(tp=2)
    shapes = parameter_shapes(config)
    whole_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    mesh = init_mesh(parallel, None, timeout_s=60)

    def take_in() -> Decoder:
        parts = parallelize(config, mesh, parallel, EngineConfig())
        materialize(parts, mesh, weight_source(f"{directory}/hf", config, mesh))
        return parts[0]

    engine, import_bytes = growth(lambda: Weights(take_in(), mesh.rank))
    save = partial(save_checkpoint, f"{directory}/checkpoints", engine, {"step": 1}, mesh, 1, shapes)
    path, save_bytes = growth(save)
    del engine, save
    export_bytes = 0
    if mesh.rank == 0:
        _, export_bytes = growth(lambda: export(path, f"{directory}/again", config, None, None, torch.float32))
    shares = {"import": import_bytes, "save": save_bytes, "export": export_bytes}
    sizes = dict.fromkeys(AXES, 1) | {"dp_shard": 2}
    shards = trainer_mesh(sizes, torch.device("cpu"), timedelta(seconds=60))
    fully_shard(torch.nn.Linear(2, 2), mesh=shards.fsdp_mesh())  # what its first use loads is no weight
    for name, at in (("hf", f"{directory}/hf"), ("checkpoint", path)):
        for backend in ("fsdp", "deepspeed"):
            shares[f"{backend} {name}"] = growth(lambda at=at, to=backend: sharded(at, config, shards, to))[1]
    everyone = mesh.all_gather_json({name: taken / whole_bytes for name, taken in shares.items()})
    if mesh.rank == 0:
        print_json(everyone)
    mesh.barrier()
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
