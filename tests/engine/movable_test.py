"""Engines of every kind go to the host and come back bit for bit, and leave little behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("movable_worker.py")
KINDS = [
    {"zero_stage": 1},  # masters are the weights
    *({"zero_stage": stage, "precision": "bf16"} for stage in (2, 3)),
    {"backend": "fsdp", "precision": "bf16"},
]
MOE = {"moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 24, "balance": "bias", "selection_bias": True}}
MORE = [
    {"dp_shard": 2, "zero_stage": 1, "precision": "bf16"},
    {"dp_shard": 2, "zero_stage": 2},
    {"dp_shard": 2, "zero_stage": 3},
    {"dp_shard": 2, "backend": "fsdp"},
    {"dp_replicate": 2, "zero_stage": 0},
    {"pp": 2, "zero_stage": 3, "precision": "bf16"},
    {"pp": 2, "backend": "fsdp", "schedule": "zbv", "virtual_stages": 2, "reshard": False, "num_layers": 4},
    {"tp": 2, "zero_stage": 2},
    {"dp_shard": 2, "ep": 2, "zero_stage": 2, **MOE},
    {"dp_shard": 2, "zero_stage": 1, "optimizer": "muon"},
    {"dp_shard": 2, "backend": "fsdp", "optimizer": "muon"},
    {"dp_shard": 2, "zero_stage": 2, "offload": "optimizer"},
    {"dp_shard": 2, "zero_stage": 3, "offload": "params"},
    {"dp_shard": 2, "backend": "fsdp", "offload": "params", "precision": "fp16"},
    {"dp_shard": 2, "zero_stage": 1, "model": {"lora": {"rank": 2}}},
]
COUNTERS = 200  # bytes that stay: the steps that optimizers count


def check(forked: Callable, ranks: int, layouts: list[dict]) -> None:
    result = forked(ranks, WORKER, json.dumps(layouts), timeout_s=250)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        print(line)
        for seen in line["ranks"]:
            assert seen["same"] and seen["refused"], line
            assert seen["away"] <= COUNTERS < seen["here"] or "offload" in line["layout"], (
                line
            )  # lies on the host anyway


def test_to_the_host_and_back(forked: Callable) -> None:
    check(forked, 2, [{"dp_shard": 2, "num_layers": 2, **kind} for kind in KINDS])


@pytest.mark.slow
def test_with_every_feature(forked: Callable) -> None:
    check(forked, 2, [{"num_layers": 2, **layout} for layout in MORE])
