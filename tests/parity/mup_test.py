"""muP's factors of learning rate, logits and scores under both engines, against one plain process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.layouts_test import check

MUP = {"mup": {"base_hidden": 8, "base_head_dim": 2}}
MOE = {**MUP, "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "dense_layers": [0]}}
TWO = [
    {"tp": 2, "zero_stage": 1, "model": MUP},
    {"dp_shard": 2, "zero_stage": 0, "model": MUP},
    {"dp_shard": 2, "zero_stage": 3, "tied": False, "model": MUP},
    {"pp": 2, "backend": "fsdp", "model": MUP},
    {"dp_shard": 2, "ep": 2, "zero_stage": 2, "model": MOE},
    {"tp": 2, "backend": "fsdp", "model": MOE},
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks(forked: Callable) -> None:
    check(forked, 2, TWO, timeout_s=500)
