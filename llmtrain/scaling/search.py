"""Searches the layouts that the rules accept for those that fit a GPU's memory and make the shortest step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmtrain.arch.hardware import hardware_of
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.rules.case import Earlier
from llmtrain.rules.check import SHAPE_RULES, planned_violations
from llmtrain.scaling.memory import fullest_memory, rank_states
from llmtrain.scaling.plan import Plan, accumulation_of, ahead_workers, bubble_of, plan, rollout_workers, step_of
from llmtrain.scaling.sampler import Sampler, Turn, sampler_in_step
from llmtrain.scaling.speed import APART, fit_line, room_bytes
from llmtrain.scaling.states import States
from llmtrain.scaling.steptime import step_time
from llmtrain.scaling.turns import Models, heaviest, other_models, takes_turns, turns_of, unplanned
from llmtrain.scaling.turntime import Job, step_seconds, turn_seconds
from llmtrain.scaling.work import work_of

LEAST_TOKENS = 2048  # of a row on one context-parallel rank: with fewer, messages cost more than they spare
SHARDED = (8, 64, 512)  # ranks that FSDP2 shards over where more ranks are copies of each other
MICRO = (1, 2, 4, 8)  # rows of a microbatch
VIRTUAL = (2, 4, 7)  # pipeline stages a rank of interleaved schedules
STAGES = (1, 3)  # of ZeRO: at stage 2 DeepSpeed holds and sends what it does at 1, see `scaling.states`
WORKERS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # shares of the ranks that only sample, where they do not train too
REMAT = ("none", "selective", "full")  # from the fastest to the smallest
NEAREST = 30  # layouts that do not fit and are timed all the same


@dataclass(frozen=True)
class Layout:
    """Holds a layout with its figures: bytes of the fullest rank, in its heaviest turn, and seconds of a step."""

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
    rules: list[str]  # that refuse every layout


@dataclass(frozen=True)
class Document:
    """Holds what is searched for: `model` is resolved, as are the `models` beside it."""

    config: Config
    recipe: Recipe
    model: ModelConfig
    models: Models
    hardware: HardwareConfig
    ranks: int
    earlier: Earlier
    states: dict[tuple, list[States]] = field(default_factory=dict)  # of layouts that were met

    @property
    def turned(self) -> bool:
        """Tells whether models take turns, whose lengths are not known."""
        return takes_turns(self.recipe, self.models)


def document_of(config: Config, recipe: Recipe, ranks: int, earlier: Earlier | None = None) -> Document:
    """Returns what is to be searched. Raises ValueError where no hardware is named, rows are given by tokens, or a
    model of the job is not there yet."""
    if config.plan.hardware is None:
        raise ValueError("plan.hardware=null: must be set for --search, which compares times; choose a100, h100, ...")
    if (tokens := config.train.micro_batch_tokens) is not None:
        raise ValueError(f"train.micro_batch_tokens={tokens}: not with --search, which chooses rows; remove it")
    model, hardware = resolve_model(config.model, earlier), hardware_of(config.plan.hardware)
    models = other_models(config, model, recipe, earlier or {})
    if (other := unplanned(config, recipe, ranks + ahead_workers(config, recipe), hardware)) is not None:
        raise ValueError(f"--search: {other}")
    return Document(config, recipe, model, models, hardware, ranks, earlier or {})


def search(document: Document) -> Found:
    """Returns the layouts of the GPUs for the document's model, batch, engine and precision; where it samples also with
    rollout workers of their own. Pipelines have 1F1B or interleaved schedules.

    Raises ValueError where what samples does not fit by itself, which no layout changes.
    """
    tries = Tries(document)
    for placed, ranks in _roomy(document):
        for variants in _layouts(document, placed, ranks):
            tries.add(variants)
    near = [_timed(document, config, size) for size, config in _nearest(document, tries.misfits)]
    best = sorted(tries.fitting, key=lambda layout: (layout.seconds, layout.memory_bytes))
    fastest = min(near, key=lambda layout: layout.seconds, default=None)
    return Found(best, fastest, near[0] if near else None, tries.refused, tries.tried, tries.rules or [])


class Tries:
    """Collects what becomes of candidates."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.room = room_bytes(document.config, document.hardware, 0)
        self.fitting: list[Layout] = []
        self.misfits: list[tuple[int, Config]] = []  # with the least that they take
        self.refused = self.tried = 0
        self.rules: list[str] | None = None  # that refuse all so far

    def add(self, variants: list[Config]) -> None:
        """Tries candidates that differ in recomputation only, from the fastest to the smallest, until one fits. Where
        what they all hold is too much, only the smallest is looked at."""
        least = _least_bytes(self.document, variants[-1])
        for candidate in variants[-1:] if least > self.room else variants:
            if self._refuses(candidate):
                continue
            size = least if least > self.room else _memory(self.document, candidate)
            if size <= self.room:
                self.fitting.append(_timed(self.document, candidate, size))
                break
            self.misfits.append((size, candidate))

    def _refuses(self, candidate: Config) -> bool:
        """Tells whether a rule refuses the candidate, and counts it."""
        broken = _refusals(self.document, candidate)
        self.rules = broken if self.rules is None else [line for line in self.rules if line in broken]
        self.tried += 1
        self.refused += bool(broken)
        return bool(broken)


def _nearest(document: Document, misfits: list[tuple[int, Config]]) -> list[tuple[int, Config]]:
    """Returns the NEAREST candidates that fail to fit by least, with their bytes, the smallest first."""
    near: list[tuple[int, Config]] = []
    for least, config in sorted(misfits, key=lambda misfit: misfit[0]):
        if len(near) == NEAREST and least >= near[-1][0]:
            break
        near = sorted([*near, (_memory(document, config), config)], key=lambda each: each[0])[:NEAREST]
    return near


def _roomy(document: Document) -> list[tuple[Config, int]]:
    """Returns the placements in which what samples fits by itself."""
    hardware, found, least = document.hardware, [], None
    for placed, ranks in _placements(document):
        sampler = _sampler(document, placed)
        held = {} if sampler is None else sampler.memory()
        if room_bytes(placed, hardware, sum(held.values())) >= 0:
            found.append((placed, ranks))
        elif least is None or sum(held.values()) < sum(least.values()):
            least = held
    if not found and least is not None:
        said = fit_line(document.config, hardware, least, [APART]).removeprefix("does not fit ")
        raise ValueError(f"--search: what samples does not fit by itself, whatever the layout: {said}")
    return found


def _layouts(document: Document, placed: Config, ranks: int) -> Iterator[list[Config]]:
    """Yields lists of candidates that differ in recomputation only, with so many trainers."""
    model, longest = document.model, max(1, placed.train.seq_len // LEAST_TOKENS)
    for tp in _divisors(math.gcd(ranks, model.num_heads), document.hardware.gpus_per_node):
        for pp in _divisors(ranks // tp, model.num_layers):
            for cp in _divisors(ranks // (tp * pp), longest):
                dp = ranks // (tp * pp * cp)
                for micro in (each for each in MICRO if _divides(document, each, dp, pp)):
                    yield from _of_mesh(document, placed, {"tp": tp, "pp": pp, "cp": cp}, dp, micro)


def _placements(document: Document) -> Iterator[tuple[Config, int]]:
    """Yields the document with each number of rollout workers, 0 = the trainers sample, and the number of trainers.
    Processes that sample ahead keep their number."""
    config, ranks = document.config, document.ranks
    if _sampler(document, config) is None or config.rollout.placement == "ahead":
        yield config, ranks - rollout_workers(config, document.recipe)
        return
    for workers in sorted({0, *(int(ranks * share) for share in WORKERS)}):
        place = {"placement": "separate" if workers else "colocated", "workers": workers}
        yield config.model_copy(update={"rollout": config.rollout.model_copy(update=place)}), ranks - workers


def _divides(document: Document, micro: int, dp: int, pp: int) -> bool:
    """Tells whether a step makes whole microbatches of `micro` rows, at least one a pipeline rank; where lengths
    decide, whether an update has so many rows for a rank."""
    passes = document.recipe.passes_of(document.config)
    if document.recipe.fixed_batch:
        count, left = divmod(passes.seqs, micro * dp)
        return not left and count >= pp
    return micro == 1 or micro * dp <= passes.seqs // passes.minibatches


def _of_mesh(document: Document, config: Config, axes: dict[str, int], dp: int, micro: int) -> Iterator[list[Config]]:
    """Yields the candidates of a mesh: experts, copies, schedules and engines."""
    model = document.model
    experts = model.moe.num_experts if model.moe else 1
    train = config.train.model_copy(update={"micro_batch_seqs": micro})
    schedules = _schedules(model, axes["pp"], interleaved=document.recipe.fixed_batch)
    for ep in _divisors(math.gcd(experts, dp * axes["cp"]), experts):
        for copies in _copies(config, dp):
            for schedule in schedules:
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


def _schedules(model: ModelConfig, pp: int, interleaved: bool) -> list[dict[str, Any]]:
    """Returns the schedules of a pipeline: 1F1B, and interleaved ones, which need equal rounds of microbatches."""
    plain = {"schedule": "1f1b", "virtual_stages": 1}
    if pp == 1 or not interleaved:
        return [plain]
    more = [v for v in VIRTUAL if pp * v <= model.num_layers]
    return [plain, *({"schedule": "interleaved_1f1b", "virtual_stages": v} for v in more)]


def _engines(config: Config) -> list[dict[str, Any]]:
    if config.engine.backend == "fsdp":
        return [{"reshard": reshard} for reshard in (False, True)]
    return [{"zero_stage": stage} for stage in STAGES]


def _refusals(document: Document, config: Config) -> list[str]:
    """Returns the rules that the layout breaks."""
    d = document
    return planned_violations(config, d.model, d.ranks, d.recipe.name, d.earlier, SHAPE_RULES)


def _accumulation(document: Document, config: Config) -> float | None:
    p = config.parallel
    return accumulation_of(config, document.recipe.step_size(config), p.dp_replicate * p.dp_shard)


def _states(document: Document, config: Config) -> list[States]:
    """Returns the states of each pipeline rank; they do not depend on recomputation, and on the microbatch only by
    whether there are several."""
    p, e, accumulation = config.parallel, config.engine, _accumulation(document, config)
    key = (p.tp, p.pp, p.ep, p.dp_shard * p.cp, p.dp_replicate, p.schedule, p.virtual_stages, e.zero_stage, e.reshard)
    key += (accumulation is None or accumulation > 1,)
    if key not in document.states:
        document.states[key] = rank_states(config, document.model, p, accumulation)
    return document.states[key]


def _memory(document: Document, config: Config) -> int:
    """Returns the bytes of the fullest rank, as `plan` counts them, in the heaviest turn where there are several."""
    if (turn := heaviest_turn(document, config)) is not None:
        return sum(turn.values())
    states, accumulation = _states(document, config), _accumulation(document, config)
    return fullest_memory(config, document.model, config.parallel, accumulation, states).total


def _sampler(document: Document, config: Config) -> Sampler | None:
    """Returns what samples on a rank; None where nothing is sampled."""
    apart = rollout_workers(config, document.recipe) or ahead_workers(config, document.recipe)
    return sampler_in_step(config, document.model, document.recipe, apart or document.ranks, document.hardware)


def _least_bytes(document: Document, config: Config) -> int:
    """Returns what the fullest rank holds at least, whatever it computes again: its states in the update, and beside
    them what is left of a sampler in its place."""
    sampler = _sampler(document, config) if config.rollout.placement == "colocated" else None
    rest = 0 if sampler is None else sum(sampler.resting().values())
    return rest + max(s.weights + s.gradients + s.optimizer for s in _states(document, config))


def heaviest_turn(document: Document, config: Config) -> Turn | None:
    """Returns what a rank holds in the heaviest turn of a layout; None where the policy is alone."""
    if not document.turned:
        return None
    turns = turns_of(config, document.model, document.recipe, plan_of(document, config), document.models)
    return turns[heaviest(turns)[0]] if turns else None


def plan_of(document: Document, config: Config) -> Plan:
    """Returns the plan of a layout."""
    return plan(config, document.ranks, document.recipe, document.earlier, _states(document, config))


def _timed(document: Document, config: Config, size: int) -> Layout:
    if document.turned:
        job = Job(config, document.recipe, document.model, document.models, plan_of(document, config))
        return Layout(config, size, step_seconds(turn_seconds(job, document.hardware)[0], job.ahead))
    parallel, engine, accumulation = config.parallel, config.engine, _accumulation(document, config)
    assert accumulation is not None
    step = step_of(config, parallel, math.ceil(accumulation))
    bubble = bubble_of(document.model, parallel, work_of(document.model, config.train.seq_len, engine), accumulation)
    states = max(_states(document, config), key=sum)
    return Layout(
        config, size, step_time(document.model, parallel, engine, step, states, bubble, document.hardware).total_s
    )
