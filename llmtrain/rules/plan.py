"""Checks the section `plan`."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.arch.hardware import hardware_of, peak_flops
from llmtrain.rules.case import Case, Rules, command


def timed(case: Case) -> bool:
    """Holds for `llmtrain plan` with hardware; a run does not read it, and its machine need not have the file."""
    return case.command == "plan" and case.config.plan.hardware is not None


def _hardware(case: Case) -> Iterator[str]:
    plan = case.config.plan
    try:
        hardware = hardware_of(plan.hardware)
        peak_flops(hardware, case.config.engine.precision)
    except ValueError as error:
        yield from str(error).splitlines()
        return
    if plan.reserve_gb >= hardware.memory_gb:
        rule = f"must be below the {hardware.memory_gb:g} GB of {hardware.name}"
        yield f"plan.reserve_gb={plan.reserve_gb:g}: {rule}; lower it"


def _time(case: Case) -> Iterator[str]:
    plan = case.config.plan
    for key in ("price_per_gpu_hour", "gpu_mttf_hours") if plan.hardware is None else ():
        value = getattr(plan, key)
        if value is not None:
            yield f"plan.{key}={value:g}: needs plan.hardware, without which no time is told; set that"


def _rows(case: Case) -> Iterator[str]:
    r, rows = case.config.rollout, case.config.plan.episode_rows
    if rows is not None and r.environment is None and r.agent is None:
        yield (
            f"plan.episode_rows={rows}: is of rollout.environment and rollout.agent; without, a sample is one row; "
            "remove it"
        )


PLAN_RULES: Rules = ((timed, _hardware), (command("plan"), _time), (command("plan"), _rows))
