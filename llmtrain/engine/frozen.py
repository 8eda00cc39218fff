"""Implements a model that is only scored with: a reference, a reward model, a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.schema import EngineConfig, ParallelConfig
from llmtrain.engine.fsdp import fill_shards, mark_copies, reshard, shard_part
from llmtrain.engine.movable import Movable
from llmtrain.engine.precision import compute_dtype
from llmtrain.model.decoder import Decoder
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import Pipeline
from llmtrain.parallel.plan import fill_buffers, parameters_of
from llmtrain.parallel.scoring import score
from llmtrain.types import Batch, Scores, WeightSource


class FrozenModel(Movable):
    """Implements engine.base.Scorer. `parts` are this rank's pipeline stages, from parallel.plan.parallelize.

    It is FSDP2 without an optimizer, also beside DeepSpeed's engines: shards lie in the compute precision, a block's
    weights are whole while it computes, and nothing is compiled.
    """

    def __init__(
        self, parts: list[Decoder], source: WeightSource, mesh: Mesh, parallel: ParallelConfig, config: EngineConfig
    ) -> None:
        self.parts, self.mesh, self.device = parts, mesh, mesh.device
        own, config = over_all_ranks(mesh), config.model_copy(update={"reshard": True})
        for part in parts:
            part.to(compute_dtype(config.precision)).requires_grad_(False).eval()  # still without memory
            shard_part(part, own, config)
        mark_copies(parts, mesh)
        fill_shards(parts, own, source)
        fill_buffers(parts, mesh, source)
        plan = plan_stages(parts[0].config, parallel)
        self.pipeline = Pipeline(parts, plan, mesh) if mesh.sizes["pp"] > 1 else None

    def score(self, microbatches: Sequence[Batch]) -> list[Scores]:
        """See Scorer."""
        self.require_here()
        scores = score(self.parts, self.pipeline, self.mesh, microbatches)
        reshard(self.parts)
        return scores

    def held(self) -> Iterator[Tensor]:
        """See Movable."""
        yield from parameters_of(self.parts)


def over_all_ranks(mesh: Mesh) -> Mesh:
    """Returns the mesh as a model without gradients may see it: the copies of `dp_replicate` shard, too, since nothing
    is ever reduced over them."""
    sizes = {**mesh.sizes, "dp_replicate": 1, "dp_shard": mesh.dp_size}
    coords = {**mesh.coords, "dp_replicate": 0, "dp_shard": mesh.dp_rank}
    wider = {"shard": mesh.groups["grad"], "expert_shard": mesh.groups["expert_grad"]}
    return replace(mesh, sizes=sizes, coords=coords, groups={**mesh.groups, **wider})
