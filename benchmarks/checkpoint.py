"""Measures how long a save delays training: synchronous and in the background, in turns.

Both train the same model on one rank and save the same state (fp32 weights and both moments) to the same disk. "stall"
is how long the loop stops; "slowdown" is how much longer the steps take that run while the thread writes.

    python -m benchmarks.checkpoint [--out benchmarks/results/checkpoint.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Turns, compete, environment
from benchmarks.pretrain import ONE_RANK, OPTIM, Task
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import CheckpointConfig, EngineConfig, ModelConfig
from llmtrain.model.decoder import parameter_shapes

QUIET_STEPS = 3  # measured before each save: the time of a step without a save


def train_and_save(turns: Turns, task: Task, directory: str, background: bool) -> None:
    """Does pieces of work: some steps, a save, and steps until it is on disk."""
    from llmtrain.checkpoint.saver import Saver
    from llmtrain.engine.build import Role, build_trained
    from llmtrain.losses.token import token_loss
    from llmtrain.parallel.mesh import init_mesh, shutdown
    from llmtrain.trainer.batches import count_trained

    mesh, settings, batch = init_mesh(ONE_RANK, None, timeout_s=60), EngineConfig(), next(task.batches())
    engine = build_trained(Role("policy", task.model, ONE_RANK, settings, task.source(), OPTIM, task.total_steps), mesh)
    checkpoint = CheckpointConfig(keep=1, background=background)
    group = mesh.side_group(timeout_s=60) if background else mesh
    saver = Saver(f"{directory}/{background}", engine, parameter_shapes(task.model), checkpoint, group)

    def step() -> None:
        engine.train_step([batch], token_loss, count_trained([batch], mesh))

    while turns.wait():
        quiet_s = statistics.median(timed(step) for _ in range(QUIET_STEPS))
        stall_s = timed(partial(saver.save, {"step": engine.step}))
        busy_s = [timed(step)]
        while saver.in_flight is not None and saver.in_flight.is_alive():
            busy_s.append(timed(step))
        saver.wait()
        turns.done({"stall_s": stall_s, "step_s": quiet_s, "slowdown_s": sum(busy_s) - quiet_s * len(busy_s)})
    saver.close()
    shutdown()


def timed(action: Callable[[], None]) -> float:
    """Returns the seconds that an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def summary(turns: list[dict]) -> dict[str, float]:
    """Returns medians over all saves of all rounds, and the worst stall."""
    saves = [save for turn in turns for save in turn["values"]]
    medians = {name: statistics.median(save[name] for save in saves) for name in saves[0]}
    return {**medians, "worst_stall_s": max(save["stall_s"] for save in saves), "peak_bytes": turns[-1]["peak_bytes"]}


def stall_ratios(runs: dict[str, list[dict]]) -> list[float]:
    """Returns for each round the median background stall over the median synchronous one."""
    medians = {
        name: [statistics.median(save["stall_s"] for save in turn["values"]) for turn in turns]
        for name, turns in runs.items()
    }
    return [b / s for b, s in zip(medians["background"], medians["synchronous"], strict=True)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    sizes = {"hidden-size": 384, "layers": 12, "ffn-size": 1024, "heads": 6, "kv-heads": 2, "vocab": 16384}
    work = {"seq-len": 64, "seqs": 2, "saves": 2, "rounds": 5, "threads": 2}
    for name, default in {**sizes, **work}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--directory", help="on the disk to save to; a temporary one where TMPDIR says")
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args()


def task_of(args: argparse.Namespace) -> Task:
    model = ModelConfig(
        num_layers=args.layers, hidden_size=args.hidden_size, ffn_size=args.ffn_size, num_heads=args.heads,
        num_kv_heads=args.kv_heads, vocab_size=args.vocab, max_positions=args.seq_len, tie_embeddings=True,
    )  # fmt: skip
    return Task(resolve_model(model), args.seqs, args.seq_len, 1, "bf16")  # one batch, repeated


def main() -> None:
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    task = task_of(args)
    state_bytes = 12 * sum(torch.Size(shape).numel() for shape in parameter_shapes(task.model).values())
    contestants = {
        "synchronous": partial(train_and_save, background=False),
        "background": partial(train_and_save, background=True),
    }
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        runs = compete(contestants, (task, directory), args.threads, 1, args.saves, args.rounds)
    timed_runs = {name: turns[1:] for name, turns in runs.items()}
    results, ratios = {name: summary(turns) for name, turns in timed_runs.items()}, stall_ratios(timed_runs)
    first = {name: turns[0]["values"][0]["stall_s"] for name, turns in runs.items()}
    print(f"{state_bytes / 12e6:.1f}M parameters, {state_bytes / 1e6:.0f} MB a checkpoint")
    for name, r in results.items():
        print(
            f"{name:12} stall {r['stall_s'] * 1e3:7.1f} ms (worst {r['worst_stall_s'] * 1e3:.1f}, first "
            f"{first[name] * 1e3:.1f})  slowdown {r['slowdown_s'] * 1e3:6.1f} ms  step {r['step_s'] * 1e3:.0f} ms  "
            f"peak {r['peak_bytes'] / 1e6:.0f} MB"
        )
    print(f"stall ratio: median 1/{1 / statistics.median(ratios):.1f}, rounds {' '.join(f'{x:.4f}' for x in ratios)}")
    if args.out:
        versions = environment("benchmarks.checkpoint", ("torch", "deepspeed"), args.threads)
        record = {**versions, "state_bytes": state_bytes, "model": task.model.model_dump(), "results": results}
        record |= {"stall_ratio": statistics.median(ratios), "stall_ratios": ratios, "first_stall_s": first}
        Path(args.out).write_text(json.dumps({**record, "rounds": runs}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
