"""Compares attention backends: forward and backward of a few layers that share a mask, rebuilt each time.

It runs every backend that is valid on the machine; on a CPU also the two implementations of sdpa: torch's fused kernel
and the plain formula. It prints for each kind of row which is the fastest, and whether
`engine.attention: auto` chooses it.

    python -m benchmarks.attention [--lengths 512,2048] [--out benchmarks/results/attention.json]
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Turns, compete, environment
from benchmarks.standings import check_same_work, ratio, summary
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.machine import fast_precision
from llmtrain.config.schema import ModelConfig
from llmtrain.model.kernels.backends import Kernels, attend, fastest, flex_kernel, usable, visibility
from llmtrain.model.kernels.sdpa import plain_attention

HEADS, KV_HEADS, WIDTH, LAYERS = 16, 4, 64, 4
MEAN_TOKENS = 400  # tokens of a document; lengths are drawn exponentially, as in text: many short, few long
KINDS = ("causal", "documents", "window", "branches")
WAYS = ("sdpa, fused", "sdpa, plain")  # implementations that sdpa chooses between on a CPU, raced beside it
NEAR = 0.95  # this share of the fastest's speed counts as equally fast


@dataclass(frozen=True)
class Case:
    """Describes the rows that are attended to."""

    kind: str
    tokens: int  # in a row
    rows: int
    dtype: str

    @property
    def window(self) -> int | None:
        return self.tokens // 4 if self.kind == "window" else None

    def ids(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Returns segment ids, ends (see `types.Batch`) and positions, [rows, tokens]."""
        places = torch.arange(self.tokens).repeat(self.rows, 1)
        if self.kind == "causal":
            return None, None, places
        if self.kind == "branches":  # a prompt of half the row and eight samples
            half, sample = self.tokens // 2, max(1, self.tokens // 16)
            ends = torch.where(places < half, self.tokens, half + ((places - half) // sample + 1) * sample)
            return torch.zeros_like(places), ends, places
        draws = torch.empty(self.rows, self.tokens).exponential_(1 / MEAN_TOKENS, generator=_generator())
        ends = draws.ceil().long().cumsum(1)
        return torch.searchsorted(ends, places, right=True), None, _restarting(places, ends)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _restarting(places: Tensor, ends: Tensor) -> Tensor:
    """Returns positions that restart at `ends` [rows, documents]."""
    document = torch.searchsorted(ends, places, right=True)
    return places - F.pad(ends, (1, 0)).gather(1, document)


def layer(name: str, kernels: Kernels, mask: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes one layer with one contestant. q, k, v [rows, heads, tokens, WIDTH]."""
    if name == "sdpa, plain":
        return plain_attention(q, k, v, mask, None)
    if name == "sdpa, fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return attend(q, k, v, mask, kernels)


def kernels_of(name: str, device: torch.device) -> Kernels:
    backend = name.partition(",")[0]
    return Kernels((backend,), flex=flex_kernel(device, None) if backend == "flex" else None)


def contestant(turns: Turns, case: Case, device: str, name: str) -> None:
    """Does pieces of work: the mask, LAYERS layers forward, and their backward; the value is a checksum of the
    results."""
    where, dtype = torch.device(device), getattr(torch, case.dtype)
    ids = [None if x is None else x.to(where) for x in case.ids()]
    shapes = [(case.rows, n, case.tokens, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)]
    generator = _generator()
    inputs = [torch.randn(shape, generator=generator).to(where, dtype).requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator).to(where, dtype)
    kernels = kernels_of(name, where)
    turns.count_memory()
    while turns.wait():
        mask = visibility(*ids, case.window, kernels)
        out = sum(layer(name, kernels, mask, *inputs) for _ in range(LAYERS))
        found = [out, *torch.autograd.grad(out, inputs, grad)]
        turns.done(sum(x.detach().float().norm().item() for x in found))


def race(case: Case, names: list[str], device: str, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Returns the measurements of each contestant's rounds, without the first, which compiles.

    Raises RuntimeError when they compute different things.
    """
    contestants = {name: partial(contestant, name=name) for name in names}
    runs = compete(contestants, (case, device), args.threads, 2, args.work, args.rounds)
    check_same_work(runs, "sdpa")
    return {name: turns[1:] for name, turns in runs.items()}


def auto_choice(case: Case, valid: tuple[str, ...]) -> str:
    """Returns the backend that `engine.attention: auto` chooses for such rows."""
    masked, branches = case.kind != "causal", case.kind == "branches"
    return fastest(valid, masked, branches, False, case.tokens)


def judged(case: Case, runs: dict[str, list[dict]], chosen: str, work: int) -> dict:
    """Returns medians, the fastest, and whether `chosen` is as fast."""
    results = {name: summary(turns, runs["sdpa"], work * case.rows * case.tokens) for name, turns in runs.items()}
    best = max(results, key=lambda name: results[name]["ratio"])
    share = ratio(runs[chosen], runs[best])
    return {
        "case": asdict(case),
        "results": results,
        "fastest": best,
        "auto": chosen,
        "auto_against_fastest": share,
        "met": share >= NEAR,
        "runs": runs,
    }


def show(record: dict) -> None:
    case = Case(**record["case"])
    print(f"\n{case.kind}: {case.rows} x {case.tokens} tokens, {case.dtype}")
    print(f"{'':14}{'tokens/s':>12}{'min - max':>24}{'against sdpa':>14}{'peak MB':>10}")
    for name, r in record["results"].items():
        spread = f"{r['slowest']:.0f} - {r['fastest']:.0f}"
        print(f"{name:14}{r['tokens_per_s']:>12.0f}{spread:>24}{r['ratio']:>14.2f}{r['peak_bytes'] / 1e6:>10.0f}")
    verdict = "met" if record["met"] else "MISSED"
    print(f"fastest: {record['fastest']}; auto takes {record['auto']}: {verdict}", flush=True)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="512,2048,8192" if gpu else "256,512,1024,2048", help="tokens a row")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--tokens", type=int, default=65_536 if gpu else 2048, help="of all rows together")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: what this machine multiplies fast")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=int, default=10 if gpu else 1, help="passes a turn")
    parser.add_argument("--rounds", type=int, default=7 if gpu else 3)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    args.dtype = args.dtype or {"bf16": "bfloat16", "fp32": "float32"}[fast_precision()]
    device = torch.device("cuda" if gpu else "cpu")
    model = resolve_model(ModelConfig(hidden_size=HEADS * WIDTH, num_heads=HEADS, num_kv_heads=KV_HEADS))
    valid = usable(model, device, "bf16" if args.dtype == "bfloat16" else "fp32")
    records = []
    for length in map(int, args.lengths.split(",")):
        for kind in args.kinds.split(","):
            case = Case(kind, length, max(1, args.tokens // length), args.dtype)
            names = [name for name in valid if not (name == "flash" and kind == "branches")] + list(WAYS) * (not gpu)
            records.append(judged(case, race(case, names, str(device), args), auto_choice(case, valid), args.work))
            show(records[-1])
            verdict = (
                f"auto is as fast as the fastest valid backend in {sum(r['met'] for r in records)} of {len(records)}"
            )
            if args.out:  # written after every case, as the run is long
                written = {**environment("benchmarks.attention", ("torch",), args.threads), "verdict": verdict}
                Path(args.out).write_text(json.dumps({**written, "cases": records}, indent=2) + "\n")
    print(f"\n{verdict} cases (at least {NEAR} of its speed)")


if __name__ == "__main__":
    main()
