"""Shows what evaluations of tasks found: tables with intervals, and the curves of pass@k over k."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from llmtrain.observe.plots import Passes, plot_passes

HELD_OUT = "data.held_out"
PLOT = "evaluation-passes.png"
DIGITS = {"entropy": 3, "tokens": 1, "cut_off": 3, "problems": 0, "reward_errors": 0}  # of what has no interval


def task_tables(evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Returns a table for each task, and behind them each of the lm-evaluation-harness, with a row for each model that
    was measured on it: shares as `0.513 (0.44 to 0.58)`, the harness's measures under its own names."""
    measured = {label: {**e.get("tasks", {}), **_harness(e)} for label, e in evaluated.items()}
    names = dict.fromkeys(name for e in evaluated.values() for name in e.get("tasks", {}))
    names |= dict.fromkeys(name for own in measured.values() for name in own)
    return {name: _rows({label: own[name] for label, own in measured.items() if name in own}) for name in names}


def _harness(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {f"lm_eval: {name}": own for name, own in evaluation.get("lm_eval", {}).get("tasks", {}).items()}


def text_tables(evaluated: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns a row for each source and model, where an evaluation measured several sources."""
    return [
        {"source": source, "model": label, **{key.replace("_", " "): f"{value:,.3f}" for key, value in own.items()}}
        for label, e in evaluated.items()
        if len(e.get("text", {})) > 1
        for source, own in e["text"].items()
    ]


def _rows(measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns one row a model; all rows have the columns that any of them needs."""
    names = list(dict.fromkeys(n for each in measured.values() for n in each if n != "interval"))
    return [
        {"model": label} | {name.replace("_", " "): _shown(each, name) for name in names}
        for label, each in measured.items()
    ]


def _shown(measures: Mapping[str, Any], name: str) -> str:
    value, ends = measures.get(name), measures.get("interval", {}).get(name)
    if value is None:
        return "–"
    if name == "version" or isinstance(value, str):
        return str(value)
    if ends is None:
        return f"{value:,.{DIGITS.get(name, 3)}f}"
    return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def pass_curves(evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Passes]]:
    """Returns by task, and by model, the points (k, pass@k, low, high) where there are two or more; those of
    `eval.problems` under "data.held_out"."""
    curves: dict[str, dict[str, Passes]] = {}
    for label, evaluation in evaluated.items():
        for name, measures in {HELD_OUT: evaluation, **evaluation.get("tasks", {})}.items():
            if len(points := _passes(measures)) > 1:
                curves.setdefault(name, {})[label] = points
    return curves


def _passes(measures: Mapping[str, Any]) -> Passes:
    """Returns the points in the order of k; an evaluation of an earlier version has no intervals."""
    found = sorted((int(n.split("@")[1]), n) for n, v in measures.items() if n.startswith("pass@") and v is not None)
    ends = measures.get("interval", {})
    return [(k, measures[name], *ends.get(name, (measures[name], measures[name]))) for k, name in found]


def passes_image(out: str, evaluated: Mapping[str, Mapping[str, Any]]) -> dict[str, str] | None:
    """Draws the curves over k, a panel for each task; returns None if there is none."""
    curves = pass_curves(evaluated)
    if not curves:
        return None
    plot_passes(os.path.join(out, PLOT), curves)
    return {"file": PLOT, "alt": "pass@k over k: " + ", ".join(curves)}
