"""Computes which layers each pipeline stage has and which rank holds it, for rules, planner and mesh alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from llmtrain.arch.parameters import head_rows, kinds_of, layer_shapes
from llmtrain.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class StagePlan:
    """Holds the layers of each pipeline stage and the schedule, which decides the rank of each.

    Example: 4 layers, pp=2, 1f1b: StagePlan((range(0, 2), range(2, 4)), pp=2, schedule="1f1b")
    """

    layers: tuple[range, ...]  # of each pipeline stage, first to last
    pp: int
    schedule: str

    def rank_of(self, stage: int) -> int:
        """Returns the pp coordinate that holds a pipeline stage: round robin, or for zbv a V, from the first rank to
        the last and back (arXiv 2401.10241)."""
        if self.schedule == "zbv" and stage >= self.pp:
            return 2 * self.pp - 1 - stage
        return stage % self.pp

    def stages_of(self, rank: int) -> list[int]:
        """Returns the pipeline stages of a pp coordinate, in ascending order."""
        return [stage for stage in range(len(self.layers)) if self.rank_of(stage) == rank]

    def stage_of(self, name: str) -> int:
        """Returns the pipeline stage that owns a canonical parameter; a tied embedding belongs to the first."""
        if name.startswith(("embed.", "position_embed.")):
            return 0
        if not name.startswith("layers."):
            return len(self.layers) - 1
        layer = int(name.split(".")[1])
        return next(stage for stage, layers in enumerate(self.layers) if layer in layers)

    def owner(self, name: str) -> int:
        """Returns the pp coordinate that holds a canonical parameter."""
        return self.rank_of(self.stage_of(name))


def plan_stages(model: ModelConfig, parallel: ParallelConfig) -> StagePlan:
    """Returns the pipeline stages that `parallel.stage_layers` asks for, or else balanced ones.

    Raises ValueError if they do not fit the model.
    """
    num_stages = parallel.pp * parallel.virtual_stages
    counts = parallel.stage_layers or _balanced(model, num_stages)
    if len(counts) != num_stages or sum(counts) != model.num_layers or min(counts) < 1:
        raise ValueError(
            f"parallel.stage_layers={counts}: must be {num_stages} positive numbers (pp x virtual_stages) whose sum is "
            f"model.num_layers={model.num_layers}; change them or leave it out"
        )
    starts = [sum(counts[:i]) for i in range(num_stages)]
    layers = tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))
    return StagePlan(layers, parallel.pp, parallel.schedule)


def _multiplied(model: ModelConfig) -> float:
    """Returns the number of matrix elements that one token is multiplied with in all blocks."""
    chosen = 1.0 if model.moe is None else model.moe.top_k / model.moe.num_experts
    total = 0.0
    for layers in kinds_of(model, range(model.num_layers)):
        shapes = [shape for shape in layer_shapes(model, layers[0]).values() if len(shape) > 1]
        total += len(layers) * sum(math.prod(shape) * (chosen if len(shape) == 3 else 1.0) for shape in shapes)
    return total


def _balanced(model: ModelConfig, num_stages: int) -> list[int]:
    """Returns the number of layers of each pipeline stage, as equal as possible, the first ones larger.

    The head counts as a share of a layer in proportion to its matrix; the embedding is a lookup and costs no time.
    """
    if num_stages > model.num_layers:
        raise ValueError(
            f"parallel.pp x virtual_stages={num_stages}: must be at most model.num_layers={model.num_layers}, a layer "
            "a stage; lower one of them"
        )
    if num_stages == 1:
        return [model.num_layers]
    head = head_rows(model) * model.hidden_size * model.num_layers / _multiplied(model)
    return list(_spread(model.num_layers, num_stages, head))


@lru_cache(maxsize=1024)
def _spread(num_layers: int, num_stages: int, head: float) -> tuple[int, ...]:
    """Returns the layers of each stage; `head` is what the head takes in units of a layer."""

    def slowest(last: int) -> tuple[float, int]:
        return max(-(-(num_layers - last) // (num_stages - 1)), last + head), -last

    last = min(range(1, num_layers - num_stages + 2), key=slowest)
    base, longer = divmod(num_layers - last, num_stages - 1)
    return (*(base + (stage < longer) for stage in range(num_stages - 1)), last)
