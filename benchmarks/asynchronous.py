"""Measures what sampling ahead of training gains: the steps of GRPO on the quickstart's sums in a second, with the same
number of processes.

    bash launch/quickstart.sh
    python -m benchmarks.asynchronous --out benchmarks/results/asynchronous.json

Each contestant is a run of its own from the quickstart's fine-tuned model, one thread a process. The runs take turns,
seed by seed, and stay in `--directory`: one that is there with all its steps is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common import environment
from llmtrain.observe.metrics import read_lines

CONTESTANTS = {  # processes under torchrun, and the placement
    "in step, both sample and train": (2, ["rollout.placement=colocated", "rollout.workers=0"]),
    "in step, one samples": (2, ["rollout.placement=separate", "rollout.workers=1"]),
    "ahead, one samples": (1, ["rollout.placement=ahead", "rollout.workers=1", "rollout.max_staleness=1"]),
}
AHEAD = list(CONTESTANTS)[-1]
FIRST = 4  # steps that are not timed: workers start, and nothing is sampled ahead yet
TOLERANCE = 0.03  # between the rewards of two contestants, means over seeds and the last half of the steps
TOLD = ("rollout_s", "train_s", "sync_s", "trainer_idle_s", "workers_idle_s")
Result = dict[str, Any]


def start(document: Path, directory: Path, name: str, seed: int, steps: int) -> list[str]:
    """Returns the command of a run."""
    ranks, placement = CONTESTANTS[name]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    settings = [f"run_dir={directory}", f"seed={seed}", f"train.steps={steps}", "log.wandb=off", "data.sources=[]"]
    settings += ["data.tasks=[]", "checkpoint.every_steps=0", "rollout.verify=off", *placement]
    return [sys.executable, *launcher, "-m", "llmtrain", "grpo", str(document), *settings]


def run(document: Path, directory: Path, name: str, seed: int, steps: int) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl of a run, which is made unless it is there."""
    place = directory / f"{list(CONTESTANTS).index(name)}-{seed}"
    metrics = place / "metrics.jsonl"
    if not metrics.exists() or len(read_lines(str(metrics))) < steps:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(start(document, place, name, seed, steps), check=True, env=environment)
    return read_lines(str(metrics))


def measured(lines: list[dict[str, float]]) -> Result:
    """Returns what a run was like: seconds a step, mean reward of the last half, and where its time went."""
    timed = lines[FIRST:]
    told = {name: fmean(line[name] for line in timed) for name in TOLD if name in timed[0]}
    return {
        "step_s": fmean(line["step_s"] for line in timed),
        "reward": fmean(line["reward_mean"] for line in lines[len(lines) // 2 :]),
        "first_reward": fmean(line["reward_mean"] for line in lines[:FIRST]),
        **told,
    }


def summary(runs: dict[str, list[Result]]) -> dict[str, Result]:
    """Returns means over the seeds, and how many times as many steps sampling ahead makes (median of the seeds)."""
    found = {}
    for name, each in runs.items():
        pairs = zip(each, runs.get(AHEAD, []), strict=False)
        ratios = [other["step_s"] / ahead["step_s"] for other, ahead in pairs]
        means = {key: fmean(result[key] for result in each) for key in each[0]}
        found[name] = {**means, "ahead_ratio": median(ratios) if ratios else None, "ratios": ratios}
    return found


def main() -> None:
    """Runs the benchmark, prints a table, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, default=Path("runs/quickstart/grpo/stage.yaml"))
    parser.add_argument("--directory", type=Path, default=Path("runs/asynchronous"), help="where the runs lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--only", choices=list(CONTESTANTS), nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.document.is_file():
        sys.exit(f"{args.document}: does not exist; run launch/quickstart.sh first")
    runs: dict[str, list[Result]] = {name: [] for name in args.only}
    for seed in args.seeds:
        for name in args.only:
            runs[name].append(measured(run(args.document, args.directory, name, seed, args.steps)))
    found = summary(runs)
    for name, result in found.items():
        ratio = "" if result["ahead_ratio"] is None else f"  ahead makes {result['ahead_ratio']:.2f}x its steps"
        print(f"{name:32} {result['step_s']:6.2f} s a step  reward {result['reward']:.3f}{ratio}")
    rewards = [result["reward"] for result in found.values()]
    print(f"rewards {'equal' if max(rewards) - min(rewards) <= TOLERANCE else 'NOT equal'} within {TOLERANCE}")
    if args.out:
        head = environment("benchmarks.asynchronous", ("torch", "deepspeed"), 1)
        record = {**head, "steps": args.steps, "seeds": args.seeds, "summary": found, "runs": runs}
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
