"""Rows that tiles compute (`model.kernels.backends.TILE_TOKENS`), against one process that masks all scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("long_rows_worker.py")
TOLERANCE = 1e-5  # as in layouts_test; seen: 3e-6
WINDOW = {"layer_types": ["sliding", "full"], "sliding_window": 300}
METHODS = ("ring", "allgather", "alltoall")
FSDP, ZERO = {"backend": "fsdp"}, {"zero_stage": 1}


def layout(method: str, engine: dict, task: str, **model: object) -> dict:
    usual = {"cp": 2, "context": method, "num_layers": 2, "logprob_chunk_tokens": 1024, "grad_clip": 0}
    return {**usual, **engine, "task": task, "model": model}


SHORT = [
    layout("ring", ZERO, "documents"),
    layout("allgather", {**ZERO, "remat": "selective"}, "documents", **WINDOW),
    layout("alltoall", FSDP, "branches"),
    layout("ring", {**FSDP, "remat": "selective"}, "branches"),
]
LONG = [
    layout(method, engine, task) for method in METHODS for engine in (ZERO, FSDP) for task in ("documents", "branches")
]
LONG += [layout(method, ZERO, "documents", **WINDOW) for method in METHODS[1:]]
LONG += [layout("alltoall", FSDP, "documents", **WINDOW, attention_softcap=5.0)]
LONG += [{**layout("ring", engine, "documents"), "cp": 1, "dp_shard": 2} for engine in (ZERO, FSDP)]


def check(run: Callable, layouts: list[dict], tokens: int, timeout_s: float) -> None:
    result = run(2, WORKER, json.dumps(layouts), str(tokens), timeout_s=timeout_s)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        assert "error" not in line, line
        for measure in ("loss", "norm", "grad", "weight", "score"):
            assert line[measure] <= TOLERANCE, line


def test_rows_of_a_thousand_tokens(forked: Callable) -> None:
    check(forked, SHORT, 1024, timeout_s=100)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_of_four_thousand_tokens(forked: Callable) -> None:
    check(forked, LONG, 4096, timeout_s=800)
