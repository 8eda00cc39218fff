"""Tabulates runs of configs/posttrain.yaml by their seeds: what each algorithm makes of one checkpoint, and its cost.

    for seed in 0 1 2; do bash launch/posttrain.sh seed=$seed name=posttrain-$seed; done
    python -m benchmarks.tour runs/posttrain-0 runs/posttrain-1 runs/posttrain-2 --out benchmarks/results/tour.json

Prints a table for the docs. Beside the record it draws pass@1 against samples and CPU-seconds (tour.png), and the
reward of the samples against their number (tour_curves.png).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import environment
from llmtrain.observe.plots import plot_lines, plot_marks
from llmtrain.observe.report import add_costs, evaluations, read_stages, reward_curve

MEASURES = {"pass@1": 3, "pass@8": 3, "maj@8": 3, "greedy": 3, "entropy": 3, "perplexity": 1, "samples": 0, "cpu_s": 0}

Seeds = dict[str, dict[str, list[float | None]]]
"""The values of all seeds: {label: {measure: [one of each run]}}; None: not measured."""


def gather(runs: Sequence[str]) -> Seeds:
    """Returns what the evaluations of all runs measured. Raises ValueError where they are not of the same labels."""
    found: list[Mapping[str, dict[str, Any]]] = []
    for run in runs:
        stages = read_stages(run)
        add_costs(run, stages)
        found.append(evaluations(stages))
        if list(found[0]) != list(found[-1]):
            raise ValueError(
                f"{run}: has {', '.join(found[-1])}, but {runs[0]} {', '.join(found[0])}; finish both runs"
            )
    return {label: {name: [each[label].get(name) for each in found] for name in MEASURES} for label in found[0]}


def curves(runs: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Returns the points (samples so far, mean reward of a step) of each stage that sampled, means over all runs."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for stage in (stage for run in runs for stage in read_stages(run)):
        if points := reward_curve(stage):
            found.setdefault(stage.name, []).append(points)
    return {
        name: [tuple(map(fmean, zip(*points, strict=True))) for points in zip(*each, strict=True)]
        for name, each in found.items()
    }


def shown(values: Sequence[float | None], digits: int) -> str:
    """Returns the mean, and the smallest and largest value where they differ; a dash where a run has none."""
    if None in values:
        return "–"
    mean, low, high = (f"{value:,.{digits}f}" for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def table(seeds: Seeds) -> str:
    """Returns the table, best pass@1 last. Raises ValueError where a run has no pass@1."""
    lines = ["| | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for label, measures in sorted(seeds.items(), key=lambda item: fmean(item[1]["pass@1"])):
        lines.append(f"| {label} | " + " | ".join(shown(measures[name], MEASURES[name]) for name in MEASURES) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories of configs/posttrain.yaml, one a seed")
    parser.add_argument("--out", type=Path, help="where the record goes; a plot beside it")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of the runs, for the record")
    options = parser.parse_args(arguments)
    seeds = gather(options.runs)
    print(table(seeds))
    if options.out is None:
        return
    record = {
        "environment": environment("benchmarks.tour", ("torch", "deepspeed", "transformers"), threads=options.threads),
        "runs": len(options.runs),
        "measured": seeds,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    panels = {"samples": "samples", "cpu_s": "CPU-seconds"}
    points = {
        title: {label: (m[name], m["pass@1"]) for label, m in seeds.items() if None not in m[name]}
        for name, title in panels.items()
    }
    path = str(options.out.with_name(options.out.stem + "_curves.png"))
    plot_lines(path, "Mean reward of the samples of a step", "samples so far", curves(options.runs))
    plot_marks(str(options.out.with_suffix(".png")), "Held-out pass@1", points)


if __name__ == "__main__":
    main()
