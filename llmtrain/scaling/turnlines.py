"""Says in lines what a step sends whose models take turns, how fast it is, and what its run costs."""

from __future__ import annotations

from llmtrain.arch.hardware import peak_flops
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config
from llmtrain.scaling.plan import Plan
from llmtrain.scaling.sampler import Turn
from llmtrain.scaling.speed import estimated, failure_lines, run_cost, spent
from llmtrain.scaling.turntime import StepOfTurns
from llmtrain.scaling.units import gigabytes


def traffic_lines(step: StepOfTurns) -> list[str]:
    """Returns the lines about microbatches, messages and the pipeline's idle time at full lengths."""
    u = step.update
    many = f"{step.updates} update" + ("s" if step.updates > 1 else "")
    lines = [f"microbatches {u.microbatches} of {u.rows} x {u.tokens} tokens a rank in each of {many}, at full lengths"]
    for turn, axes in step.sent_bytes.items():
        title = "" if len(lines) > 1 else "sent"
        each = ", ".join(f"{axis} {gigabytes(size)}" for axis, size in axes.items())
        lines.append(f"{title:<13}{gigabytes(sum(axes.values()))} a step and rank, {turn}: {each}")
    scoring = "" if step.scoring_bubble is None else f", {step.scoring_bubble:.1%} in scoring"
    return [*lines, f"bubble       {step.bubble:.1%} of the slowest rank's time in updates{scoring}"]


def turn_lines(turns: dict[str, Turn]) -> list[str]:
    """Returns the lines about the memory of each turn, the heaviest first."""
    lines = []
    for name, turn in sorted(turns.items(), key=lambda entry: -sum(entry[1].values())):
        parts = ", ".join(f"{part} {gigabytes(size)}" for part, size in turn.items())
        first = " (the heaviest)" if not lines and len(turns) > 1 else ""
        lines.append(f"{'' if lines else 'turns':<13}{name} {gigabytes(sum(turn.values()))}{first}: {parts}")
    return lines


def step_lines(config: Config, recipe: Recipe, p: Plan, step: StepOfTurns) -> list[str]:
    """Returns the lines about the time of a step and of the run, all lengths being the longest; none without
    hardware."""
    if p.hardware is None:
        return []
    run = config.train.steps * step.total_s
    each = ", ".join(f"{name} {value:.3g}" for name, value in step.seconds.items())
    each = f"the longer of {each.replace(', ', ' and ', 1)}" if step.ahead else each
    parts = [f"{'':<13}{name} {time.total_s:.3g} s: {spent(time)}" for name, time in step.parts.items()]
    rate = recipe.step_size(config).tokens / step.total_s
    made = "sampled" if "sampling" in step.seconds else "trained"
    shares = f"MFU {update_mfu(config, p, step):.1%} of updates, {step_mfu(config, p, step):.1%} of the step"
    return [
        f"step         {step.total_s:.3g} s at full lengths: {each} {estimated(config)}",
        *parts,
        f"speed        {rate:,.0f} tokens/s {made}, {shares}",
        f"run          {run_cost(config, p, run)}, at full lengths",
        *failure_lines(config, p, run),
    ]


def update_mfu(config: Config, p: Plan, step: StepOfTurns) -> float:
    """Returns the share of the trainers' peak that the models' own FLOPs reach while they are updated."""
    assert p.hardware is not None
    peak = peak_flops(p.hardware, config.engine.precision)
    return step.trained_flops / (step.seconds["updating"] * (p.ranks - p.rollout_ranks) * peak)


def step_mfu(config: Config, p: Plan, step: StepOfTurns) -> float:
    """Returns the share of the peak of all ranks that the FLOPs of the updates are, over the time of the whole step."""
    assert p.hardware is not None
    return step.trained_flops / (step.total_s * p.ranks * peak_flops(p.hardware, config.engine.precision))
