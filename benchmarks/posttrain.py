"""Compares a step of SFT, DPO, reward modelling and GRPO with TRL's trainers: same weights, rows, completions,
optimizer, clipping. PPO, for which TRL 1.16 has no trainer, is measured alone.

Each contestant lives in its own process (so that its peak memory is its own) and they run in turns, round by round.
Ours is the recipe as `llmtrain sft ...` runs it on one rank.

    python -m benchmarks.posttrain [--out benchmarks/results/posttrain.json] [--profile sft]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import peers_trl
from benchmarks.common import Contestant, Turns, compete, environment
from benchmarks.posttrain_standings import (
    OURS,
    Result,
    against_best,
    check_same_work,
    products,
    show,
    show_best,
    summary,
)
from benchmarks.posttrain_task import CASES, Task
from benchmarks.profile import Profiled, table

DEFAULT = "sft,dpo,reward,ppo,grpo"
WARMUP_STEPS = 1
NOTED = ("loss", "grad_norm", "rollout_s", "score_s", "train_s", "sync_s")  # of our metrics
WHOLE = "TRL, whole batch"  # in one forward


class Finished(Exception):
    """Says that a contestant has no turn left."""


def llmtrain(turns: Turns, task: Task) -> None:
    """Trains with our recipe from a document, as the command line does on one rank."""
    from llmtrain.config.load import load
    from llmtrain.parallel.mesh import shutdown
    from llmtrain.rules.check import check

    recipe = importlib.import_module(f"llmtrain.recipes.{task.case.algorithm}")
    with tempfile.TemporaryDirectory(dir=task.scratch) as scratch:
        path = Path(scratch) / "document.yaml"
        path.write_text(json.dumps(task.document(f"{scratch}/files")))
        config = load(str(path), [])
        check(config, 1, task.case.algorithm)
        with mock.patch.object(recipe, "train", partial(in_turns, recipe.train, turns)), scripted(task):
            try:
                recipe.main(config)
            except Finished:
                shutdown()


def in_turns(train: Callable, turns: Turns, job: Any, step_fn: Callable[[int], tuple[dict, int]]) -> None:
    """Runs the loop of a recipe, each step of it in turn."""

    def step(number: int) -> tuple[dict[str, float], int]:
        if not turns.wait():
            raise Finished
        metrics, tokens = step_fn(number)
        turns.done({name: metrics[name] for name in NOTED if name in metrics})
        return metrics, tokens

    train(job, step)


@contextmanager
def scripted(task: Task) -> Iterator[None]:
    """Makes the native generator sample as ever, and then take the tokens of the script in place of those it drew."""
    from llmtrain.rollout import native, sampling

    if not task.case.sampled:
        yield
        return
    script, chosen = task.script(), torch.empty(0)
    draw, append = sampling._invert, native.Decoding._append

    def take(cdf: Tensor, uniforms: Tensor) -> Tensor:
        draw(cdf, uniforms)
        return chosen

    def append_chosen(self: Any, sequences: list, logits: Tensor) -> None:
        nonlocal chosen
        for sequence in sequences:
            if not sequence.tokens:
                sequence.script = next(script[tuple(sequence.prompt_ids)])
        chosen = torch.tensor([s.script[len(s.tokens)] for s in sequences])
        append(self, sequences, logits)

    with mock.patch.object(sampling, "_invert", take), mock.patch.object(native.Decoding, "_append", append_chosen):
        yield


def contestants(task: Task) -> dict[str, Contestant]:
    """Returns the contestants of a case, ours first."""
    case = task.case
    ours: dict[str, Contestant] = {OURS: llmtrain}
    if case.algorithm not in peers_trl.TRAINERS or not peers_trl.installed():
        return ours
    found = ours | {"TRL": peers_trl.train}
    if case.algorithm == "grpo":  # whose prompts are padded over all rows of a step: single rows would save nothing
        return found | {WHOLE: partial(peers_trl.train, rows=case.rows * case.samples)}
    if case.algorithm == "sft":  # DPO's padding_free is switched off in TRL 1.16, the others have none
        found["TRL, padding-free"] = partial(peers_trl.train, padding_free=True)
    return found | {"TRL, row by row": partial(peers_trl.train, rows=1)}


def picked(task: Task, only: str | None) -> dict[str, Contestant]:
    """Returns the contestants whose names contain one of `only`, separated by |; None: all but the whole batch."""
    found = contestants(task)
    if only is None:
        return {name: run for name, run in found.items() if name != WHOLE}
    return {name: run for name, run in found.items() if any(part in name for part in only.split("|"))}


def measure(name: str, directories: dict[str, str], args: argparse.Namespace) -> Result:
    """Runs one case, prints its table, returns its record."""
    task = task_of(name, directories, args, WARMUP_STEPS + args.rounds + 1)
    prompts, answers = zip(*((row[0], row[1:]) for row in task.lengths()), strict=True)
    sizes = (
        f"prompts of {min(prompts)}-{max(prompts)} tokens, answers of {min(map(min, answers))}-{max(map(max, answers))}"
    )
    total = sum(
        p + sum(a) if task.case.sampled else sum(p + n for n in a) for p, a in zip(prompts, answers, strict=True)
    )
    title = (
        f"{name}: {task.case.rows} rows, {sum(map(len, answers))} answers, {sizes}, {total} in all, {task.precision}"
    )
    before = os.getloadavg()[0]
    runs = compete(picked(task, args.only), (task,), args.threads, WARMUP_STEPS, 1, args.rounds)
    values = check_same_work(runs, task.precision)
    timed = {contestant: turns[WARMUP_STEPS:] for contestant, turns in runs.items()}
    results = {each: summary(turns, next(iter(timed.values()))) for each, turns in timed.items()}
    show(title, results, values)
    if best := against_best(results):
        show_best(best, task.case.algorithm)
    record = {"case": name, **asdict(task.case), "tokens": total, "load_average_before": before, "best": best}
    return {**record, "results": results, "values": values, "rounds": timed}


def task_of(name: str, directories: dict[str, str], args: argparse.Namespace, steps: int) -> Task:
    """Returns a case as the arguments change it."""
    case, scratch = CASES[name], directories["scratch"]
    if args.rows:
        case = case.with_rows(args.rows)
    kind = "scalar" if case.algorithm == "reward" else "lm"
    return Task(case, directories[kind], scratch, args.precision, steps, args.backend)


def prepare(source: str | None, layers: int | None, scratch: str) -> dict[str, str]:
    """Writes the models into `scratch`, and returns their directories: `source` or SmolLM2, as it is and with a scalar
    head, drawn at random. Raises ValueError when SmolLM2 is not installed.

    Padding is another token than the end of a text: transformers gives the embedding of what pads no gradient, and its
    classifiers take the last token before it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from llmtrain.model.hf import import_gguf

    found = {"scratch": scratch, "lm": f"{scratch}/lm", "scalar": f"{scratch}/scalar"}
    if source is None:
        import_gguf("smollm2", source := f"{scratch}/smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = next(each for each in tokenizer.all_special_tokens if each != tokenizer.eos_token)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if layers is not None:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
    model.save_pretrained(found["lm"])
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification
    scalar = kind.from_pretrained(found["lm"], num_labels=1, dtype=torch.float32, trust_remote_code=False)
    scalar.save_pretrained(found["scalar"])
    for directory in (found["lm"], found["scalar"]):
        tokenizer.save_pretrained(directory)
    return found


def write_profile(name: str, directories: dict[str, str], args: argparse.Namespace) -> None:
    """Profiles a step of each contestant, one process after the other, and says how much of it is matrix products."""
    task, found = task_of(name, directories, args, WARMUP_STEPS + 2), {}
    for contestant, run in picked(task, args.only).items():
        with get_context("spawn").Pool(1) as pool:
            found[contestant] = pool.apply(profiled, (run, task, args.threads))
    lines = [f"{each}: {products(times):.0%} of {sum(times.values()) / 1e3:.1f} s" for each, times in found.items()]
    pairs = dict(list(found.items())[:2])
    text = table(pairs, by_difference=False) if len(pairs) == 2 else ""
    text += "matrix products: " + "; ".join(lines) + f"\n{args.threads} threads, torch {torch.__version__}\n"
    Path(f"benchmarks/results/posttrain_profile_{name}.txt").write_text(text)
    print(text)


def profiled(contestant: Contestant, task: Task, threads: int) -> dict[str, float]:
    """Returns the milliseconds of one step by operator."""
    torch.set_num_threads(threads)
    turns = Profiled(WARMUP_STEPS, steps=1)
    contestant(turns, task)
    return turns.milliseconds()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posttrain", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face directory of the Llama family (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--layers", type=int, help="take the first layers of the model alone, to try the benchmark")
    parser.add_argument("--cases", default=DEFAULT, help=f"of {', '.join(CASES)}")
    parser.add_argument("--only", help="names of contestants that contain one of these, separated by |")
    parser.add_argument("--rows", type=int, help="demonstrations, pairs or prompts of a step, in all cases")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--backend", choices=["deepspeed", "fsdp"], default="deepspeed", help="ours")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", metavar="CASE", help="instead: operators of a step of the first two contestants")
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if not peers_trl.installed():
        print("TRL is not installed, so ours alone: pip install -e '.[dev]' -c constraints.txt")
    os.environ.update(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    with tempfile.TemporaryDirectory() as scratch:
        with get_context("spawn").Pool(1) as pool:  # whose memory is gone afterwards
            directories = pool.apply(prepare, (args.model, args.layers, scratch))
        if args.profile:
            return write_profile(args.profile, directories, args)
        records = []
        for name in args.cases.split(","):
            records.append(measure(name, directories, args))
            if args.out:  # written after every case, as the run is long
                packages = ("torch", "deepspeed", *(peers_trl.PACKAGES if peers_trl.installed() else ()))
                written = {**environment("benchmarks.posttrain", packages, args.threads), "cases": records}
                Path(args.out).write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
