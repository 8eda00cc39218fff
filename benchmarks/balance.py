"""Measures how the load of experts evens out on 4 ranks: not balanced, by selection bias, by auxiliary loss.

It runs `llmtrain pretrain configs/pretrain/tiny-moe.yaml` three times with 2 of 8 experts on each rank
(`parallel.ep=4`), from the same weights and rows.

    python -m benchmarks.balance [--steps 160] [--out benchmarks/results/balance.json]    # and balance.png beside it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from benchmarks.common import environment
from llmtrain.observe.experts import over_layers
from llmtrain.observe.metrics import read_metrics
from llmtrain.observe.plots import Panel, plot_curves

ROOT = Path(__file__).parents[1]
DOCUMENT = "configs/pretrain/tiny-moe.yaml"
RANKS = 4
RUNS = {  # a bias moves at most rate x steps: 0.003 lets it cross the spread of 8 softmax scores in these few steps
    "none": ["model.moe.balance=none"],
    "bias": ["model.moe.balance=bias", "model.moe.selection_bias=true", "model.moe.bias_rate=0.003"],
    "aux": ["model.moe.balance=aux"],
}
NAMES = {"none": "not balanced", "bias": "bias of the choice", "aux": "auxiliary loss"}
LAST = 10  # steps that the figures are averaged over
MEASURES = {
    "load_max_mean": "Tokens of the busiest expert, mean of layers (1 = even)",
    "load_entropy_mean": "Entropy of the load, mean of layers (1 = even)",
}


def pretrain(balance: str, steps: int, scratch: Path) -> list[dict]:
    """Returns the records of one run. Raises RuntimeError when it fails, or when a token was dropped."""
    shared = [f"data.path={scratch}/data", f"tokenizer.path={scratch}/tokenizer", "log.wandb=off"]
    own = [f"run_dir={scratch}/{balance}", f"train.steps={steps}", "checkpoint.every_steps=0", "parallel.ep=4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "llmtrain", "pretrain", DOCUMENT, *shared, *own, *RUNS[balance]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"balance={balance} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    records = read_metrics(str(scratch / balance / "metrics.jsonl"))
    return checked(balance, [{**record, **over_layers(record)} for record in records])


def checked(balance: str, records: list[dict]) -> list[dict]:
    """Returns the records. Raises RuntimeError when a chosen expert did not compute a token."""
    for record in records:
        if record["load_dropped_worst"] != 0:
            raise RuntimeError(
                f"balance={balance}: {record['load_dropped_worst']:.2%} dropped at step {record['step']}"
            )
    return records


def figures(records: list[dict]) -> dict[str, float]:
    """Returns the figures of the first step, and means of the last ones, of each layer too."""
    last = records[-LAST:]
    names = [n for n in records[-1] if n in ("loss", "aux_loss") or n.startswith(("load_max", "load_entropy"))]
    means = {name: fmean(record[name] for record in last) for name in names}
    dropped = max(record["load_dropped_worst"] for record in records)
    return {**{f"first_{name}": records[0][name] for name in MEASURES}, **means, "load_dropped": dropped}


def plot(runs: dict[str, list[dict]], path: str) -> None:
    """Draws a panel for each measure with a line for each run."""
    panels: list[Panel] = [
        (title, {f"{balance}/{name}": NAMES[balance] for balance in runs}) for name, title in MEASURES.items()
    ]
    panels.append(("Loss, nats a token", {f"{balance}/loss": NAMES[balance] for balance in runs}))
    records = [
        {"step": record["step"], **{f"{balance}/{name}": record[name] for name in (*MEASURES, "loss")}}
        for balance, found in runs.items()
        for record in found
    ]
    plot_curves(path, panels, records)


def verdicts(found: dict[str, dict[str, float]]) -> list[dict]:
    """Returns whether each balancing method brings the busiest expert closer to its share than no balancing does."""
    none = found["none"]["load_max_mean"] - 1
    return [
        {"target": f"{NAMES[b]}: the excess of the busiest expert is below that of none", "met": excess < none}
        | {"excess": excess, "none": none}
        for b in found
        if b != "none"
        for excess in [found[b]["load_max_mean"] - 1]
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark. Returns 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160, help="of each run; default: 160")
    parser.add_argument("--out", default="benchmarks/results/balance.json", help="JSON file; the plot lies beside it")
    args = parser.parse_args(argv)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory() as scratch:
        runs = {balance: pretrain(balance, args.steps, Path(scratch)) for balance in RUNS}
    found = {balance: figures(records) for balance, records in runs.items()}
    for balance, f in found.items():
        loads = f"{f['load_max_mean']:.3f} (first step {f['first_load_max_mean']:.3f})"
        print(f"{NAMES[balance]:20} busiest {loads}, entropy {f['load_entropy_mean']:.4f}, loss {f['loss']:.3f}")
    targets = verdicts(found)
    for v in targets:
        print(f"  {'met   ' if v['met'] else 'MISSED'}  {v['target']}: {v['excess']:.3f}, {v['none']:.3f}")
    plot(runs, str(Path(args.out).with_suffix(".png")))
    described = environment("benchmarks.balance", ("torch", "deepspeed"), threads=1)
    record = {**described, "document": DOCUMENT, "overrides": RUNS, "ranks": RANKS, "steps": args.steps}
    Path(args.out).write_text(json.dumps({**record, "last": LAST, "runs": found, "targets": targets}, indent=2) + "\n")
    return 0 if all(v["met"] for v in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
