"""Adapters on any mesh against one plain process: loss, their gradients, norm, merged weights, scores; the base keeps
its bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.layouts_test import check, check_all

ALL = {"lora": {"rank": 4, "alpha": 6.0, "targets": ["q", "k", "v", "o", "gate", "up", "down"]}}
SOME = {"lora": {"rank": 4, "alpha": 6.0, "targets": ["v", "down"]}}

QUICK = [  # all of 4 ranks, in one start
    {"pp": 2, "tp": 2, "zero_stage": 1, "model": ALL},
    {"pp": 2, "tp": 2, "backend": "fsdp", "model": SOME},
    {"dp_shard": 2, "tp": 2, "sequence_parallel": False, "zero_stage": 3, "model": ALL},
]
ATTENTION = {"lora": {"rank": 4, "alpha": 6.0, "targets": ["q", "k", "v", "o"]}}
MOE = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "dense_layers": [0], "balance": "aux", "aux_coef": 0.3}
LATENT = {
    **{"family": "deepseek-v3", "num_kv_heads": 4, "moe": MOE | {"gate": "sigmoid", "selection_bias": True}},
    "mla": {"q_rank": 12, "kv_rank": 8, "nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 6},
    "lora": {"rank": 4, "alpha": 6.0, "targets": ["q_a", "q_b", "kv_a", "kv_b", "o"]},
}
SLOW = [
    {"dp_shard": 2, "ep": 2, "zero_stage": 1, "model": ATTENTION | {"moe": MOE}},
    {"dp_shard": 2, "ep": 2, "zero_stage": 3, "model": ATTENTION | {"moe": MOE}},
    {"dp_shard": 2, "ep": 2, "backend": "fsdp", "model": ATTENTION | {"moe": MOE}},
    {"tp": 2, "zero_stage": 1, "model": LATENT},
    {"tp": 2, "backend": "fsdp", "sequence_parallel": False, "tied": False, "model": LATENT},
    {"dp_shard": 2, "tp": 2, "backend": "fsdp", "tied": False, "model": ALL},
    *({"dp_shard": 2, "zero_stage": stage, "model": ALL} for stage in (0, 1, 2, 3)),
    {"dp_replicate": 2, "zero_stage": 0, "model": ALL},
    {"dp_shard": 2, "backend": "fsdp", "model": ALL},
    {"dp_shard": 2, "backend": "fsdp", "reshard": False, "model": SOME},
    {"tp": 2, "zero_stage": 1, "model": ALL},
    {"tp": 2, "zero_stage": 1, "sequence_parallel": False, "model": ALL},
    {"tp": 2, "backend": "fsdp", "sequence_parallel": False, "model": SOME},
    {"tp": 4, "zero_stage": 1, "model": ALL | {"num_kv_heads": 2}},  # K/V heads whole on every rank
    {"tp": 4, "backend": "fsdp", "sequence_parallel": False, "model": ALL | {"num_kv_heads": 1}},
    {"pp": 2, "zero_stage": 1, "model": ALL},
    {"pp": 2, "backend": "fsdp", "tied": False, "model": SOME},
    {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "zero_stage": 1, "model": ALL},
    {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_zero_bubble", "zero_stage": 1, "model": ALL},
    {"pp": 2, "virtual_stages": 2, "schedule": "zbv", "zero_stage": 1, "model": ALL},
    {"cp": 2, "zero_stage": 3, "model": ALL},
    {"cp": 2, "dp_shard": 2, "backend": "fsdp", "context": "alltoall", "model": ALL},
    {"tp": 2, "zero_stage": 1, "remat": "selective", "model": ALL},
    {"pp": 2, "backend": "fsdp", "remat": "full", "model": ALL},
    {"dp_shard": 2, "zero_stage": 2, "offload": "optimizer", "model": ALL},
    {"dp_shard": 2, "zero_stage": 3, "offload": "params", "model": ALL},
    {"dp_shard": 2, "backend": "fsdp", "offload": "params", "model": ALL},
    {"tp": 2, "zero_stage": 1, "compile": True, "model": ALL},
    {"dp_shard": 2, "backend": "fsdp", "compile": True, "model": SOME},
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks(forked: Callable) -> None:
    check(forked, 4, QUICK, timeout_s=500)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_matrix(forked: Callable) -> None:
    check_all(forked, SLOW, timeout_s=900)
