"""Makes many meshes in one process, one after the other."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from llmtrain.arch.mesh import AXES
from llmtrain.config.schema import EngineConfig, ParallelConfig
from llmtrain.parallel.mesh import Mesh, trainer_mesh

CPU = torch.device("cpu")
_made: Counter[tuple[int, ...]] = Counter()


def _name(ranks: list[int]) -> str:
    """Returns a name that no two groups of the same ranks share, also after the first has ended: torch counts those
    there are, and the second would find the addresses of the first in the store."""
    _made[tuple(ranks)] += 1
    return f"{'_'.join(map(str, ranks))}/{_made[tuple(ranks)]}"


assert hasattr(distributed_c10d, "_hash_ranks_to_str")
distributed_c10d._hash_ranks_to_str = _name


@contextmanager
def mesh_of(parallel: ParallelConfig, engine: EngineConfig, device: torch.device = CPU) -> Iterator[Mesh]:
    """Yields the mesh of one layout. Afterwards its groups end, whose threads would go on looking for messages, a
    hundred times a second each. Not those of FSDP2, nor of what is compiled: torch remembers what it did on a mesh, and
    takes the groups of the first for one that is equal."""
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    # the pipeline stages of a compiled model wait for each other's compilation
    timeout = timedelta(minutes=5 if engine.compile else 1)
    mesh = trainer_mesh(sizes, device, timeout, schedule=parallel.schedule, ep=parallel.ep)
    try:
        yield mesh
    finally:
        if engine.backend == "deepspeed" and not engine.compile:
            for group in {id(group): group for group in mesh.groups.values() if group is not None}.values():
                dist.destroy_process_group(group)
        mesh.groups.clear()
        gc.collect()
