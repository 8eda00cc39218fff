"""Names the axes of the device mesh and computes their sizes."""

from __future__ import annotations

import math

from llmtrain.config.schema import ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outermost first


def mesh_sizes(parallel: ParallelConfig, num_trainers: int) -> dict[str, int]:
    """Returns the number of ranks on each axis; `dp_shard: -1` takes the ranks that the other axes leave.

    Raises ValueError if the product of the sizes is not `num_trainers`.
    """
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    fixed = math.prod(n for axis, n in sizes.items() if axis != "dp_shard")
    if sizes["dp_shard"] == -1:
        sizes["dp_shard"] = max(1, num_trainers // fixed)
    if math.prod(sizes.values()) != num_trainers:
        product = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
        raise ValueError(
            f"parallel: {product} = {math.prod(sizes.values())} ranks: must be the {num_trainers} trainer ranks; "
            "change the axes or the number of processes"
        )
    return sizes
