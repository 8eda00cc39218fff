"""Measures the MFU of a pretraining step on one GPU: models of 0.6B, 1.3B and 2.7B parameters.

A step is what `llmtrain pretrain` does on one rank: microbatches forward and backward, clipping, AdamW on fp32 masters.
MFU counts attention over the half of the row that causal attention covers, and no recomputation. Everything is
compiled. Variants of a size take turns where the GPU's memory holds them at once.

    python -m benchmarks.mfu [--only 0.6b] [--out benchmarks/results/mfu.json] [--profile]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Turns, compete, environment
from benchmarks.profile import write_profile
from benchmarks.standings import check_same_work, mfu, print_table, summary
from benchmarks.task import OPTIM, Task
from llmtrain.arch.resolve import parameter_count, resolve_model, train_flops_per_token
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.engine.build import Role, build_trained
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import parameter_shapes
from llmtrain.parallel.mesh import init_mesh, shutdown
from llmtrain.trainer.batches import count_trained
from llmtrain.types import Batch, WeightSource

ONE_RANK = ParallelConfig()
SMALL = {"preset": "qwen3-0.6b"}
# the shapes of MPT-1b and MPT-2.7b (llm-foundry's table of throughputs), as Llamas
MIDDLE = {"num_layers": 24, "hidden_size": 2048, "ffn_size": 5504, "num_heads": 16, "num_kv_heads": 16}
LARGE = {"num_layers": 32, "hidden_size": 2560, "ffn_size": 6912, "num_heads": 20, "num_kv_heads": 20}
VOCAB = {"vocab_size": 50_432}
PROFILE = "benchmarks/results/mfu_profile_{}.txt"
FP8_TOLERANCE = 0.05  # relative, of the losses: e4m3 has three bits of mantissa


@dataclass(frozen=True)
class GpuTask(Task):
    """Describes a task whose step has `micro_batches` of `seqs` rows each."""

    micro_batches: int

    def steps(self) -> Iterator[list[Batch]]:
        """Yields the microbatches of each step."""
        batches = replace(self, total_steps=self.total_steps * self.micro_batches).batches()
        while step := list(islice(batches, self.micro_batches)):
            yield step

    def source(self) -> WeightSource:
        """Returns initial weights drawn on the GPU: for billions of weights the CPU's generator takes a minute."""
        shapes = parameter_shapes(self.model)

        def weight(name: str) -> Tensor:
            if len(shapes[name]) == 1:
                return torch.ones(shapes[name], device="cuda")
            return torch.empty(shapes[name], device="cuda").normal_(0, 0.02)

        return weight


@dataclass(frozen=True)
class Case:
    """Describes a model size, and its variants: EngineConfig by name."""

    model: dict
    seq_len: int
    micro_seqs: int
    micro_batches: int
    variants: dict[str, dict]


BF16, FP8 = {"compile": True}, {"compile": True, "precision": "fp8"}
BOTH = {"bf16": BF16, "fp8": FP8}
CASES = {
    "0.6b": Case(SMALL, 8192, 2, 4, {**BOTH, "bf16, FSDP2": {**BF16, "backend": "fsdp"}}),
    "1.3b": Case({**MIDDLE, **VOCAB}, 2048, 4, 8, BOTH),
    "2.7b": Case({**LARGE, **VOCAB}, 2048, 2, 16, BOTH),
}
ROOMY_BYTES = 120e9  # memory of a GPU that holds all variants at once


def contestant(turns: Turns, task: GpuTask, settings: dict) -> None:
    """Trains as one rank of `llmtrain pretrain` does, without its files. One piece of work is a step."""
    mesh, steps = init_mesh(ONE_RANK, None, timeout_s=60), task.steps()
    config = EngineConfig(**settings)
    engine = build_trained(Role("policy", task.model, ONE_RANK, config, task.source(), OPTIM, task.total_steps), mesh)
    while turns.wait():
        step = next(steps)
        turns.done(engine.train_step(step, token_loss, count_trained(step, mesh)).loss)
    shutdown()


def task_of(case: Case, args: argparse.Namespace) -> GpuTask:
    model = resolve_model(ModelConfig(**{"max_positions": case.seq_len, **case.model}))
    steps = args.warmup + args.steps * args.rounds
    return GpuTask(model, case.micro_seqs, case.seq_len, steps, "bf16", case.micro_batches)


def contestants(variants: dict[str, dict]) -> dict[str, partial]:
    return {name: partial(contestant, settings=settings) for name, settings in variants.items()}


def races(case: Case) -> list[dict[str, partial]]:
    """Returns groups of contestants that run together: all, or one after the other where memory is short."""
    together = torch.cuda.get_device_properties(0).total_memory > ROOMY_BYTES
    groups = [case.variants] if together else [{name: settings} for name, settings in case.variants.items()]
    return [contestants(group) for group in groups]


def measure(case: Case, args: argparse.Namespace) -> dict:
    """Measures all variants of a size."""
    task = task_of(case, args)
    flops, tokens = train_flops_per_token(task.model, task.seq_len), args.steps * task.step_tokens * task.micro_batches
    record = {"task": {**asdict(task), "model": task.model.model_dump()}, "flops_per_token": flops, "results": {}}
    for group in races(case):
        runs = compete(group, (task,), args.threads, args.warmup, args.steps, args.rounds)
        first = next(iter(runs))
        losses = check_same_work(runs, first, FP8_TOLERANCE)
        timed = {name: turns[1:] for name, turns in runs.items()}
        results = {name: summary(turns, timed[first], tokens) for name, turns in timed.items()}
        print_table(results, losses, first)
        for name, result in results.items():
            result |= {"mfu": mfu(result["tokens_per_s"], flops, torch.cuda.get_device_name()), "losses": losses[name]}
            print(f"  MFU of {name}: {result['mfu']:.1%}", flush=True)
        record["results"] |= results
    return record


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mfu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, help="a size; default: all")
    for name, default in {"warmup": 3, "steps": 1, "rounds": 5, "threads": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument(
        "--profile", action="store_true", help="instead: the kernels of bf16 and fp8, to benchmarks/results/"
    )
    parser.add_argument("--out", help="JSON file to write, after every size")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if not torch.cuda.is_available():
        print("benchmarks.mfu: needs a GPU; `python -m benchmarks.pretrain` compares with peers on a CPU")
        return 2
    described, sizes = environment("benchmarks.mfu", ("torch", "deepspeed"), args.threads), {}
    print(described["gpu"])
    if mfu(1.0, 1.0, described["gpu"]) is None:
        print("benchmarks.mfu: the peak of this GPU is not known; add it to PEAK_FLOPS in benchmarks/standings.py")
        return 2
    for name in [args.only] if args.only else CASES:
        case = CASES[name]
        task = task_of(case, args)
        millions = parameter_count(task.model) / 1e6
        print(
            f"\n{name}: {millions:.0f}M parameters, {task.micro_batches} x {task.seqs} x {task.seq_len} tokens a step"
        )
        if args.profile:
            write_profile(contestants(BOTH), task, args.threads, Path(PROFILE.format(name)), by_difference=False)
            continue
        sizes[name] = measure(case, args)
        if args.out:
            Path(args.out).write_text(json.dumps({**described, "sizes": sizes}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
