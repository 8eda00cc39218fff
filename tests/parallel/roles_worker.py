from __future__ import annotations

import torch
import torch.distributed as dist

from llmtrain.config.schema import ParallelConfig, RolloutConfig
from llmtrain.parallel.mesh import init_mesh, shutdown
from tests.json_output import print_json

mesh = init_mesh(ParallelConfig(), RolloutConfig(placement="separate", workers=1), 30)
mesh.link.await_trainers("here", mesh.role)
message = mesh.link.broadcast_json({"pi": 3.141592653589793} if mesh.link.rank == 0 else None, 0)
rank = mesh.link.rank
parts = mesh.link.all_gather_bytes(torch.full((rank + 1,), rank, dtype=torch.uint8))
total = torch.tensor([mesh.rank + 1])
dist.all_reduce(total)
print_json([mesh.role, mesh.rank, mesh.size, message, [p.tolist() for p in parts], int(total)])
shutdown()
