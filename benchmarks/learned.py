"""Runs a document whose last stages learn by three seeds, and tells what its evaluations measured."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import environment

Row = dict[str, Any]


def write_rows(folder: Path, files: Mapping[str, Sequence[Row]]) -> None:
    """Writes each list of rows to a JSONL file of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(config: str) -> float:
    """Runs all stages. Returns their CPU-seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "llmtrain", "run", config], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def scores(run_dir: Path) -> dict[str, dict[str, float]]:
    """Returns the share of right answers, sampled and greedy, of each evaluation of the run."""
    found = {}
    for path in sorted(run_dir.glob("eval-*/eval.json")):
        measured = json.loads(path.read_text(encoding="utf-8"))
        found[measured["label"]] = {"sampled": measured["pass@1"], "greedy": measured["greedy"]}
    return found


def report(about: str, module: str, config: str, rows: Path, run_dir: Path, make_rows: Callable[[Path], None]) -> None:
    """Makes the rows, runs the document, prints a table, and writes the record of `module`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", action="store_true", help="make the rows, and train nothing")
    args = parser.parse_args()
    make_rows(rows)
    if args.rows:
        return
    cpu_s = run(config)
    found = scores(run_dir)
    print("| right answers | sampled | greedy |\n|---|---|---|")
    for label in sorted(found, key=lambda label: (label.startswith("seed"), label)):
        print(f"| {label} | {found[label]['sampled']:.3f} | {found[label]['greedy']:.3f} |")
    if args.out is not None:
        head = environment(module, ("torch", "deepspeed"), 1)
        args.out.write_text(json.dumps({**head, "cpu_s": cpu_s, "scores": found}, indent=2) + "\n", encoding="utf-8")
