"""Compares Muon on matrices cut over the ranks with Muon in one process. Runs on several ranks with their number as
argument.

Rank 0 prints one JSON line a layout: for each rank the worst error of a weight relative to how far it moved.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llmtrain.config.schema import OptimConfig, ParallelConfig
from llmtrain.engine.optim import build_optimizer, state_keys
from llmtrain.parallel.collectives import all_gather
from llmtrain.parallel.mesh import AXES, Mesh, init_mesh, trainer_mesh
from llmtrain.parallel.placement import Placement
from llmtrain.parallel.tensor import shard
from tests.json_output import print_json

# (shape, tp_dim); three of one shape; 10 rows, and 5 below tp 2, do not divide by the data-parallel ranks
MATRICES = {
    "layers.0.q": ((12, 8), 0),
    "layers.1.q": ((12, 8), 0),
    "layers.2.q": ((12, 8), 0),
    "layers.0.o": ((8, 12), 1),
    "layers.0.up": ((10, 16), 0),
    "layers.0.down": ((5, 10), 1),
    "layers.0.feedforward.experts.up": ((4, 6, 8), 0),
    "layers.1.feedforward.experts.down": ((6, 8, 4), 0),  # over 4 data-parallel ranks: 2, 2, 2, 0
    "layers.0.norm": ((8,), None),
    "head": ((12, 8), 0),
}
LAYOUTS = {
    2: [({"tp": 2}, "plain"), ({"dp_replicate": 2}, "plain"), ({"dp_shard": 2}, "dtensor"), ({"cp": 2}, "dtensor")],
    4: [
        ({"tp": 2, "dp_replicate": 2}, "plain"),
        ({"tp": 2, "dp_shard": 2}, "dtensor"),
        ({"dp_replicate": 2, "dp_shard": 2}, "dtensor"),
        ({"dp_shard": 4}, "dtensor"),
    ],
}
CONFIG = OptimConfig(name="muon", lr=0.02, weight_decay=0.1)


def value(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + sum(map(ord, name)))
    return torch.randn(MATRICES[name][0], generator=generator)


def placed(full: Tensor, name: str, mesh: Mesh, data: DeviceMesh | None) -> Tensor:
    """Returns this rank's piece, as an engine holds it."""
    local = shard(full, MATRICES[name][1], mesh.coords["tp"], mesh.sizes["tp"])
    if data is None:
        return local
    return distribute_tensor(local, data, [Replicate(), Shard(0)])


def whole(p: nn.Parameter, mesh: Mesh) -> Tensor:
    local = p.full_tensor() if isinstance(p, DTensor) else p
    return (
        local
        if p.placement.tp_dim is None or mesh.tp_group is None
        else all_gather(local, p.placement.tp_dim, mesh.tp_group)
    )


def train(mesh: Mesh | None, data: DeviceMesh | None, one: Mesh) -> nn.ParameterDict:
    """Makes four updates with given gradients; `one` holds all of everything."""
    at = mesh or one
    model = nn.ParameterDict()
    for name, (shape, tp_dim) in MATRICES.items():
        p = nn.Parameter(placed(value(name, 0), name, at, data))
        p.placement = Placement(name, shape, tp_dim)
        model[name.replace(".", "/")] = p
    optimizer = build_optimizer(model, CONFIG, mesh)
    for step in range(1, 5):
        for p in model.values():
            p.grad = placed(value(p.placement.name, step), p.placement.name, at, data)
        optimizer.step()
    for p in model.values():
        assert all(optimizer.state[p][key].shape == p.shape for key in state_keys(p))
        assert all(isinstance(optimizer.state[p][key], DTensor) == (data is not None) for key in state_keys(p))
    return model


@torch.no_grad()
def run(axes: dict[str, int], form: str, one: Mesh) -> float:
    mesh = trainer_mesh({axis: axes.get(axis, 1) for axis in AXES}, torch.device("cpu"), timedelta(seconds=60))
    data = None
    if form == "dtensor":
        sizes = mesh.sizes
        cube = torch.arange(mesh.size).view(sizes["dp_replicate"], sizes["dp_shard"] * sizes["cp"], sizes["tp"])
        cubes = [DeviceMesh("cpu", cube[..., tp], mesh_dim_names=("replicate", "shard")) for tp in range(sizes["tp"])]
        data = cubes[mesh.coords["tp"]]
    found = {p.placement.name: whole(p, mesh) for p in train(mesh, data, one).values()}
    error = 0.0
    for p in train(None, None, one).values():
        moved = (p - value(p.placement.name, 0)).norm()
        error = max(error, float((found[p.placement.name] - p).norm() / moved))
    return error


def main() -> None:
    ranks = int(sys.argv[1])
    here = init_mesh(ParallelConfig(), None, 60)
    one = Mesh("trainer", 0, 1, here.device, dict.fromkeys(AXES, 1), dict.fromkeys(AXES, 0))
    for axes, form in LAYOUTS[ranks]:
        errors = here.all_gather_json(run(axes, form, one))
        if here.rank == 0:
            print_json({"layout": axes, "form": form, "errors": errors})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
