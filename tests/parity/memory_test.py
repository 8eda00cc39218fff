"""Model states that engines hold are those of the formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

WORKER = Path(__file__).with_name("memory_worker.py")
TOLERANCE = 0.01  # the optimizer's counters of steps, padding
# 1.6M parameters; DeepSpeed's stage 3 shards matrices of more than 10^5 elements
MODEL = {
    "model": {"hidden_size": 320, "ffn_size": 1024, "num_kv_heads": 4, "head_dim": 80, "vocab_size": 512},
    "num_layers": 1,
}
LORA = {"rank": 8, "targets": ["q", "k", "v", "o", "gate", "up", "down"]}
ADAPTED = {"model": {**MODEL["model"], "lora": LORA}}

LAYOUTS = [
    {"dp_replicate": 4, "zero_stage": 0},
    {"dp_replicate": 4, "zero_stage": 0, "optimizer": "muon"},
    {"dp_shard": 4, "zero_stage": 1},
    {"dp_shard": 4, "zero_stage": 1, "precision": "bf16"},
    {"dp_shard": 4, "zero_stage": 2, "precision": "bf16"},
    {"dp_shard": 4, "zero_stage": 1, "precision": "bf16", "optimizer": "muon"},
    {"dp_shard": 4, "zero_stage": 3},
    {"dp_shard": 4, "zero_stage": 3, "precision": "bf16"},
    {"dp_shard": 4, "backend": "fsdp"},
    {"dp_shard": 2, "cp": 2, "backend": "fsdp", "precision": "bf16", "optimizer": "muon"},
    {"dp_replicate": 2, "dp_shard": 2, "backend": "fsdp", "precision": "bf16"},
    {"tp": 2, "dp_shard": 2, "zero_stage": 1, "precision": "bf16"},
    {"pp": 2, "dp_shard": 2, "zero_stage": 1, "precision": "bf16", "num_layers": 2},
    {"pp": 2, "dp_shard": 2, "backend": "fsdp", "precision": "bf16", "num_layers": 2},
    {"pp": 2, "tp": 2, "zero_stage": 3, "num_layers": 2},
    {"dp_shard": 4, "zero_stage": 1, "precision": "bf16", **ADAPTED},  # masters and moments of adapters alone
    {"dp_shard": 2, "tp": 2, "backend": "fsdp", **ADAPTED},
]


def test_held_bytes_are_those_of_the_formula(forked: Callable) -> None:
    layouts = [{**MODEL, **layout} for layout in LAYOUTS]
    result = forked(4, WORKER, json.dumps(layouts), timeout_s=250)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        print(line)
        assert "error" not in line, line
        for stage in line["stages"]:
            assert stage["formula"].keys() >= {"weights", "gradients", "optimizer"}
            for name, size in stage["formula"].items():
                assert abs(stage["measured"][name] - size) <= TOLERANCE * size, (name, line)
