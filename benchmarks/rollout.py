"""Compares the native generator with `transformers.generate`: same weights, prompts, precision and number of sequences.

Each contestant lives in its own process (so that its peak memory is its own) and they run in turns, round by round.
`transformers` returns tokens only; the native generator also returns their log-probs.

    python -m benchmarks.rollout [--model DIRECTORY] [--out benchmarks/results/rollout.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Turns, compete, environment
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, init_tensor, parameter_shapes
from llmtrain.model.hf import hf_weight_source, import_gguf, smollm2_gguf
from llmtrain.model.hf_write import save_hf
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Prompt, Sampling

RANDOM = ModelConfig(
    num_layers=8, hidden_size=384, ffn_size=1024, num_heads=6, num_kv_heads=2, vocab_size=16384, max_positions=1024
)


@dataclass(frozen=True)
class Workload:
    """Describes the work; sequences end at one of `stop_ids` tokens, or with 0 all of them after `new_tokens`."""

    name: str
    prompts: int
    samples: int  # of each prompt
    prompt_tokens: tuple[int, int]  # shortest, longest
    new_tokens: int  # at most
    batch_seqs: int
    stop_ids: int = 0


EQUAL = Workload("equal lengths", 8, 8, (64, 64), 48, 64)
SHORT = Workload("equal lengths", 4, 8, (64, 64), 32, 32)
# a random model draws nearly evenly from 16,384 tokens: 512 stop tokens end a sequence after 32 on average
RAGGED = Workload("ragged lengths", 8, 8, (16, 64), 96, 16, stop_ids=512)

Contestant = Callable[[], int]
"""A contestant runs the workload once and returns the number of new tokens."""


def prompts_of(workload: Workload, vocab_size: int) -> list[Prompt]:
    """Returns random ids that are no stop tokens, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    low, high = workload.prompt_tokens
    lengths = torch.randint(low, high + 1, (workload.prompts,), generator=generator).tolist()
    draws = (torch.randint(workload.stop_ids + 10, vocab_size, (n,), generator=generator) for n in lengths)
    return [Prompt(ids.tolist(), seed) for seed, ids in enumerate(draws)]


def native(directory: str, workload: Workload, dtype: torch.dtype) -> Contestant:
    config = resolve_model(ModelConfig(init_from=directory))
    read, model = hf_weight_source(directory, config), Decoder(config).to(dtype)
    generator = NativeGenerator(model, workload.batch_seqs, "cpu")
    generator.load_weights(((name, read(name)) for name in parameter_shapes(config)), version=0)
    prompts = prompts_of(workload, config.vocab_size)
    sampling = Sampling(workload.new_tokens, workload.samples, stop_ids=tuple(range(workload.stop_ids)))
    return lambda: sum(len(s.ids) for group in generator.generate(prompts, sampling) for s in group)


def transformers(directory: str, workload: Workload, dtype: torch.dtype) -> Contestant:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False).eval()
    prompts = [p.ids for p in prompts_of(workload, model.config.vocab_size)]
    stop = list(range(workload.stop_ids))
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=workload.new_tokens,
        num_return_sequences=workload.samples, eos_token_id=stop or None, pad_token_id=0,
    )  # fmt: skip
    step = workload.batch_seqs // workload.samples

    def batch(rows: list[list[int]]) -> int:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        new = model.generate(ids, attention_mask=mask)[:, width:]
        stops = torch.isin(new, torch.tensor(stop, dtype=torch.long))
        return int((stops.cumsum(-1) - stops.long() == 0).sum())  # up to the first stop token

    return lambda: sum(batch(prompts[i : i + step]) for i in range(0, len(prompts), step))


CONTESTANTS = {"native": native, "transformers": transformers}


def contestant(turns: Turns, directory: str, workload: Workload, dtype: str, name: str) -> None:
    run = CONTESTANTS[name](directory, workload, getattr(torch, dtype))
    while turns.wait():
        turns.done(run())


def race(directory: str, workload: Workload, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Returns the measurements of each contestant's rounds, one run each; an earlier run warms up and is dropped."""
    contestants = {name: partial(contestant, name=name) for name in CONTESTANTS}
    measured = compete(contestants, (directory, workload, args.dtype), args.threads, 1, 1, args.rounds)
    return {name: [{"tokens": turn.pop("values")[0], **turn} for turn in turns[1:]] for name, turns in measured.items()}


def summary(runs: list[dict]) -> dict[str, float]:
    """Returns medians over rounds, and the spread of the speed."""
    rates = [r["tokens"] / r["wall_s"] for r in runs]
    return {
        "tokens_per_s": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "tokens_per_cpu_s": statistics.median(r["tokens"] / r["cpu_s"] for r in runs),
        "peak_bytes": max(r["peak_bytes"] for r in runs),
    }


def measure(title: str, directory: str, workload: Workload, args: argparse.Namespace) -> dict:
    """Runs one comparison, prints its table, returns its record."""
    runs = race(directory, workload, args)
    result = {name: summary(r) for name, r in runs.items()}
    ratio = result["native"]["tokens_per_cpu_s"] / result["transformers"]["tokens_per_cpu_s"]
    print(f"\n{title}, {workload.name}: {workload.prompts} x {workload.samples} sequences, {args.dtype}")
    print(f"{'':14}{'tokens/s':>10}{'min - max':>16}{'tokens/CPU-s':>14}{'peak MB':>9}")
    for name, r in result.items():
        spread = f"{r['slowest']:.0f} - {r['fastest']:.0f}"
        line = f"{r['tokens_per_s']:>10.0f}{spread:>16}{r['tokens_per_cpu_s']:>14.0f}{r['peak_bytes'] / 1e6:>9.0f}"
        print(f"{name:14}{line}", flush=True)
    print(f"native is {ratio:.2f}x in tokens per CPU-second", flush=True)
    return {"model": title, "workload": asdict(workload), "results": result, "ratio_per_cpu_s": ratio, "runs": runs}


def models(chosen: str | None, scratch: str) -> list[tuple[str, str, Workload]]:
    """Returns (title, Hugging Face directory, workload) of the comparisons."""
    if chosen:
        return [(Path(chosen).name, chosen, EQUAL)]
    random, smollm2 = f"{scratch}/random", f"{scratch}/smollm2"
    config = resolve_model(RANDOM)
    weights = ((name, init_tensor(name, shape, config, seed=0)) for name, shape in parameter_shapes(config).items())
    save_hf(random, config, weights, torch.float32, None, None)
    count = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    title = f"random Llama, {count / 1e6:.0f}M"
    found = [(title, random, EQUAL), (title, random, RAGGED)]
    if smollm2_gguf():
        import_gguf("smollm2", smollm2)
        found.append(("SmolLM2-135M", smollm2, SHORT))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face directory (default: a random model and, if installed, SmolLM2)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        records = [measure(*model, args) for model in models(args.model, scratch)]
    if args.out:
        versions = environment("benchmarks.rollout", ("torch", "transformers"), args.threads)
        Path(args.out).write_text(json.dumps({**versions, "comparisons": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
