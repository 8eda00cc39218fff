"""Implements `llmtrain scaling`: fits laws to the results of runs, prints them, and writes scaling.json and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmtrain.commands.scaling_plots import plot_isoflops, plot_optima, plot_rewards
from llmtrain.config.load import dump
from llmtrain.config.schema import Config
from llmtrain.observe.log import make_run_dir
from llmtrain.observe.rows import own_directory
from llmtrain.scaling.laws.fit import fit_losses, fit_rewards, kept
from llmtrain.scaling.laws.read import read_columns, read_points

COMMAND = "llmtrain scaling"
FILES = ("config.yaml", "scaling.json", "isoflops.png", "optima.png", "rewards.png")


def main(config: Config) -> None:
    """Writes scaling.json, plots and config.yaml into the run directory, and prints tables.

    Raises ValueError for a file or points that no law can be fitted to, and when the directory holds a run that trains.
    """
    make_run_dir(config.directory)
    with own_directory(config.directory, COMMAND, FILES) as directory:
        result = _rewards(config, directory) if "sigmoid" in config.scaling.method else _losses(config, directory)
        (directory / "config.yaml").write_text(dump(config), encoding="utf-8")
        (directory / "scaling.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    console = Console()
    for table in tables(result):
        console.print(table)
    for warning in warnings_of(result):
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {config.directory}", markup=False, highlight=False, soft_wrap=True)


def _losses(config: Config, directory: Path) -> dict[str, Any]:
    points = read_points(config.scaling.points, config.scaling.fields)
    result = fit_losses(points, config.scaling, config.seed)
    points, _ = kept(points, config.scaling.min_tokens_per_param)
    plot_isoflops(str(directory / "isoflops.png"), points, result, config.scaling.axis)
    plot_optima(str(directory / "optima.png"), result)
    return result


def _rewards(config: Config, directory: Path) -> dict[str, Any]:
    columns = read_columns(config.scaling.points, ("flops", "reward"), config.scaling.fields)
    result = fit_rewards(columns, config.scaling, config.seed)
    plot_rewards(str(directory / "rewards.png"), columns, result, config.scaling.fields.get("flops", "FLOPs"))
    return {"methods": {"sigmoid": result}}


def warnings_of(result: dict[str, Any]) -> Iterator[str]:
    """Yields what is doubtful about the fits, and which methods found none."""
    yield from (f"{method}: no law: {reason}" for method, reason in result.get("failed", {}).items())
    for method, found in result["methods"].items():
        yield from (f"{method}: {each}" for each in found["warnings"])
    for method, found in result.get("held_out", {}).get("methods", {}).items():
        if "reason" in found:
            yield f"held out: {method} predicts nothing: {found['reason'].splitlines()[0]}"


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yields the tables that a person reads."""
    yield _parameters(result["methods"])
    optima = {name: each for name, each in result["methods"].items() if "params" in each}
    if optima:
        yield _laws(optima)
        yield _best(optima, result["budgets"][-1])
    if "held_out" in result:
        yield _held_out(result["held_out"])
    targets = result["methods"].get("sigmoid", {}).get("targets")
    if targets:
        rows = [[f"{each['flops']:.4g}", _with(each["reward"], each["interval"])] for each in targets]
        yield _table("Reward at the targets", ["FLOPs", "reward"], rows)


def _parameters(methods: dict[str, Any]) -> Table:
    rows = []
    for method, found in methods.items():
        intervals = found.get("intervals", {})
        numbers = {name: value for name, value in found["fit"].items() if isinstance(value, float)}
        rows += [[method, name, _with(value, intervals.get(name))] for name, value in numbers.items()]
    return _table("Fits", ["method", "parameter", "value (95 %)"], rows)


def _laws(methods: dict[str, Any]) -> Table:
    rows = [
        [
            method,
            name,
            f"{found[axis]['coefficient']:.4g}",
            _with(found[axis]["exponent"], found[axis]["exponent_interval"]),
        ]
        for method, found in methods.items()
        for axis, name in (("params", "N*"), ("tokens", "D*"))
    ]
    return _table(
        "Best size N* and tokens D* = coefficient x FLOPs^exponent",
        ["method", "", "coefficient", "exponent (95 %)"],
        rows,
    )


def _best(methods: dict[str, Any], least: float) -> Table:
    """Returns the best sizes of the largest budget and of the targets; scaling.json has those of all budgets."""
    rows = [
        [f"{params['flops']:.4g}", method, *(_with(each["value"], each["interval"]) for each in (params, tokens))]
        for method, found in methods.items()
        for params, tokens in zip(found["params"]["best"], found["tokens"]["best"], strict=True)
        if params["flops"] >= least
    ]
    rows.sort(key=lambda row: float(row[0]))
    return _table("Largest budget and targets", ["FLOPs", "method", "N* (95 %)", "D* (95 %)"], rows)


def _held_out(found: dict[str, Any]) -> Table:
    rows = []
    for method, each in found["methods"].items():
        if "reason" in each:
            continue
        key = next(key for key in each if key.startswith(("best_", "loss")))
        real = each[f"real_{key}"]
        words = ["none", ""] if real is None else [f"{real:.4g}", f"{each['error']:+.2%}"]
        rows.append([method, key.replace("_", " "), f"{each[key]:.4g}", *words])
    title = f"The largest budget, {found['flops']:.4g} FLOPs, from the others"
    return _table(title, ["method", "what", "predicted", "real", "error"], rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _with(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.4g}" if interval is None else f"{value:.4g} ({interval[0]:.3g} to {interval[1]:.3g})"
