"""Runs a document whose last stages learn by three seeds, and tells what its evaluations measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from llmtrain.observe.report import evaluations, read_stages

Row = dict[str, Any]


def write_rows(folder: Path, files: Mapping[str, Sequence[Row]]) -> None:
    """Writes each list of rows to a JSONL file of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scores(run_dir: Path) -> dict[str, dict[str, float]]:
    """Returns the share of right answers, sampled and greedy, of each evaluation of the run, in their order."""
    found = evaluations(read_stages(str(run_dir)))
    return {label: {"sampled": each["pass@1"], "greedy": each["greedy"]} for label, each in found.items()}


def spent_cpu_s(run_dir: Path) -> float:
    """Returns the CPU-seconds of all stages, also where the run was broken off and went on."""
    return sum(json.loads(path.read_text(encoding="utf-8"))["cpu_s"] for path in run_dir.glob("*/done.json"))


def report(about: str, module: str, config: str, rows: Path, run_dir: Path, make_rows: Callable[[Path], None]) -> None:
    """Makes the rows, runs the document, prints a table, and writes the record of `module`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", action="store_true", help="make the rows, and train nothing")
    args = parser.parse_args()
    make_rows(rows)
    if args.rows:
        return
    subprocess.run([sys.executable, "-m", "llmtrain", "run", config], check=True)
    found = scores(run_dir)
    print("| right answers | sampled | greedy |\n|---|---|---|")
    for label, each in found.items():
        print(f"| {label} | {each['sampled']:.3f} | {each['greedy']:.3f} |")
    if args.out is not None:
        head = environment(module, ("torch", "deepspeed"), 1)
        record = {**head, "cpu_s": spent_cpu_s(run_dir), "scores": found}
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
