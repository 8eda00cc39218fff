"""Measures the bytes of the model states that a rank holds, beside the formula's. Runs on several ranks with a JSON
list of layouts.

Prints one JSON line a layout, of the largest rank of each pipeline rank: weights and optimizer state between steps,
gradients before the update and (where the loss is) while they accumulate, in bytes, measured and by formula.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from layouts_worker import settings_of
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from traffic_worker import batches_of, build, shape_of

from llmtrain.config.schema import ParallelConfig
from llmtrain.engine.base import Engine
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.parallel.plan import parameters_of
from llmtrain.scaling.states import state_bytes
from llmtrain.types import Batch, Scores
from tests.json_output import print_json
from tests.parity.meshes import mesh_of


def held_bytes(tensors: Iterable[Tensor | None], counted: set[int]) -> int:
    """Returns the bytes of the storages behind tensors, each once; those in `counted` belong to another class and are
    left out."""
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def states(engine: Engine) -> dict[str, int]:
    """Returns the bytes by class, each storage in one."""
    counted: set[int] = set()
    return {
        "weights": held_bytes(weights(engine), counted),
        "optimizer": held_bytes(optimizer_state(engine), counted),
        "gradients": held_bytes(gradients(engine), counted),
    }


def unreduced_bytes(engine: Engine) -> int:
    """Returns the bytes of the gradients that a rank accumulates."""
    if engine.config.backend == "deepspeed":
        return held_bytes((p.grad for p in parameters_of(engine.parts)), set())
    units = (m for part in engine.parts for m in part.modules() if isinstance(m, FSDPModule))
    groups = (group for unit in units for group in param_groups(unit))
    held = [p for group in groups for p in group.fsdp_params]
    return held_bytes((g for p in held for g in (p.unsharded_accumulated_grad, p._unsharded_param.grad)), set())


def param_groups(unit: FSDPModule) -> list:
    """Returns the groups of FSDP2's state, of which torch before 2.13 has one, or None."""
    state = unit._get_fsdp_state()
    return getattr(state, "_fsdp_param_groups", None) or [g for g in [getattr(state, "_fsdp_param_group", None)] if g]


def weights(engine: Engine) -> list[Tensor]:
    """Returns the weights as they are computed with: under FSDP2 the shards they are gathered from."""
    own = engine.parameters if engine.config.backend == "fsdp" else parameters_of(engine.parts)
    return [*own, *(p.ds_tensor for p in own if hasattr(p, "ds_tensor"))]


def gradients(engine: Engine) -> list[Tensor | None]:
    own = engine.parameters if engine.config.backend == "fsdp" else parameters_of(engine.parts)
    held = engine.optimizer if engine.config.backend == "fsdp" else engine.engine.optimizer
    averaged = getattr(held, "averaged_gradients", {})
    return [*(p.grad for p in own), *(g for group in averaged.values() for g in group or [])]


def optimizer_state(engine: Engine) -> list[Tensor]:
    """Returns what the inner optimizer updates (masters, if they are not the weights) and what it keeps of it."""
    outer = engine.optimizer if engine.config.backend == "fsdp" else engine.engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    flats = [
        name for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups") if hasattr(outer, name)
    ]
    masters = getattr(outer, flats[0]) if flats else []
    return [*masters, *(x for state in inner.state.values() for x in state.values() if isinstance(x, Tensor))]


def measure(layout: dict, mesh: Mesh) -> dict:
    parallel, settings = settings_of(layout)
    model = shape_of(layout)
    engine = build(layout, model, mesh)
    microbatches, denominator = batches_of(layout, mesh)
    seen: dict[str, int] = {}

    def before_update(loss: float, broken: list[int]) -> bool:
        seen["gradients"] = states(engine)["gradients"]
        return True

    def loss_fn(scores: Scores, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        seen["accumulated"] = unreduced_bytes(engine)  # the last time, of all microbatches but one
        return token_loss(scores, batch)

    engine.admit = before_update
    for _ in range(2):
        engine.train_step(microbatches, loss_fn, denominator)
    everyone = mesh.all_gather_json([mesh.coords["pp"], {**states(engine), **seen}])

    def compared(pp_rank: int) -> dict:
        alike = [held for stage, held in everyone if stage == pp_rank]
        measured = {name: max(each[name] for each in alike) for name in alike[0]}
        formula = state_bytes(model, parallel, settings, layout.get("optimizer", "adamw"), pp_rank=pp_rank)._asdict()
        formula["accumulated"] = formula["gradients"] + formula.pop("unreduced")
        return {"measured": measured, "formula": {name: formula[name] for name in measured}}

    return {"stages": [compared(pp_rank) for pp_rank in range(parallel.pp)]}


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(ParallelConfig(), None, 120)
    for layout in json.loads(sys.argv[1]):
        try:
            with mesh_of(*settings_of(layout)) as own:
                result = measure(layout, own)
        except Exception as error:
            if os.environ.get("TRACE"):
                raise
            result = {"error": f"{type(error).__name__}: {error}"}
        if mesh.rank == 0 or "error" in result:
            print_json({"layout": layout, **result})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
