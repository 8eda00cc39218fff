"""Searches the layouts that the rules accept for those that fit a GPU's memory and make the shortest step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmtrain.arch.hardware import hardware_of
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.ramp import phases, with_phase
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig
from llmtrain.rules.case import Case, Earlier
from llmtrain.rules.check import layout_violations
from llmtrain.scaling.activations import activation_bytes, kept_layers, logits_bytes
from llmtrain.scaling.attention import attention_bytes
from llmtrain.scaling.plan import accumulation_of, bubble_of, fullest_states, step_of
from llmtrain.scaling.states import States
from llmtrain.scaling.steptime import step_time
from llmtrain.scaling.work import work_of

LEAST_TOKENS = 2048  # of a row on one context-parallel rank: with fewer, messages cost more than they spare
SHARDED = (8, 64, 512)  # ranks that FSDP2 shards over where more ranks are copies of each other
MICRO = (1, 2, 4, 8)  # rows of a microbatch
VIRTUAL = (2, 4, 7)  # pipeline stages a rank of interleaved schedules
STAGES = (1, 3)  # of ZeRO: at stage 2 DeepSpeed holds and sends what it does at 1, see `scaling.states`
REMAT = ("none", "selective", "full")  # from the fastest to the smallest
NEAREST = 30  # layouts that do not fit and are timed all the same


@dataclass(frozen=True)
class Layout:
    """Holds a layout with its figures: bytes of the fullest rank and seconds of a step."""

    config: Config
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """Holds what a search found: layouts that fit, the fastest first, and the fastest of the NEAREST that do not."""

    best: list[Layout]
    misfit: Layout | None
    smallest: Layout | None  # of those that do not fit
    refused: int  # by the rules
    tried: int


def search(config: Config, recipe: Recipe, ranks: int, earlier: Earlier | None = None) -> Found:
    """Returns the layouts of `ranks` GPUs for the document's model, batch, engine and precision.

    Pipelines have 1F1B or interleaved schedules. Raises ValueError where no hardware is named, or a step has no number
    of rows that the document gives.
    """
    _check(config, recipe)
    model, hardware = resolve_model(config.model, earlier), hardware_of(config.plan.hardware)
    room = (hardware.memory_gb - config.plan.reserve_gb) * 1e9
    cache: dict[tuple, States] = {}
    fitting: list[Layout] = []
    misfits: list[tuple[int, Config]] = []
    refused = tried = 0
    for variants in _layouts(config, model, hardware, ranks):
        for candidate in variants:  # from the fastest to the smallest
            tried += 1
            if _refused(candidate, model, recipe, ranks, earlier or {}):
                refused += 1
                continue
            size = _memory(candidate, model, recipe, cache)
            if size <= room:
                fitting.append(_timed(candidate, model, recipe, size, hardware, cache))
                break
            misfits.append((size, candidate))
    misfits.sort(key=lambda misfit: misfit[0])
    near = [_timed(each, model, recipe, size, hardware, cache) for size, each in misfits[:NEAREST]]
    best = sorted(fitting, key=lambda layout: (layout.seconds, layout.memory_bytes))
    fastest = min(near, key=lambda layout: layout.seconds, default=None)
    return Found(best, fastest, near[0] if near else None, refused, tried)


def _check(config: Config, recipe: Recipe) -> None:
    if config.plan.hardware is None:
        raise ValueError("plan.hardware=null: must be set for --search, which compares times; choose a100, h100, ...")
    if (tokens := config.train.micro_batch_tokens) is not None:
        raise ValueError(f"train.micro_batch_tokens={tokens}: not with --search, which chooses rows; remove it")
    if not recipe.fixed_batch:
        raise ValueError(
            f"--search: not for {recipe.name}, whose microbatches follow from the lengths of samples; search for the "
            "same model in a document that trains on given rows"
        )


def _layouts(config: Config, model: ModelConfig, hardware: HardwareConfig, ranks: int) -> Iterator[list[Config]]:
    """Yields lists of candidates that differ in recomputation only."""
    train = config.train
    for tp in _divisors(math.gcd(ranks, model.num_heads), hardware.gpus_per_node):
        for pp in _divisors(ranks // tp, model.num_layers):
            for cp in _divisors(ranks // (tp * pp), max(1, train.seq_len // LEAST_TOKENS)):
                dp = ranks // (tp * pp * cp)
                for micro in MICRO:
                    count, left = divmod(train.global_batch_seqs, micro * dp)
                    if left or count < pp:
                        continue
                    axes = {"tp": tp, "pp": pp, "cp": cp}
                    yield from _of_mesh(config, model, axes, dp, micro)


def _of_mesh(config: Config, model: ModelConfig, axes: dict[str, int], dp: int, micro: int) -> Iterator[list[Config]]:
    """Yields the candidates of a mesh: experts, copies, schedules and engines."""
    experts = model.moe.num_experts if model.moe else 1
    train = config.train.model_copy(update={"micro_batch_seqs": micro})
    for ep in _divisors(math.gcd(experts, dp * axes["cp"]), experts):
        for copies in _copies(config, dp):
            for schedule in _schedules(model, axes["pp"]):
                sizes = {**axes, "ep": ep, "dp_shard": dp // copies, "dp_replicate": copies}
                parallel = config.parallel.model_copy(update={**sizes, **schedule, "stage_layers": None})
                for engine in _engines(config):
                    base = {"parallel": parallel, "train": train}
                    yield [
                        config.model_copy(
                            update={**base, "engine": config.engine.model_copy(update={**engine, "remat": remat})}
                        )
                        for remat in REMAT
                    ]


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def _copies(config: Config, dp: int) -> list[int]:
    """Returns the numbers of copies of sharded states; DeepSpeed shards over all data-parallel ranks."""
    if config.engine.backend == "deepspeed":
        return [1]
    return [1, *(dp // shard for shard in SHARDED if shard < dp and dp % shard == 0)]


def _schedules(model: ModelConfig, pp: int) -> list[dict[str, Any]]:
    """Returns the schedules of a pipeline: 1F1B, and interleaved ones."""
    plain = {"schedule": "1f1b", "virtual_stages": 1}
    if pp == 1:
        return [plain]
    more = [v for v in VIRTUAL if pp * v <= model.num_layers]
    return [plain, *({"schedule": "interleaved_1f1b", "virtual_stages": v} for v in more)]


def _engines(config: Config) -> list[dict[str, Any]]:
    if config.engine.backend == "fsdp":
        return [{"reshard": reshard} for reshard in (False, True)]
    return [{"zero_stage": stage} for stage in STAGES]


def _refused(config: Config, model: ModelConfig, recipe: Recipe, ranks: int, earlier: Earlier) -> bool:
    """Tells whether a rule refuses the layout, in any phase of a ramp."""
    for phase in phases(config.train):
        case = Case(with_phase(config, phase), model, ranks, recipe.name, None, earlier)
        if layout_violations(case):
            return True
    return False


def _accumulation(config: Config, recipe: Recipe) -> float:
    p = config.parallel
    accumulation = accumulation_of(config, recipe.step_size(config), p.dp_replicate * p.dp_shard)
    assert accumulation is not None
    return accumulation


def _states(
    config: Config, model: ModelConfig, parallel: ParallelConfig, accumulation: float, cache: dict[tuple, States]
) -> States:
    """Returns the states of the fullest rank; they do not depend on recomputation, and on the microbatch only by
    whether there are several."""
    p, e = parallel, config.engine
    key = (p.tp, p.pp, p.ep, p.dp_shard * p.cp, p.dp_replicate, p.schedule, p.virtual_stages, e.zero_stage, e.reshard)
    key += (accumulation > 1,)
    if key not in cache:
        cache[key] = fullest_states(config, model, parallel, accumulation)
    return cache[key]


def _memory(config: Config, model: ModelConfig, recipe: Recipe, cache: dict[tuple, States]) -> int:
    """Returns the bytes of the fullest rank, as `plan` counts them."""
    parallel, accumulation = config.parallel, _accumulation(config, recipe)
    mesh = {"pp": parallel.pp, "cp": parallel.cp, "tp": parallel.tp}
    kept = activation_bytes(config, model, mesh, accumulation)
    kept += attention_bytes(config, model, mesh, kept_layers(config, model, mesh, accumulation))
    return sum(_states(config, model, parallel, accumulation, cache)) + kept + logits_bytes(config, model, mesh)


def _timed(
    config: Config,
    model: ModelConfig,
    recipe: Recipe,
    size: int,
    hardware: HardwareConfig,
    cache: dict[tuple, States],
) -> Layout:
    parallel, accumulation = config.parallel, _accumulation(config, recipe)
    step = step_of(config, parallel, math.ceil(accumulation))
    bubble = bubble_of(model, parallel, work_of(model, config.train.seq_len, config.engine), accumulation)
    states = _states(config, model, parallel, accumulation, cache)
    time = step_time(model, parallel, config.engine, step, states, bubble, hardware)
    return Layout(config, size, time.total_s)
