"""Reads what a run measured beside its training (`eval.every_steps`) in its metrics, for the curves of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain.config.recipes import Panel

PREFIX = "eval/"  # of the names in metrics.jsonl
PASS = re.compile(rf"{PREFIX}pass@(\d+)")


def evaluation_panels(metrics: Sequence[Mapping[str, Any]]) -> tuple[Panel, ...]:
    """Returns the panels of an evaluation over the steps: pass@k for each k that was measured, and the loss."""
    found = {int(match[1]): name for record in metrics for name in record if (match := PASS.fullmatch(name))}
    solved = {found[k]: f"pass@{k}" for k in sorted(found)}
    return (
        ("Share of held-out problems solved", solved),
        ("Loss on held-out text, nats a token", {f"{PREFIX}loss": "evaluated"}),
    )


def start_levels(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns what was measured before the first step, by its name in metrics.jsonl: the level of the model that the
    run starts from. Nothing where that was not measured."""
    starts = (record for record in metrics if record["step"] == 0)
    return {
        name: value
        for name, value in next(starts, {}).items()
        if name.startswith(PREFIX) and isinstance(value, int | float)
    }
