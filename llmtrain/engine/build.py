"""Builds the models of a job, each from its role: trained ones in the backend that the role names, frozen ones sharded
by FSDP2. Several live side by side on one mesh."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from llmtrain.engine.base import Engine, Scorer
from llmtrain.engine.precision import check_device
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.plan import parallelize
from llmtrain.types import WeightSource


@dataclass(frozen=True)
class Role:
    """Describes one model of a job: what it is, how it is spread and trained, and where its weights come from.

    Example: Role("policy", model, ParallelConfig(), EngineConfig(), source, OptimConfig(), total_steps=100)
    """

    name: str
    model: ModelConfig  # resolved
    parallel: ParallelConfig
    engine: EngineConfig
    source: WeightSource  # the weights at the start
    optim: OptimConfig | None = None  # None: frozen
    total_steps: int = 0  # updates that the learning-rate schedule is laid out for


def build_trained(role: Role, mesh: Mesh) -> Engine:
    """Returns the model in the backend that `role.engine.backend` names (a collective). Where states are sharded no
    rank ever holds more than its shards and one whole tensor.

    Raises ValueError when this machine cannot compute in `role.engine.precision`, or cannot do what the backend needs.
    """
    assert role.optim is not None, f"{role.name}: a trained role has an optim section"
    check_device(role.engine.precision, mesh.device)
    parts = parallelize(role.model, mesh, role.parallel, role.engine)
    if role.engine.backend == "fsdp":
        from llmtrain.engine.fsdp import FsdpEngine as Backend
    else:
        from llmtrain.engine.zero import ZeroEngine as Backend
    return Backend(parts, role.source, mesh, role.parallel, role.engine, role.optim, role.total_steps)


def build_frozen(role: Role, mesh: Mesh) -> Scorer:
    """Returns the model without an optimizer, sharded over all data-parallel ranks in the compute precision (a
    collective), whatever the backend of the job's trained models.

    Raises ValueError when this machine cannot compute in `role.engine.precision`.
    """
    from llmtrain.engine.frozen import FrozenModel

    check_device(role.engine.precision, mesh.device)
    parts = parallelize(role.model, mesh, role.parallel, role.engine)
    return FrozenModel(parts, role.source, mesh, role.parallel, role.engine)
