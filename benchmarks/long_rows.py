"""Measures a training step on one long row: one rank, and two by each method of context parallelism.

A tiny model, so that attention and what grows with the row are all there is. CPU time is summed over ranks: other
programs on the machine change it little, and wall time a lot. Memory is the most that torch's allocator held during a
step beyond what was there before it, on the fuller rank; `plan` is what `llmtrain plan` says of activations, attention
and logits.

    python -m benchmarks.long_rows [--cases documents:16384,causal:32768] [--out benchmarks/results/long_rows.json]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch.distributed import TCPStore
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import environment
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.types import Batch

CASES = "documents:16384,documents:65536,documents:131072,causal:32768"
WAYS = ("one rank", "ring", "allgather", "alltoall")
MEAN_TOKENS = 2048  # of a document; lengths are drawn exponentially
SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_size": 192, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 256}
SAME = 1e-4  # largest relative difference of loss and gradient norm between the ways


def config_of(kind: str, tokens: int, way: str) -> Config:
    cut = {} if way == "one rank" else {"cp": 2, "context": way}
    return Config(
        model=ModelConfig(**SHAPE, max_positions=tokens),
        parallel=ParallelConfig(dp_shard=1, **cut),
        engine=EngineConfig(backend="fsdp", precision="fp32"),  # DeepSpeed has buffers of 2 GB, however small the model
        data=DataConfig(mask_documents=kind == "documents"),
        train=TrainConfig(seq_len=tokens, micro_batch_seqs=1, global_batch_seqs=1),
    )


def row_of(kind: str, tokens: int, vocabulary: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, tokens + 1), generator=g)
    places = torch.arange(tokens)
    ends = torch.empty(tokens).exponential_(1 / MEAN_TOKENS, generator=g).ceil().long().cumsum(0)
    segments = torch.searchsorted(ends, places, right=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends])[segments]
    masked = kind == "documents"
    positions = (places - starts if masked else places)[None]
    found = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(1, tokens, dtype=torch.bool), positions)
    return Batch(*found, segments[None] if masked else None)


def allocated(action: Callable[[], object]) -> int:
    """Returns the most bytes that torch's CPU allocator held at a time beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.cumsum(0).max())


def rank_of_job(rank: int, ranks: int, port: int, kind: str, tokens: int, way: str, results: SimpleQueue) -> None:
    """Trains two steps on one rank, the second under the allocator's profile, and reports."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    from llmtrain.engine.build import Role, build_trained
    from llmtrain.losses.token import token_loss
    from llmtrain.parallel.mesh import init_mesh, shutdown

    torch.set_num_threads(1)
    config, batch = config_of(kind, tokens, way), row_of(kind, tokens, SHAPE["vocab_size"])
    model = resolve_model(config.model)
    shapes = parameter_shapes(model)
    mesh = init_mesh(config.parallel, None, timeout_s=600)

    def source(name: str) -> torch.Tensor:
        return init_tensor(name, shapes[name], model, seed=0)

    engine = build_trained(Role("policy", model, config.parallel, config.engine, source, OptimConfig(), 10), mesh)
    step = partial(engine.train_step, [batch], token_loss, torch.tensor(tokens))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    stats = step()
    found = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}
    results.put({**found, "loss": stats.loss, "norm": stats.grad_norm, "allocated_bytes": allocated(step)})
    shutdown()


def measured(kind: str, tokens: int, way: str) -> dict:
    """Runs the ranks of one way. Raises RuntimeError when one dies."""
    context, ranks = get_context("spawn"), 1 if way == "one rank" else 2
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.SimpleQueue()
    args = (ranks, store.port, kind, tokens, way, results)
    processes = [context.Process(target=rank_of_job, args=(rank, *args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{way} on {kind} of {tokens} tokens died; its traceback is above")
    each = [results.get() for _ in range(ranks)]
    return {
        "cpu_s": sum(r["cpu_s"] for r in each),
        "wall_s": max(r["wall_s"] for r in each),
        "allocated_bytes": max(r["allocated_bytes"] for r in each),
        "planned_bytes": planned(kind, tokens, way),
        "loss": each[0]["loss"],
        "norm": each[0]["norm"],
    }


def planned(kind: str, tokens: int, way: str) -> int:
    from llmtrain.scaling.plan import plan

    memory = plan(config_of(kind, tokens, way), 1 if way == "one rank" else 2).memory
    return memory.total - memory.weights - memory.optimizer


def check_same(results: dict[str, dict]) -> None:
    """Raises RuntimeError when the ways compute different things."""
    for name in ("loss", "norm"):
        values = [result[name] for result in results.values()]
        if max(values) - min(values) > SAME * max(values):
            raise RuntimeError(f"the ways differ in {name}: {values}")


def show(kind: str, tokens: int, results: dict[str, dict]) -> None:
    print(f"\n{kind}, {tokens:,} tokens\n{'':12}{'CPU s':>8}{'wall s':>8}{'MB a rank':>11}{'plan MB':>9}")
    for way, r in results.items():
        megabytes = f"{r['allocated_bytes'] / 1e6:>11.0f}{r['planned_bytes'] / 1e6:>9.0f}"
        print(f"{way:12}{r['cpu_s']:>8.1f}{r['wall_s']:>8.1f}{megabytes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_rows", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=CASES, help="kind:tokens,... ; kinds: documents, causal")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    records = []
    for case in args.cases.split(","):
        kind, _, length = case.partition(":")
        tokens = int(length)
        results = {way: measured(kind, tokens, way) for way in args.ways.split(",")}
        show(kind, tokens, results)
        check_same(results)
        records.append({"kind": kind, "tokens": tokens, "results": results})
        if args.out:  # written after every case, as the run is long
            written = {**environment("benchmarks.long_rows", ("torch",), 1), "cases": records}
            Path(args.out).write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
