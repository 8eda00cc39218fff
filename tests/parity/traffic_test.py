"""Bytes counted on every axis in one step are those of the formula, for each way to share the work; exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.matrix import runs_here

WORKER = Path(__file__).with_name("traffic_worker.py")
# Nothing divides by 4: rows of the vocabulary and of ffn matrices, elements of vectors.
ODD = {"model": {"hidden_size": 34, "head_dim": 6, "ffn_size": 51, "vocab_size": 67}, "num_layers": 2}
LARGE = {
    "model": {"hidden_size": 320, "head_dim": 80, "ffn_size": 320},
    "num_layers": 3,
}  # stage 3 frees them
MOE = {"model": {"moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "dense_layers": [1]}}}
ADAPTED = {"model": {"lora": {"rank": 4, "targets": ["q", "v", "o", "down"]}}}
LATENT = {"kv_rank": 16, "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 6}
MLA = {"attention": "mla", "num_kv_heads": 4, "mla": LATENT}
FURTHER = {"model": {**MLA, "moe": MOE["model"]["moe"] | {"dense_layers": [0]}, "mtp_layers": 2}}
ZERO_BUBBLE = {"schedule": "interleaved_zero_bubble", "virtual_stages": 2}

EACH_ONCE = [  # each axis and each engine once
    {"dp_replicate": 4, "zero_stage": 0},
    {"dp_shard": 4, "zero_stage": 1, **ODD},
    {"dp_shard": 4, "zero_stage": 2, "precision": "bf16"},
    {"dp_shard": 4, "zero_stage": 3, "microbatches": 3, **ODD},
    {"dp_shard": 4, "backend": "fsdp", **ODD},
    {"tp": 4, "zero_stage": 0, "sequence_parallel": False, "remat": "full"},
    {"tp": 2, "dp_shard": 2, "zero_stage": 1, "remat": "selective"},
    {"cp": 2, "tp": 2, "zero_stage": 1, "context": "ring", "remat": "full"},
    {"pp": 2, "dp_shard": 2, "backend": "fsdp", "microbatches": 4},
    {"dp_shard": 4, "ep": 2, "zero_stage": 1, **MOE},
    {"dp_shard": 2, "tp": 2, "ep": 2, "zero_stage": 1, "inexact": "tp ", **MOE},
    {"dp_shard": 4, "ep": 2, "backend": "fsdp", **FURTHER},
    {"pp": 2, "tp": 2, "zero_stage": 1, **ADAPTED},
    {"cp": 2, "dp_shard": 2, "backend": "fsdp", "context": "alltoall", "model": MLA},
]
QUICK = [{"num_layers": 2, **layout} for layout in EACH_ONCE]
MORE = [
    {"dp_replicate": 2, "dp_shard": 2, "backend": "fsdp", "reshard": False, "precision": "bf16", **ODD},
    {"cp": 2, "dp_shard": 2, "zero_stage": 2, "context": "alltoall"},
    {"cp": 4, "backend": "fsdp", "context": "allgather"},
    {"pp": 2, "tp": 2, "zero_stage": 1},
    {"pp": 2, "dp_shard": 2, "zero_stage": 1, "microbatches": 4, "schedule": "interleaved_1f1b", "virtual_stages": 2},
    {"pp": 2, "cp": 2, "zero_stage": 2, "microbatches": 4, "schedule": "zbv", "virtual_stages": 2, "tied": False},
    {"pp": 2, "dp_shard": 2, "zero_stage": 1, "microbatches": 4, **ZERO_BUBBLE},
    {"dp_shard": 4, "ep": 4, "backend": "fsdp", **MOE},
    {"dp_shard": 2, "cp": 2, "ep": 2, "zero_stage": 2, "context": "alltoall", **MOE},
    {"dp_shard": 2, "tp": 2, "ep": 2, "backend": "fsdp", "remat": "full", "inexact": "tp ", **MOE},
    {"pp": 2, "dp_shard": 2, "ep": 2, "backend": "fsdp", "microbatches": 4, "precision": "bf16", **MOE},
    {"dp_shard": 4, "ep": 4, "zero_stage": 1, "remat": "selective", **FURTHER},
    {"dp_shard": 4, "ep": 2, "backend": "fsdp", "remat": "full", "reshard": False, **FURTHER},
    {"dp_shard": 4, "zero_stage": 3, **ADAPTED},
    {"cp": 2, "dp_shard": 2, "zero_stage": 1, "context": "ring", "model": MLA},
    # these change DeepSpeed's setting: the last ones
    {"dp_shard": 4, "zero_stage": 3, "reuse": 900_000, **LARGE},
    {"dp_shard": 4, "zero_stage": 3, "reuse": 900_000, "tied": False, "offload": "params", **LARGE},
]


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_counted_bytes_are_those_of_the_formula(forked: Callable, layouts: list[dict]) -> None:
    layouts = [layout for layout in layouts if runs_here(layout)]
    result = forked(4, WORKER, json.dumps(layouts), timeout_s=250)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    for line in lines:
        print(line["layout"], *line["items"], sep="\n    ")
        assert line["counted"] == line["formula"], line
        assert "ep" not in line["layout"] or any("all_to_all" in key for key in line["counted"]), line
    assert [line["layout"] for line in lines] == layouts, result.stdout[-3000:]
    padded = [line["layout"] for line in lines if any(what == "padding" for _, _, what, _ in line["items"])]
    assert padded == [layout for layout in layouts if layout.get("model") == ODD["model"]]
