"""Latent attention, experts beside a shared one and multi-token prediction on two ranks, against one plain process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.layouts_test import check

MLA = {"q_rank": 12, "kv_rank": 8, "nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 6}
MOE = {"num_experts": 4, "expert_ffn_size": 16, "shared_ffn_size": 16, "dense_layers": [0], "balance": "bias"}
MOE |= {"gate": "sigmoid", "selection_bias": True}
V3 = {
    "attention": "mla",
    "rope_interleaved": True,
    "mla": MLA,
    "moe": MOE,
    "num_kv_heads": 4,
    "num_layers": 2,
    "mtp_layers": 2,
}
LITE = V3 | {"mla": {**MLA, "q_rank": None}, "mtp_layers": 0}
FEW = [
    {"tp": 2, "backend": "fsdp", "model": V3},
    {"dp_shard": 2, "zero_stage": 1, "tied": False, "model": V3},
    {"cp": 2, "backend": "fsdp", "context": "ring", "model": LITE},
    {"dp_shard": 2, "ep": 2, "zero_stage": 1, "model": V3},
    {"dp_shard": 2, "ep": 2, "backend": "fsdp", "remat": "full", "model": V3},
]
MORE = [
    {"tp": 2, "zero_stage": 1, "sequence_parallel": False, "tied": False, "model": V3},
    {"dp_shard": 2, "zero_stage": 3, "model": V3},
    {"dp_shard": 2, "backend": "fsdp", "remat": "full", "model": V3},
    {"pp": 2, "zero_stage": 1, "model": LITE},
    {"dp_shard": 2, "zero_stage": 1, "remat": "selective", "optimizer": "muon", "model": V3},
    {"tp": 2, "backend": "fsdp", "optimizer": "muon", "remat": "full", "model": V3},
]
COMPILED = [{"dp_shard": 2, "zero_stage": 2, "compile": True, "model": V3}]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks(forked: Callable) -> None:
    check(forked, 2, FEW, timeout_s=500)


@pytest.mark.slow
def test_two_ranks_otherwise(forked: Callable) -> None:
    check(forked, 2, MORE, timeout_s=240)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled(forked: Callable) -> None:
    check(forked, 2, COMPILED, timeout_s=800)
