"""Compares a pretraining step of llmtrain with the usual tools: same weights, rows, tokens, optimizer and clipping.

Each contestant lives in its own process (so that its peak memory is its own) and they run in turns, round by round.
"bf16" is what each one's users get: llmtrain holds bf16 weights and fp32 masters (DeepSpeed's bf16), transformers and
LitGPT hold fp32 weights under autocast. In fp32 all hold fp32 weights.

    python -m benchmarks.pretrain [--out benchmarks/results/pretrain.json] [--profile]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import peers_litgpt, peers_transformers
from benchmarks.common import Contestant, Turns, compete, environment
from benchmarks.profile import write_profile
from benchmarks.standings import check_same_work, mfu, print_table, print_targets, summary, targets
from benchmarks.task import OPTIM, WARMUP_STEPS, Task
from llmtrain.arch.resolve import resolve_model, train_flops_per_token
from llmtrain.config.machine import fast_precision
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.engine.optim import build_optimizer
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.parallel.mesh import Mesh, init_mesh, shutdown
from llmtrain.parallel.pipeline import inputs_of
from llmtrain.parallel.plan import compile_blocks, materialize, parallelize
from llmtrain.types import Scores

ONE_RANK = ParallelConfig()
REFERENCE = "transformers loop"
PROFILE = "benchmarks/results/pretrain_profile.txt"


def llmtrain(
    turns: Turns, task: Task, compiled: bool, backend: str = "deepspeed", chunk_tokens: int | None = None
) -> None:
    """Trains as trainer/pretrain.py does, on one rank."""
    from llmtrain.trainer.batches import count_trained

    mesh, batches = init_mesh(ONE_RANK, None, timeout_s=60), task.batches()
    chosen = {"compile": compiled, "backend": backend, "logprob_chunk_tokens": chunk_tokens}
    settings = EngineConfig(precision=task.precision, **chosen)
    engine = _engine(backend)(
        _decoder(task, mesh, settings), task.source(), mesh, ONE_RANK, settings, OPTIM, task.total_steps
    )
    while turns.wait():
        batch = next(batches)
        turns.done(engine.train_step([batch], token_loss, count_trained([batch], mesh)).loss)
    shutdown()


def _engine(backend: str) -> type:
    if backend == "fsdp":
        from llmtrain.engine.fsdp import FsdpEngine

        return FsdpEngine
    from llmtrain.engine.zero import ZeroEngine

    return ZeroEngine


def _decoder(task: Task, mesh: Mesh, settings: EngineConfig) -> list[Decoder]:
    return parallelize(task.model, mesh, ONE_RANK, settings)


def decoder_loop(turns: Turns, task: Task, compiled: bool) -> None:
    """Trains the same decoder in the same precision without the engine: the difference is DeepSpeed and checks."""
    mesh, batches = init_mesh(ONE_RANK, None, timeout_s=60), task.batches()
    settings = EngineConfig(compile=compiled, precision=task.precision)
    model = masters = _decoder(task, mesh, settings)[0]
    materialize([masters], mesh, task.source())
    if task.precision == "bf16":
        model = _decoder(task, mesh, settings)[0]
        materialize([model], mesh, task.source())
        model.to(torch.bfloat16)
    pairs = [] if model is masters else list(zip(masters.parameters(), model.parameters(), strict=True))
    optimizer = build_optimizer(masters, OPTIM)
    if compiled:
        compile_blocks([model])
    while turns.wait():
        batch = next(batches).to(mesh.device)
        loss = token_loss(Scores(*model(batch.input_ids, **inputs_of(batch, True))), batch)[0] / batch.labels.numel()
        loss.backward()
        for master, p in pairs:
            master.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(masters.parameters(), OPTIM.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for master, p in pairs:
                p.copy_(master)
        optimizer.zero_grad()
        turns.done(loss.item())
    shutdown()


EAGER = {
    "llmtrain": partial(llmtrain, compiled=False),
    "llmtrain without engine": partial(decoder_loop, compiled=False),
    "llmtrain, FSDP2": partial(llmtrain, compiled=False, backend="fsdp"),
    REFERENCE: partial(peers_transformers.loop, compiled=False),
    "Trainer": peers_transformers.trainer,
    "Trainer + DeepSpeed": partial(peers_transformers.trainer, deepspeed=True),
}
COMPILED = {
    "llmtrain, compiled": partial(llmtrain, compiled=True),
    "llmtrain without engine, compiled": partial(decoder_loop, compiled=True),
    f"{REFERENCE}, compiled": partial(peers_transformers.loop, compiled=True),
    "LitGPT, compiled": peers_litgpt.pretrain,
}


def chunked(sizes: str, compiled: bool) -> dict[str, Contestant]:
    """Returns contestants of llmtrain alone, by the number of tokens whose logits are held at a time."""
    return {
        f"llmtrain, {n} tokens": partial(llmtrain, compiled=compiled, chunk_tokens=int(n)) for n in sizes.split(",")
    }


def contestants(compiled: bool) -> dict[str, Contestant]:
    """Returns the contestants that can run here, and prints a note if LitGPT is not installed."""
    found = {**EAGER, **(COMPILED if compiled else {})}
    if not peers_litgpt.installed() and found.pop("LitGPT, compiled", None):
        print("LitGPT is not installed: pip install --no-deps -r benchmarks/litgpt.txt")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain", description=__doc__.splitlines()[0])
    sizes = {"hidden-size": 384, "layers": 8, "ffn-size": 1024, "heads": 6, "kv-heads": 2, "vocab": 16384}
    work = {"seq-len": 512, "seqs": 8, "steps": 1, "rounds": 7, "threads": 2}
    for name, default in {**sizes, **work}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also compiled ones")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: what is fast here")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: CUDA when there is a GPU")
    parser.add_argument("--only", help="names of contestants that contain one of these, separated by |")
    parser.add_argument("--chunks", help="instead: ours by engine.logprob_chunk_tokens, such as 256,1024,2048,4096")
    parser.add_argument("--profile", action="store_true", help=f"instead: where the engine's time goes, to {PROFILE}")
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args()


def task_of(args: argparse.Namespace) -> Task:
    model = ModelConfig(
        num_layers=args.layers, hidden_size=args.hidden_size, ffn_size=args.ffn_size, num_heads=args.heads,
        num_kv_heads=args.kv_heads, vocab_size=args.vocab, max_positions=args.seq_len,
    )  # fmt: skip
    precision = fast_precision() if args.precision == "auto" else args.precision
    return Task(resolve_model(model), args.seqs, args.seq_len, WARMUP_STEPS + args.steps * args.rounds, precision)


def main() -> None:
    args = arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before this process or a contestant looks for a GPU
    os.environ.update(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1")
    task = task_of(args)
    millions = sum(torch.Size(shape).numel() for shape in parameter_shapes(task.model).values()) / 1e6
    work = f"{args.seqs} x {args.seq_len} tokens a step, {task.precision}, {args.threads} threads"
    print(f"{millions:.1f}M parameters, {work}")
    chosen = chunked(args.chunks, args.compile) if args.chunks else contestants(args.compile)
    if args.only:
        chosen = {name: run for name, run in chosen.items() if any(part in name for part in args.only.split("|"))}
    if args.profile:  # profiles the first two: without --only, with and without the engine
        return write_profile(dict(list(chosen.items())[:2]), task, args.threads, Path(PROFILE), by_difference=False)
    before = os.getloadavg()[0]
    runs = compete(chosen, (task,), args.threads, WARMUP_STEPS, args.steps, args.rounds)
    reference = REFERENCE if REFERENCE in runs else next(iter(runs))
    losses = check_same_work(runs, reference)
    timed = {name: turns[1:] for name, turns in runs.items()}
    tokens = args.steps * task.step_tokens
    results = {name: summary(turns, timed[reference], tokens) for name, turns in timed.items()}
    print_table(results, losses, reference)
    flops = train_flops_per_token(task.model, task.seq_len)
    for name, result in results.items() if args.device != "cpu" and torch.cuda.is_available() else ():
        result["mfu"] = mfu(result["tokens_per_s"], flops, torch.cuda.get_device_name())
        print(f"MFU of {name}: {result['mfu']}")
    verdicts = targets(timed)
    print_targets(verdicts, before)
    if args.out:
        packages = ("torch", "deepspeed", "transformers", "accelerate")
        packages += peers_litgpt.PACKAGES if peers_litgpt.installed() else ()
        record = {**environment("benchmarks.pretrain", packages, args.threads), "load_average_before": before}
        record |= {"task": {**asdict(task), "model": task.model.model_dump()}, "results": results, "targets": verdicts}
        Path(args.out).write_text(json.dumps({**record, "losses": losses, "rounds": timed}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
