"""Compares the native generator with `transformers.generate` and vLLM: same weights, prompts, precision and sequences.

Each contestant lives in its own process (so that its peak memory is its own) and they run in turns, round by round.
`transformers` returns tokens only; the others also return their log-probs.

    python -m benchmarks.rollout [--vllm-python PATH] [--dtype float32] [--out benchmarks/results/rollout.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Turns, compete, environment
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, init_tensor, parameter_shapes
from llmtrain.model.hf import hf_weight_source
from llmtrain.model.hf_write import save_hf
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Prompt, Sampling

SMOLLM2 = ModelConfig(
    num_layers=30, hidden_size=576, ffn_size=1536, num_heads=9, num_kv_heads=3, vocab_size=49152, max_positions=2048
)
"""Has the shape of SmolLM2-135M; the weights are random, which changes no time and lets every length be chosen."""


@dataclass(frozen=True)
class Workload:
    """Describes the work; sequences end at one of `stop_ids` tokens, or with 0 all of them after `new_tokens`."""

    name: str
    streams: int  # sequences decoded together
    prompts: int
    samples: int  # of each prompt
    prompt_tokens: tuple[int, int]  # shortest, longest
    new_tokens: int  # at most
    stop_ids: int = 0


def workloads(streams: int, new_tokens: int) -> list[Workload]:
    """Returns the work with equal and with ragged lengths. A random model draws nearly evenly: 768 of 49,152 tokens end
    a sequence of at most 96 after 50 on average, and there are twice as many as streams, so that a place gets another
    one."""
    samples = min(streams, 8)
    prompts = streams // samples
    return [
        Workload("equal", streams, max(prompts, 2), samples, (64, 64), new_tokens),
        Workload("ragged", streams, max(2 * prompts, 4), samples, (16, 112), new_tokens, stop_ids=768),
    ]


Contestant = Callable[[], int]
"""A contestant runs the workload once and returns the number of new tokens."""


def prompts_of(workload: Workload, vocab_size: int) -> list[Prompt]:
    """Returns random ids that are no stop tokens, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    low, high = workload.prompt_tokens
    lengths = torch.randint(low, high + 1, (workload.prompts,), generator=generator).tolist()
    draws = (torch.randint(workload.stop_ids + 10, vocab_size, (n,), generator=generator) for n in lengths)
    return [Prompt(ids.tolist(), seed) for seed, ids in enumerate(draws)]


@contextmanager
def native(directory: str, workload: Workload, dtype: str) -> Iterator[Contestant]:
    config = resolve_model(ModelConfig(init_from=directory))
    read, model = hf_weight_source(directory, config), Decoder(config).to(getattr(torch, dtype))
    generator = NativeGenerator(model, workload.streams, "cpu")
    generator.load_weights(((name, read(name)) for name in parameter_shapes(config)), version=0)
    prompts = prompts_of(workload, config.vocab_size)
    sampling = Sampling(workload.new_tokens, workload.samples, stop_ids=tuple(range(workload.stop_ids)))
    yield lambda: sum(len(s.ids) for group in generator.generate(prompts, sampling) for s in group)


@contextmanager
def transformers(directory: str, workload: Workload, dtype: str) -> Iterator[Contestant]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), trust_remote_code=False).eval()
    prompts = [p.ids for p in prompts_of(workload, model.config.vocab_size)]
    stop = list(range(workload.stop_ids))
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=workload.new_tokens,
        num_return_sequences=workload.samples, eos_token_id=stop or None, pad_token_id=0,
    )  # fmt: skip
    step = workload.streams // workload.samples

    def batch(rows: list[list[int]]) -> int:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        new = model.generate(ids, attention_mask=mask)[:, width:]
        stops = torch.isin(new, torch.tensor(stop, dtype=torch.long))
        return int((stops.cumsum(-1) - stops.long() == 0).sum())  # up to the first stop token

    yield lambda: sum(batch(prompts[i : i + step]) for i in range(0, len(prompts), step))


@contextmanager
def vllm(directory: str, workload: Workload, dtype: str, python: str) -> Iterator[Contestant]:
    """Lets `rollout_vllm.py` generate, in the interpreter `python`."""
    prompts = [p.ids for p in prompts_of(workload, resolve_model(ModelConfig(init_from=directory)).vocab_size)]
    most_tokens = workload.prompt_tokens[1] + workload.new_tokens
    asked = {**asdict(workload), "directory": directory, "dtype": dtype, "prompts": prompts, "most_tokens": most_tokens}
    script, (answers, end) = Path(__file__).with_name("rollout_vllm.py"), os.pipe()
    with subprocess.Popen(
        [python, "-I", str(script), str(end)],  # -I: neither our PYTHONPATH nor our `profile.py`
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, pass_fds=(end,),
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    ) as process, os.fdopen(answers) as lines:  # fmt: skip
        os.close(end)  # else reading would wait for a process that has died

        def ask(line: str) -> int:
            print(line, file=process.stdin, flush=True)
            return int(json.loads(lines.readline()))

        ask(json.dumps(asked))
        yield lambda: ask("again")
        process.stdin.close()


CONTESTANTS = {"native": native, "transformers": transformers}


def contestant(turns: Turns, directory: str, workload: Workload, dtype: str, run: Callable) -> None:
    with run(directory, workload, dtype) as work:
        while turns.wait():
            turns.done(work())


def race(directory: str, workload: Workload, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Returns the measurements of each contestant's rounds, one run each; an earlier run warms up and is dropped."""
    chosen = {**CONTESTANTS, **({"vllm": partial(vllm, python=args.vllm_python)} if args.vllm_python else {})}
    contestants = {name: partial(contestant, run=chosen[name]) for name in chosen if name in args.only}
    measured = compete(contestants, (directory, workload, args.dtype), args.threads, 1, 1, args.rounds)
    return {name: [measurement(turn) for turn in turns[1:]] for name, turns in measured.items()}


def measurement(turn: dict) -> dict:
    """Returns what one round says: an engine in a process of its own counts with the memory of both."""
    tokens, started = turn.pop("values")[0], turn.pop("children_bytes")
    return {"tokens": tokens, **turn, "peak_bytes": turn["peak_bytes"] + started}


def summary(runs: list[dict]) -> dict[str, float]:
    """Returns medians over rounds, and the spread of the speed."""
    rates = [r["tokens"] / r["cpu_s"] for r in runs]
    return {
        "tokens_per_cpu_s": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "tokens_per_s": statistics.median(r["tokens"] / r["wall_s"] for r in runs),
        "peak_bytes": max(r["peak_bytes"] for r in runs),
    }


def ratio(runs: dict[str, list[dict]], other: str) -> float:
    """Returns how many times as fast as another the native generator is: the median over rounds of the ratio within a
    round, in tokens a CPU-second."""
    pairs = zip(runs["native"], runs[other], strict=True)
    return statistics.median(a["tokens"] / a["cpu_s"] / (b["tokens"] / b["cpu_s"]) for a, b in pairs)


def measure(directory: str, workload: Workload, args: argparse.Namespace) -> dict:
    """Runs one comparison, prints its table, returns its record."""
    runs = race(directory, workload, args)
    results, w = {name: summary(r) for name, r in runs.items()}, workload
    others = [name for name in runs if name != "native" and "native" in runs]
    ratios = {name: ratio(runs, name) for name in others}
    print(f"\n{w.streams} streams, {w.name} lengths: {w.prompts} x {w.samples} sequences, {args.dtype}")
    print(f"{'':14}{'tokens/CPU-s':>13}{'min - max':>16}{'native is':>11}{'peak MB':>9}")
    for name, r in results.items():
        spread, times = f"{r['slowest']:.0f} - {r['fastest']:.0f}", f"{ratios[name]:.2f}x" if name in ratios else ""
        line = f"{r['tokens_per_cpu_s']:>13.1f}{spread:>16}{times:>11}{r['peak_bytes'] / 1e6:>9.0f}"
        print(f"{name:14}{line}", flush=True)
    return {"workload": asdict(workload), "results": results, "native_times_as_fast_as": ratios, "runs": runs}


def verdicts(records: list[dict]) -> list[str]:
    """Returns whether the targets are met: as fast as vLLM, and ragged lengths as fast as equal ones, by streams."""
    found, native_rates = [], {}
    for record in records:
        w = record["workload"]
        if "vllm" in record["native_times_as_fast_as"]:
            times = record["native_times_as_fast_as"]["vllm"]
            found.append(f"{w['streams']} {w['name']}: {times:.2f}x of vLLM: {'met' if times >= 1 else 'MISSED'}")
        if "native" in record["results"]:
            native_rates[w["streams"], w["name"]] = record["results"]["native"]["tokens_per_cpu_s"]
    for streams, name in native_rates:
        if name == "ragged" and (streams, "equal") in native_rates:
            share = native_rates[streams, "ragged"] / native_rates[streams, "equal"]
            found.append(f"{streams} ragged: {share:.2f}x of equal lengths: {'met' if share >= 1 else 'MISSED'}")
    return found


def random_model(scratch: str) -> str:
    """Writes a model of SmolLM2's shape with random weights; returns its directory."""
    config = resolve_model(SMOLLM2)
    weights = ((name, init_tensor(name, shape, config, seed=0)) for name, shape in parameter_shapes(config).items())
    save_hf(scratch, config, weights, torch.float32, None, None)
    return scratch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face directory (default: random weights in the shape of SmolLM2-135M)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--vllm-python", help="interpreter that has vLLM; without it vLLM is left out")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new-tokens", type=int, default=96, help="of a sequence, at most")
    parser.add_argument("--lengths", nargs="+", default=["equal", "ragged"])
    parser.add_argument("--only", nargs="+", default=["native", "transformers", "vllm"], help="contestants")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.model or random_model(f"{scratch}/smollm2")
        chosen = [w for streams in args.streams for w in workloads(streams, args.new_tokens) if w.name in args.lengths]
        records = [measure(directory, workload, args) for workload in chosen]
    print("\n" + "\n".join(verdicts(records)))
    if args.out:
        versions = environment("benchmarks.rollout", ("torch", "transformers"), args.threads)
        Path(args.out).write_text(json.dumps({**versions, "comparisons": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
