"""Computes what a configuration will need: ranks, batch, memory of a rank, pipeline bubble. Starts nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from llmtrain.arch.hardware import hardware_of
from llmtrain.arch.mesh import mesh_sizes
from llmtrain.arch.parameters import numel
from llmtrain.arch.resolve import active_parameter_count, parameter_count, resolve_model
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.ramp import total_tokens
from llmtrain.config.recipes import Recipe, StepSize, planned_recipes
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig
from llmtrain.rules.case import Earlier
from llmtrain.scaling.communication import (
    CONTROL,
    GROUPS,
    Item,
    RankStep,
    Step,
    communication,
    evenly_loaded,
    moved_bytes,
)
from llmtrain.scaling.memory import Memory, fullest_memory, rank_states
from llmtrain.scaling.parts import rank_shapes
from llmtrain.scaling.simulate import is_simulated, simulated_bubble
from llmtrain.scaling.states import States
from llmtrain.scaling.steptime import StepTime, step_time
from llmtrain.scaling.work import Work, work_of


@dataclass(frozen=True)
class Plan:
    """Holds the resource figures of one stage of a run. Memory is that of the fullest rank, in bytes."""

    ranks: int  # trainers and what samples apart from them
    rollout_ranks: int  # that sample apart: ranks of the job, or processes that sample ahead
    mesh: dict[str, int]
    parameters: int
    active_parameters: int  # that compute one token: without experts that are not chosen
    parameters_per_rank: int  # before ZeRO
    work: Work  # of a token, in rows of `train.seq_len`
    accumulation: float | None  # microbatches a step and data-parallel rank; None in RL: they depend on lengths
    tokens_per_step: int  # at the start; in RL the most that can be sampled
    total_tokens: int
    memory: Memory  # at the fullest moment of a step
    sent_bytes: dict[str, int] | None  # a step, by mesh axes, as a ring moves them; None in RL
    bubble: float | None  # idle share of the slowest pipeline rank's time; None in RL
    hardware: HardwareConfig | None
    time: StepTime | None  # of a step at the start; None without hardware, and in RL

    @property
    def sampling_ranks(self) -> int:
        """Returns what samples, where anything does."""
        return self.rollout_ranks or self.ranks

    @property
    def memory_bytes(self) -> int:
        """Returns the sum of the parts; the caching allocator's fragments come on top."""
        return self.memory.total


def plan(
    config: Config,
    world_size: int,
    recipe: Recipe | None = None,
    earlier: Earlier | None = None,
    states: list[States] | None = None,
) -> Plan:
    """Returns the plan of a recipe on `world_size` ranks (None: the first of `planned_recipes`). `earlier`: see
    `rules.check.planned_stages`; `states`: of each pipeline rank, where they are known.

    Raises ValueError if the mesh does not fit the ranks or the model is not known yet.
    """
    model = resolve_model(config.model, earlier)
    recipe = recipe or planned_recipes(config)[0]
    workers, size = rollout_workers(config, recipe), recipe.step_size(config)
    mesh = mesh_sizes(config.parallel, world_size - workers)
    parallel = config.parallel.model_copy(update=mesh)
    accumulation = accumulation_of(config, size, mesh["dp_replicate"] * mesh["dp_shard"])
    held = states or rank_states(config, model, parallel, accumulation)
    step = None if accumulation is None else step_of(config, parallel, math.ceil(accumulation))
    work = work_of(model, config.train.seq_len, config.engine)
    bubble = None if accumulation is None else bubble_of(model, parallel, work, accumulation)
    hardware = None if config.plan.hardware is None else hardware_of(config.plan.hardware)
    timed = hardware is not None and step is not None and bubble is not None
    ahead = ahead_workers(config, recipe)
    return Plan(
        ranks=world_size + ahead,
        rollout_ranks=workers + ahead,
        mesh=mesh,
        parameters=parameter_count(model),
        active_parameters=active_parameter_count(model),
        parameters_per_rank=max(numel(rank_shapes(model, parallel, rank)) for rank in range(parallel.pp)),
        work=work,
        accumulation=accumulation,
        tokens_per_step=size.tokens,
        total_tokens=config.train.steps * size.tokens if accumulation is None else total_tokens(config.train),
        memory=fullest_memory(config, model, parallel, accumulation, held),
        sent_bytes=None if step is None else sent_bytes(config, model, parallel, step),
        bubble=bubble,
        hardware=hardware,
        time=step_time(model, parallel, config.engine, step, max(held, key=sum), bubble, hardware) if timed else None,
    )


def step_of(config: Config, parallel: ParallelConfig, microbatches: int) -> Step:
    """Returns the work of a rank in a step at the start of the run, of full rows. Every token is trained. Where
    microbatches hold so many tokens, they have no more rows than the step deals out."""
    train = config.train
    rows = train.micro_batch_seqs
    if train.micro_batch_tokens is not None:
        dealt = math.ceil(train.global_batch_seqs / (parallel.dp_replicate * parallel.dp_shard * microbatches))
        rows = max(1, min(train.micro_batch_tokens // train.seq_len, dealt))
    tokens = microbatches * rows * train.seq_len // parallel.cp
    return Step(microbatches, rows, train.seq_len, tokens, int(config.data.mask_documents))


def bubble_of(model: ModelConfig, parallel: ParallelConfig, work: Work, accumulation: float) -> float:
    """Returns the idle share of a step over the time of its slowest rank: simulated with stages as uneven as they are,
    or that of equal ones for schedules that are not simulated."""
    microbatches = math.ceil(accumulation)
    if parallel.pp > 1 and is_simulated(parallel, microbatches):
        return simulated_bubble(model, parallel, work, microbatches)
    return bubble_share(parallel.schedule, parallel.pp, parallel.virtual_stages, accumulation)


def accumulation_of(config: Config, size: StepSize, dp: int) -> float | None:
    """Returns the microbatches a step and data-parallel rank, of full rows; None where lengths decide."""
    if size.seqs is None:
        return None
    train = config.train
    if train.micro_batch_tokens is not None:  # full rows, or fewer
        return float(max(config.parallel.pp, math.ceil(size.tokens / (train.micro_batch_tokens * dp))))
    return size.seqs / (train.micro_batch_seqs * dp)


def rollout_workers(config: Config, recipe: Recipe) -> int:
    """Returns the ranks of the job that only generate."""
    return config.rollout.workers if recipe.samples and config.rollout.placement == "separate" else 0


def ahead_workers(config: Config, recipe: Recipe) -> int:
    """Returns the processes beside the job that sample ahead, each on a GPU of its own."""
    r = config.rollout
    return r.workers if recipe.samples and r.placement == "ahead" and r.replay is None else 0


def sent_bytes(config: Config, model: ModelConfig, parallel: ParallelConfig, step: Step) -> dict[str, int]:
    """Returns the bytes by mesh axes (of more than one rank) that the busiest pipeline rank moves."""
    rank_steps = (RankStep(model, parallel, config.engine, step, rank) for rank in range(parallel.pp))
    items = max((communication(evenly_loaded(rank_step)) for rank_step in rank_steps), key=moved_bytes)
    return by_axes(items, parallel)


def by_axes(items: Iterable[Item], parallel: ParallelConfig) -> dict[str, int]:
    """Returns the bytes that items move, by the mesh axes (of more than one rank) of their groups."""
    found: dict[str, list[Item]] = {}
    for item in items:
        if item.what not in CONTROL:
            axes = ["ep"] if item.axis == "ep" else [axis for axis in GROUPS[item.axis] if getattr(parallel, axis) > 1]
            found.setdefault(" x ".join(axes), []).append(item)
    return {axes: moved_bytes(group) for axes, group in found.items()}


def bubble_share(schedule: str, pp: int, virtual_stages: int, microbatches: float) -> float:
    """Returns the idle share of a step over the ideal time, from the start of the first rank to the end of the last.

    Pipeline stages are taken to be equal, and forward, input gradient and weight gradient to take equally long. 1F1B
    and interleaved: (P - 1) / (v m), arXiv 2104.04473, section 2.2. With a zero bubble weight gradients fill two thirds
    of it, arXiv 2401.10241, table 2 (ZB-H1); ZBV does so from 2 P - 1 microbatches on.
    """
    ideal = 3 * virtual_stages * max(1.0, microbatches)  # in units of a pipeline stage's forward
    idle = {
        "1f1b": 3 * (pp - 1),
        "interleaved_1f1b": 3 * (pp - 1),
        "interleaved_zero_bubble": pp - 1,
        "zbv": max(pp - 1, 4 * pp - 2 - 2 * microbatches),
    }
    return idle[schedule] / ideal
