"""Frozen models: the scores of the unsharded model from a share of its bytes, also after a stay on the host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("frozen_worker.py")
TOLERANCE = 1e-5  # of a log-prob in fp32 to one process
ROUNDING = 0.1  # in bf16
PADDING = 4 * 32  # bytes: the one row of a scalar head lies on one of two ranks, the other has room for it
MOE = {"moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 24, "balance": "bias", "selection_bias": True}}
SCALAR = {"tied": False, "model": {"head": "scalar"}}
ZERO_1, ZERO_3 = {"backend": "deepspeed", "zero_stage": 1}, {"backend": "deepspeed", "zero_stage": 3}
TWO = [
    {"dp_shard": 2, "precision": "bf16", "beside": ZERO_1},
    {"dp_shard": 2, "beside": ZERO_3},
    {"dp_replicate": 2, "backend": "fsdp", "beside": {}},
    {"dp_shard": 2, "ep": 2, **MOE},
    {"pp": 2, "schedule": "zbv", "virtual_stages": 2},
    {"dp_shard": 2, "offload": "params", "backend": "fsdp"},
    {"dp_shard": 2, **SCALAR},
]
FOUR = [
    {"dp_replicate": 2, "dp_shard": 2, "tied": False, "precision": "bf16"},
    {"dp_replicate": 2, "dp_shard": 2, "ep": 2, **MOE},
    {"tp": 2, "dp_shard": 2, "beside": ZERO_3},
    {"pp": 2, "dp_shard": 2, "beside": ZERO_1},
    {"tp": 2, "pp": 2, **SCALAR},
    {"cp": 2, "dp_shard": 2, "context": "ring", "beside": ZERO_1},
]


def share(layout: dict) -> int:
    """Among how many ranks the weights of a stage are divided."""
    return layout.get("dp_replicate", 1) * layout.get("dp_shard", 1) * layout.get("cp", 1)


@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO), (4, FOUR)])
def test_scores_of_the_whole_model_from_a_share_of_its_bytes(forked: Callable, ranks: int, layouts: list[dict]) -> None:
    result = forked(ranks, WORKER, json.dumps(layouts), timeout_s=200)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        layout = line["layout"]
        for seen in line["ranks"]:
            assert seen["equal"] and seen["refused"], line
            assert seen["left"] == seen["gradients"] == 0, line
            assert seen["error"] < (ROUNDING if "precision" in layout else TOLERANCE), line
            pieces, experts = seen["held"] * share(layout), layout.get("ep", 1)  # experts are divided among ep before
            if "schedule" not in layout:  # zbv: the first and the last stage each shard the tied embedding
                assert seen["whole"] <= pieces <= seen["whole"] * experts + PADDING, line
