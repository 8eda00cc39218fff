"""Computes the bytes of model states that a rank holds. tests/parity/memory_test.py compares them with measurements.

Mixed-precision AdamW on one rank takes 18 bytes a parameter: bf16 weight 2, fp32 master 4, fp32 gradient 4, two fp32
moments 8. FSDP2 without `reshard` has just these. DeepSpeed has 16, with bf16 gradients, as in the ZeRO paper. Both
hold whole gradients until a step's last microbatch (`unreduced`), and sharded ones from then on: a peak before the
update that ZeRO's table leaves out. DeepSpeed's communication buckets come on top.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from llmtrain.arch.parameters import Shape, numel
from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.scaling.parts import (
    PERSISTENT,
    REUSE,
    block_matrices,
    by_ranks,
    optimizer_groups,
    rank_adapters,
    rank_shapes,
    stage_units,
    value_bytes,
)


class States(NamedTuple):
    """Holds bytes on the device."""

    weights: int  # between steps
    gradients: int  # reduced, as the update reads them
    optimizer: int  # moments, and fp32 masters if they are separate from the weights
    gathered: int  # temporary: whole weights in compute precision, or what Muon orthogonalises
    unreduced: int  # additional bytes of gradients before their reduction


def zero_bytes(parameters: int, zero_stage: int, ranks: int, precision: str) -> tuple[int, int, int]:
    """Returns (weights, gradients, optimizer state) of one rank under ZeRO, arXiv 1910.02054, section 3 and figure 1.

    Mixed precision holds 2 + 2 + 12 bytes a parameter (the 12: fp32 master and AdamW's two moments); fp32 4 + 4 + 8,
    but 12 at ZeRO stage 3, where DeepSpeed has a master all the same. ZeRO stage 1 shards the optimizer state over the
    data-parallel `ranks`, 2 gradients too, 3 weights too.
    """
    value = 4 if precision == "fp32" else 2
    sizes = (value, value, 8 if precision == "fp32" and zero_stage < 3 else 12)
    return tuple(
        math.ceil(parameters * size / (ranks if zero_stage >= least else 1))
        for size, least in zip(sizes, (3, 2, 1), strict=True)
    )


def state_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    optimizer: str = "adamw",
    accumulation: float = 2,
    pp_rank: int = 0,
) -> States:
    """Returns the states of the fullest data-parallel rank of one pipeline rank.

    `model` is resolved and `parallel.dp_shard` is not -1.
    """
    muon = block_matrices(model, parallel, pp_rank) if optimizer == "muon" else []
    if engine.backend == "fsdp":
        states = _fsdp(model, parallel, engine, accumulation, pp_rank)
        spared = _momentum(muon, parallel.dp_shard * parallel.cp, parallel.ep)
    else:
        over = parallel.dp_replicate * parallel.dp_shard * parallel.cp if engine.zero_stage else 1
        spared = _momentum(muon, over, parallel.ep if engine.zero_stage else 1)
        shapes, ranks = rank_shapes(model, parallel, pp_rank), parallel.dp_replicate * parallel.dp_shard * parallel.cp
        each = [_zero(some, shared, engine, muon) for some, shared in by_ranks(shapes, ranks, parallel.ep)]
        states = States(*(sum(values) for values in zip(*each, strict=True)))
        if engine.zero_stage in (1, 2):  # Muon gathers directions, in bf16 on a GPU
            states = states._replace(gathered=states.gathered + 2 * numel(muon))
    states = states._replace(optimizer=states.optimizer - spared)
    if model.lora is not None:  # the base model has weights only, no gradients or optimizer state
        frozen = states._replace(gradients=0, optimizer=0, unreduced=0)
        trained = _of_adapters(rank_adapters(model, parallel, pp_rank), parallel, engine)
        states = States(*(a + b for a, b in zip(frozen, trained, strict=True)))
    if engine.offload == "none":
        return states
    kept = states.weights if engine.offload != "params" else 0
    return states._replace(weights=kept, gradients=0, optimizer=0, unreduced=states.unreduced + states.gradients)


def _momentum(shapes: Sequence[Shape], ranks: int, ep: int) -> int:
    """Returns the bytes of one moment on a rank, of parameters whose state `ranks` share."""
    return sum(4 * numel(some) // over for some, over in by_ranks(shapes, ranks, ep))


def _zero(shapes: Sequence[Shape], ranks: int, engine: EngineConfig, muon: Sequence[Shape] = ()) -> States:
    value, total = value_bytes(engine), numel(shapes)
    weights, gradients, state = zero_bytes(total, engine.zero_stage, ranks, engine.precision)
    gathered = 0
    if engine.zero_stage in (1, 2):  # at ZeRO stage 1, too, gradients of other ranks' parameters are dropped
        gradients = value * _most_touched(optimizer_groups(shapes, muon), ranks)
    elif engine.zero_stage == 3:
        kept = numel(shape for shape in shapes if math.prod(shape) <= PERSISTENT)
        weights += value * kept if ranks > 1 else 0  # a single rank has them whole anyway
        gathered = value * min(total - kept, REUSE)
    return States(weights, gradients, state, gathered, max(0, value * total - gradients))


def _of_adapters(shapes: Sequence[Shape], parallel: ParallelConfig, engine: EngineConfig) -> States:
    if engine.backend == "deepspeed":
        return _zero(shapes, parallel.dp_replicate * parallel.dp_shard * parallel.cp, engine)
    own = sum(-(-shape[0] // (parallel.dp_shard * parallel.cp)) * math.prod(shape[1:]) for shape in shapes)
    total = numel(shapes)
    return States(4 * own, 4 * own, 8 * own, value_bytes(engine) * total, 4 * (total - own))


def _most_touched(groups: Sequence[Sequence[Shape]], ranks: int) -> int:
    """Returns the elements of the parameters that ZeRO stages 1 and 2 give a rank a part of, for the rank with most: it
    holds their gradients whole.

    The parameters of an optimizer group are concatenated and split into equal runs.
    """
    changes: Counter[int] = Counter()  # of the total, at the ranks where it changes
    for group in groups:
        run, start = max(1, -(-numel(group) // (2 * ranks)) * 2), 0  # 0 where tp x ep is more than the experts
        for shape in group:
            size = math.prod(shape)
            changes[start // run] += size
            changes[(start + size - 1) // run + 1] -= size
            start += size
    return max(accumulate(changes[rank] for rank in sorted(changes)), default=0)


def _fsdp(
    model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, accumulation: float, pp_rank: int
) -> States:
    """Returns the states under FSDP2, which holds fp32 shards of everything.

    Whole are all weights, or with `reshard` those outside blocks and of two blocks (the next one is prefetched).
    Gradients are whole in fp32 while they accumulate, else for one block in compute precision.
    """
    ranks, value = parallel.dp_shard * parallel.cp, value_bytes(engine)
    stages = plan_stages(model, parallel).stages_of(pp_rank)
    units = [unit for stage in stages for unit in stage_units(model, parallel, stage)]
    total, block = sum(map(numel, units)), max(map(numel, units[:-1]))  # the last one is what is not in blocks
    shared = [(some, over) for unit in units for some, over in by_ranks(unit, ranks, parallel.ep)]
    own = sum(-(-shape[0] // over) * math.prod(shape[1:]) for some, over in shared for shape in some)
    resharded = engine.reshard and parallel.pp == 1
    gathered = min(total, numel(units[-1]) + 2 * block) if resharded else total
    accumulates = accumulation > 1 or parallel.pp > 1
    unreduced = 4 * (total - own) if accumulates else value * block
    return States(4 * own, 4 * own, 8 * own, gathered * value, unreduced)
