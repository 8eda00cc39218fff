"""Compares forward and backward of each model family with its class in transformers: same weights, rows and dtype.

Each contestant lives in its own process and they run in turns, round by round, one family after the other. Ours is the
decoder as `parallelize` builds it for one rank, with the head that scores in chunks; theirs is what
`AutoModelForCausalLM.from_pretrained` gives, with its own loss. Optimizer and engine are left to benchmarks.pretrain.

    python -m benchmarks.model [--out benchmarks/results/model.json] [--compile] [--only "mixtral|qwen3-moe"]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Contestant, Turns, compete, environment
from benchmarks.profile import write_profile
from benchmarks.shapes import SHAPES, Size, model_of
from benchmarks.standings import Rounds, check_same_work, ratio, summary
from benchmarks.task import WARMUP_STEPS, Task
from llmtrain.arch.resolve import active_parameter_count, parameter_count
from llmtrain.config.machine import fast_precision
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.engine.auxiliary import start_auxiliary
from llmtrain.engine.memory import keep_freed_memory
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf import hf_weight_source
from llmtrain.model.hf_write import save_hf
from llmtrain.parallel.mesh import init_mesh, shutdown
from llmtrain.parallel.pipeline import inputs_of
from llmtrain.parallel.plan import compile_blocks, materialize, parallelize
from llmtrain.types import Scores

ONE_RANK = ParallelConfig()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}  # relative, of the losses
SPREAD = 3.0  # factor on the usual weights: with logits near 0 a mistake would not show in the loss
OURS, THEIRS = "llmtrain", "transformers"
LEAST = {False: 1.0, True: 1.2}  # with experts or without -> least speed relative to transformers
PROFILE = "benchmarks/results/model_profile_{}.txt"  # one for each family


@dataclass(frozen=True)
class ModelTask(Task):
    """Adds the directory of the weights to a task."""

    directory: str


def ours(turns: Turns, task: ModelTask, compiled: bool) -> None:
    """Runs our decoder as an engine does in a training step, on one rank."""
    mesh, settings = init_mesh(ONE_RANK, None, timeout_s=60), EngineConfig(precision=task.precision, compile=compiled)
    model = parallelize(task.model, mesh, ONE_RANK, settings)[0]
    materialize([model], mesh, hf_weight_source(task.directory, task.model))
    model.to(DTYPES[task.precision])
    if mesh.device.type == "cpu":
        keep_freed_memory()  # as engines do it
    if compiled:
        compile_blocks([model])
    batches = task.batches()
    turns.count_memory()
    while turns.wait():
        batch = next(batches).to(mesh.device)
        factor = 1 / batch.labels.numel()
        start_auxiliary([model], factor)
        loss = token_loss(Scores(*model(batch.input_ids, **inputs_of(batch, True))), batch)[0] * factor
        loss.backward()
        model.zero_grad()
        turns.done(loss.item())
    shutdown()


def theirs(turns: Turns, task: ModelTask, compiled: bool) -> None:
    """Runs the class of transformers, with its default choice for attention and experts."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(task.directory, dtype=DTYPES[task.precision], trust_remote_code=False)
    model = model.to(device).train()
    model.config.use_cache = False
    if compiled:
        model.compile()
    batches = task.batches()
    turns.count_memory()
    while turns.wait():
        batch = next(batches).to(device)
        loss = model(batch.input_ids, labels=batch.labels, shift_labels=batch.labels).loss
        loss.backward()
        model.zero_grad()
        turns.done(loss.item())


def contestants(compiled: bool) -> dict[str, Contestant]:
    """Returns the contestants in pairs, transformers last."""
    found: dict[str, Contestant] = {}
    for mode in (False, True)[: 1 + compiled]:
        suffix = ", compiled" if mode else ""
        found |= {OURS + suffix: partial(ours, compiled=mode), THEIRS + suffix: partial(theirs, compiled=mode)}
    return found


def write_weights(model: ModelConfig, directory: str) -> None:
    """Writes random weights as a Hugging Face directory."""
    shapes = parameter_shapes(model)
    tensors = ((name, init_tensor(name, shape, model, seed=0)) for name, shape in shapes.items())
    spread = ((name, x * SPREAD if x.dim() > 1 else x) for name, x in tensors)
    save_hf(directory, model, spread, torch.float32, None, None)


def measure(task: ModelTask, args: argparse.Namespace) -> dict:
    """Measures all contestants on one family."""
    runs = compete(contestants(args.compile), (task,), args.threads, WARMUP_STEPS, args.steps, args.rounds)
    losses = check_same_work(runs, THEIRS, TOLERANCE[task.precision])
    timed = {name: turns[1:] for name, turns in runs.items()}
    tokens = args.steps * task.step_tokens
    results = {name: summary(turns, timed[THEIRS], tokens) for name, turns in timed.items()}
    return {
        "model": task.model.model_dump(),
        "parameters": parameter_count(task.model),
        "active_parameters": active_parameter_count(task.model),
        "results": results,
        "targets": verdicts(task.model, timed),
        "losses": losses,
        "rounds": timed,
    }


def verdicts(model: ModelConfig, timed: dict[str, Rounds]) -> list[dict]:
    """Returns a verdict for each pair, eager and compiled."""
    found = []
    for name in (name for name in timed if name.startswith(OURS)):
        other = name.replace(OURS, THEIRS)
        speed, cpu = ratio(timed[name], timed[other]), ratio(timed[name], timed[other], "cpu_s")
        peak, against = (max(turn["peak_bytes"] for turn in timed[each]) for each in (name, other))
        least = LEAST[model.moe is not None]
        found.append(
            {"target": f"{model.family}: {name} at least {least} times as fast as {other}", "wall": speed, "cpu": cpu}
            | {"memory": peak / max(1, against), "met": speed >= least}
        )
    return found


def print_family(family: str, record: dict) -> None:
    """Prints the contestants' lines, then the verdicts."""
    print(f"{family}: {record['parameters'] / 1e6:.1f}M parameters, {record['active_parameters'] / 1e6:.1f}M active")
    for name, r in record["results"].items():
        loss = record["losses"][name][-1]
        spread = f"{r['slowest']:.0f} - {r['fastest']:.0f}"
        print(f"  {name:26}{r['tokens_per_s']:>8.0f} tokens/s{spread:>15}{r['peak_bytes'] / 1e6:>7.0f} MB  {loss:.6f}")
    for v in record["targets"]:
        figures = f"{v['wall']:.2f} wall, {v['cpu']:.2f} CPU, {v['memory']:.2f} of the memory"
        print(f"  {'met   ' if v['met'] else 'MISSED'}  {v['target']}: {figures}", flush=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    sizes = {"hidden-size": 256, "layers": 8, "vocab": 2048}
    work = {"seq-len": 256, "seqs": 8, "steps": 1, "rounds": 7, "threads": 2}
    for name, default in {**sizes, **work}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--only", default="", help=f"regular expression over the families: {', '.join(SHAPES)}")
    parser.add_argument("--published", action="store_true", help="experts as many and as wide as published, not fewer")
    parser.add_argument("--precision", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where it is fast")
    parser.add_argument("--compile", action="store_true", help="also both under torch.compile; with --profile alone")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: CUDA when there is a GPU")
    parser.add_argument("--profile", action="store_true", help=f"instead: operators of both, to {PROFILE}")
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, dict]:
    """Returns a record for each family that `--only` matches."""
    size = Size(args.hidden_size, args.layers, args.vocab, args.seq_len, args.published)
    precision = fast_precision() if args.precision == "auto" else args.precision
    steps = WARMUP_STEPS + args.steps * args.rounds
    records = {}
    for family in (family for family in SHAPES if re.search(args.only, family)):
        model = model_of(family, size)
        with tempfile.TemporaryDirectory() as scratch:
            write_weights(model, scratch)
            task = ModelTask(model, args.seqs, args.seq_len, steps, precision, scratch)
            if args.profile:
                pair = dict(list(contestants(args.compile).items())[-2:])
                write_profile(pair, task, args.threads, Path(PROFILE.format(family)), by_difference=False)
                continue
            records[family] = measure(task, args)
        print_family(family, records[family])
    return records


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark. Returns 1 when a target is missed."""
    args = arguments(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before this process or a contestant looks for a GPU
    os.environ.update(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1")
    before = os.getloadavg()[0]
    print(f"{args.seqs} x {args.seq_len} tokens, {args.threads} threads, load average before: {before:.1f}")
    records = run(args)
    missed = [v for record in records.values() for v in record["targets"] if not v["met"]]
    if args.out:
        described = environment("benchmarks.model", ("torch", "transformers"), args.threads)
        described |= {"load_average_before": before, "arguments": vars(args), "tolerance": TOLERANCE}
        Path(args.out).write_text(json.dumps({**described, "families": records}, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
