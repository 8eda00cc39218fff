"""Prints plans: what each stage of a document will need, a line for each figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.ramp import Phase, phases
from llmtrain.config.recipes import Recipe, StepSize, planned_command, planned_recipes, recipe_of
from llmtrain.config.schema import Config, RunConfig, TrainConfig
from llmtrain.rules.case import Earlier
from llmtrain.rules.check import planned_stages, planned_violations
from llmtrain.scaling.plan import Plan, bubble_share, plan, rollout_workers
from llmtrain.scaling.speed import WAIT, fit_line, hardware_line, parts_of, speed_lines
from llmtrain.scaling.stages import SAMPLING, sampling_lines
from llmtrain.scaling.turnlines import step_lines, traffic_lines, turn_lines
from llmtrain.scaling.turns import heaviest, other_models, takes_turns, turns_of, unplanned, waits
from llmtrain.scaling.turntime import Job, step_of_turns
from llmtrain.scaling.units import gigabytes

MOMENTS = {
    "forward": "the forward",
    "head": "the head's backward",
    "block": "the last block's backward",
    "last": "the first block's backward",
    "update": "the update",
}
"""Maps moments of `scaling.memory` to words."""


def main(config: Config) -> None:
    """Prints the plan of a stage, or of every stage of a run. Raises ValueError when some cannot be planned,
    after the plans of the others; weights that are not there yet are no fault of the document, and said in its place.
    """
    each_stage(config, Stage.title, lambda stage: print("\n".join(f"  {line}" for line in lines_of(stage))))


class Stage(NamedTuple):
    """Holds a stage of a document: its command, the recipe of one that trains, and what it starts with."""

    command: str
    recipe: Recipe | None
    config: Config
    ranks: int
    earlier: Earlier

    def title(self) -> str:
        """Returns the name of the stage, and what it is."""
        return f"{self.config.name} ({self.command})"

    def comes_yet(self, error: ValueError) -> bool:
        """Tells whether all that is wrong is its model, which is not there yet, and of which no stage before says what
        it will be."""
        start = self.config.model.init_from
        try:
            resolve_model(self.config.model, self.earlier)
        except ValueError as missing:
            return start is not None and not os.path.exists(start) and str(missing) == str(error)
        return False


def each_stage(config: Config, title: Callable[[Stage], str], tell: Callable[[Stage], None]) -> None:
    """Prints the title of each stage of a document and has it told. Raises ValueError with the faults of all behind the
    last one; a stage whose model is not there yet has none."""
    faults: list[str] = []
    for stage in planned(config):
        print(title(stage), flush=True)
        try:
            tell(stage)
        except ValueError as error:
            said, coming = str(error).splitlines(), stage.comes_yet(error)
            told = ["cannot be planned yet", *said] if coming else ["cannot be planned"]
            print("\n".join(f"  {line}" for line in told), flush=True)
            faults += [] if coming else [f"{stage.title()}: {line}" for line in said]
    if faults:
        raise ValueError("\n".join(faults))


def lines_of(stage: Stage) -> list[str]:
    """Returns the plan of a stage. Raises ValueError with a line for each rule that it breaks, files apart."""
    if stage.recipe is None and stage.command not in SAMPLING:
        return ["neither trains nor samples, and is not planned"]
    model = resolve_model(stage.config.model, stage.earlier)
    if broken := planned_violations(stage.config, model, stage.ranks, stage.command, stage.earlier):
        raise ValueError("\n".join(broken))
    if stage.recipe is None:
        return sampling_lines(stage.command, stage.config, model, stage.ranks)
    found = plan(stage.config, stage.ranks, stage.recipe, stage.earlier)
    return describe(stage.config, found, stage.recipe, stage.earlier)


def planned(config: Config) -> Iterator[Stage]:
    """Yields every stage of a run, or what a document of one stage may be for."""
    if isinstance(config, RunConfig):
        for stage, staged, earlier in planned_stages(config):
            yield Stage(stage.command, recipe_of(stage.command, staged), staged, stage.ranks, earlier)
    elif (command := planned_command(config)) is not None:
        yield Stage(command, None, config, _ranks_of(command, config), {})
    else:
        for recipe in planned_recipes(config):
            ranks = config.plan.gpus or _launched() or least_ranks(config, recipe)
            yield Stage(recipe.name, recipe, config, ranks, {})


def _ranks_of(command: str, config: Config) -> int:
    """Returns the ranks of a command that trains nothing. Raises ValueError where it has one and more are asked for."""
    if command == "eval":
        return config.plan.gpus or _launched() or least_ranks(config, None)
    if (config.plan.gpus or 1) > 1:
        raise ValueError(f"plan.gpus={config.plan.gpus}: {command} runs in one process; remove plan.gpus")
    return 1


def _launched() -> int | None:
    """Returns the ranks that the environment names. Raises ValueError where it names no number of them."""
    said = os.environ.get("WORLD_SIZE")
    if said is not None and not (said.isascii() and said.isdigit() and int(said) > 0):
        raise ValueError(f"WORLD_SIZE={said}: must be a positive number of ranks; unset it or set plan.gpus")
    return None if said is None else int(said)


def least_ranks(config: Config, recipe: Recipe | None) -> int:
    """Returns the smallest number of ranks that the mesh fits."""
    p, workers = config.parallel, 0 if recipe is None else rollout_workers(config, recipe)
    return p.pp * p.dp_replicate * max(1, p.dp_shard) * p.cp * p.tp + workers


def describe(config: Config, p: Plan, recipe: Recipe, earlier: Earlier) -> list[str]:
    """Returns the lines of a plan as text."""
    engine, most = config.engine, "" if recipe.fixed_batch else " at most"
    axes = " x ".join(f"{axis} {size}" for axis, size in p.mesh.items())
    others = recipe.other_models(config)
    alone = f"; of the policy alone, beside it {' and '.join(others)}" if others else ""
    active = f" ({p.active_parameters:,} active)" if p.active_parameters < p.parameters else ""
    backend = f"ZeRO {engine.zero_stage}" if engine.backend == "deepspeed" else "FSDP2"
    return [
        f"ranks        {p.ranks}: {axes}" + (f", and {p.rollout_ranks} for rollouts" if p.rollout_ranks else ""),
        f"parameters   {p.parameters:,}{active}, {p.parameters_per_rank:,} on the fullest rank before ZeRO or FSDP2",
        *_work_lines(p),
        f"batch        {_batch_line(recipe.step_size(config), p)}",
        *_phase_lines(config.train),
        _total_line(config.train, p) + most,
        f"memory       {gigabytes(p.memory_bytes)} a rank in {MOMENTS[p.memory.moment]}: {_memory_line(p)}",
        f"             by the rule of 18 bytes a parameter, all ranks hold {gigabytes(18 * p.parameters)} of states",
        f"             ({engine.precision}, {backend}, offload {engine.offload}, remat {engine.remat}{alone})",
        *_time_lines(config, p, recipe, earlier),
    ]


def _time_lines(config: Config, p: Plan, recipe: Recipe, earlier: Earlier) -> list[str]:
    """Returns the lines about messages, bubble and time: of a step, or of its turns where models take turns."""
    model = resolve_model(config.model, earlier)
    named = [] if p.hardware is None else [hardware_line(p.ranks, p.hardware)]
    if (other := unplanned(config, recipe, p.ranks, p.hardware)) is not None:
        return [f"turns        not planned: {other}", *named]
    try:
        models = other_models(config, model, recipe, earlier)
    except ValueError as error:  # a directory that a command before makes
        later = [f"turns        cannot be told yet: {line}" for line in str(error).splitlines()]
        return [*later, *named]
    if not takes_turns(recipe, models):
        return [*_sent_lines(p), *_bubble_lines(config, p), *speed_lines(config, p)]
    turns, step = turns_of(config, model, recipe, p, models), step_of_turns(Job(config, recipe, model, models, p))
    lines = [*traffic_lines(step), *turn_lines(turns), *named]
    if p.hardware is not None:
        useless = [WAIT] if waits(config, recipe) else []
        held = turns[heaviest(turns)[0]] if turns else parts_of(p)
        lines.append(fit_line(config, p.hardware, held, useless))
    return [*lines, *step_lines(config, recipe, p, step)]


def _bubble_lines(config: Config, p: Plan) -> list[str]:
    """Returns the line about the pipeline's idle time, and what it would be with equal stages where that differs."""
    if p.bubble is None:
        return []
    parallel = config.parallel
    equal = bubble_share(parallel.schedule, parallel.pp, parallel.virtual_stages, p.accumulation or 1)
    said = "" if abs(equal - p.bubble) < 0.005 else f"; with equal stages {equal:.1%}"
    return [f"bubble       {p.bubble:.1%} of the slowest rank's time{said}"]


def _work_lines(p: Plan) -> list[str]:
    """Returns the line with the FLOPs of a token."""
    w = p.work
    parts = f"{w.model - 3 * w.attention:.4g} of weights ({2 * w.passes} N), {3 * w.attention:.4g} of attention"
    return [f"work         {w.model:.4g} FLOPs a token: {parts}; with what is computed again {w.hardware:.4g}"]


def _batch_line(size: StepSize, p: Plan) -> str:
    if p.accumulation is None:
        return size.words
    return f"{size.words}, accumulation {p.accumulation:g}"


def _phase_lines(train: TrainConfig) -> list[str]:
    """Returns the lines that say where batch size and row length change; none without ramps."""
    table = phases(train)
    return [_phase_line(phase, "phases" if i == 0 else "") for i, phase in enumerate(table) if len(table) > 1]


def _phase_line(phase: Phase, title: str) -> str:
    shape = f"{phase.global_batch_seqs} x {phase.seq_len} = {phase.tokens_per_step:,} tokens a step"
    theta = "" if phase.rope_theta is None else f", rope_theta {phase.rope_theta:g}"
    factor = "" if phase.rope_scaling is None else f", rope_scaling.factor {phase.rope_scaling.factor:g}"
    return f"{title:<13}from step {phase.first_step:,}, token {phase.first_token:,}: {shape}{theta}{factor}"


def _total_line(train: TrainConfig, p: Plan) -> str:
    if train.epochs is not None:
        return f"total        {train.epochs:g} epochs, whose steps follow from the number of rows"
    return f"total        {train.steps:,} steps, {p.total_tokens:,} tokens"


def _sent_lines(p: Plan) -> list[str]:
    """Returns the line that says what a ring moves over a rank's links in a step."""
    if not p.sent_bytes:
        return []
    each = ", ".join(f"{axes} {gigabytes(size)}" for axes, size in p.sent_bytes.items())
    return [f"sent         {gigabytes(sum(p.sent_bytes.values()))} a step and rank: {each}"]


def _memory_line(p: Plan) -> str:
    parts = ("weights", "gradients", "optimizer", "buffers", "activations", "attention", "logits")
    return ", ".join(f"{part} {gigabytes(getattr(p.memory, part))}" for part in parts)
