"""Reads `full_weights` of two pipeline stages in bf16, with both engines. Runs on 2 ranks; each prints a JSON line for
each engine: the dtype of every weight, and the names of those that are not what the model was filled with."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from llmtrain.config.schema import ParallelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.parallel.mesh import init_mesh
from tests.json_output import print_json
from tests.parity.layouts_worker import build, initial, model_config, settings_of
from tests.parity.meshes import mesh_of

MOE = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "gate": "sigmoid", "selection_bias": True}
LAYOUT = {"pp": 2, "precision": "bf16", "num_layers": 2, "moe": MOE}


def compare(layout: dict) -> dict:
    config = model_config(layout)
    shapes = parameter_shapes(config)
    with mesh_of(*settings_of(layout)) as mesh:
        weights = {name: full.clone() for name, full in build(layout, mesh).full_weights()}
    assert list(weights) == list(shapes)
    expected = {name: initial(name, shape, config) for name, shape in shapes.items()}
    wrong = [name for name, full in weights.items() if not full.equal(expected[name].to(full.dtype))]
    return {"dtypes": {name: str(full.dtype) for name, full in weights.items()}, "wrong": wrong}


def main() -> None:
    torch.set_num_threads(1)
    init_mesh(ParallelConfig(), None, 30)
    for engine in ({"zero_stage": 1}, {"backend": "fsdp"}):
        print_json({"rank": os.environ["RANK"], "engine": engine, **compare(LAYOUT | engine)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
