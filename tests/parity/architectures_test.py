"""What families are made of, on tensor- and pipeline-parallel ranks, against one plain process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.experts_test import SIGMOID
from tests.parity.layouts_test import check

GPT2 = {
    "norm": "layer",
    "norm_bias": True,
    "positions": "learned",
    "gated": False,
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "o_bias": True,
    "ffn_bias": True,
    "num_kv_heads": 4,
}
PALM = {"block": "parallel", "norm": "layer", "num_kv_heads": 1, "scale_embeddings": True}
GEMMA = {
    "block": "sandwich",
    "norm_offset": True,
    "activation": "gelu_tanh",
    "qk_norm": True,
    "scale_embeddings": True,
    "layer_types": ["sliding", "full"],
    "sliding_window": 5,
    "rope_theta_sliding": 100.0,
    "attention_softcap": 5.0,
    "logit_softcap": 3.0,
    "attention_scale": 0.2,
    "norm_eps": 0.1,  # a norm behind a half whose output is small would enlarge the rounding too
}
QWEN = {"qk_norm": True, "head_dim": 16, "qkv_bias": True, "num_kv_heads": 1}

MLA = {
    "attention": "mla",
    "num_kv_heads": 4,
    "rope_interleaved": True,
    "mla": {"q_rank": 12, "kv_rank": 16, "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 8},
}
DEEPSEEK = MLA | SIGMOID

TWO = [
    {"tp": 2, "zero_stage": 1, "model": GPT2},
    {"tp": 2, "backend": "fsdp", "sequence_parallel": False, "model": GPT2},
    {"tp": 2, "zero_stage": 0, "model": PALM},
    {"tp": 2, "zero_stage": 2, "sequence_parallel": False, "remat": "selective", "model": PALM},
    {"tp": 2, "backend": "fsdp", "remat": "full", "model": GEMMA},
    {"tp": 2, "zero_stage": 1, "sequence_parallel": False, "model": GEMMA},
    {"cp": 2, "backend": "fsdp", "context": "allgather", "model": GEMMA},
    {"cp": 2, "zero_stage": 1, "context": "alltoall", "model": GEMMA},
    {"tp": 2, "zero_stage": 1, "model": MLA},
    {"cp": 2, "zero_stage": 1, "context": "ring", "model": MLA},
    {"cp": 2, "backend": "fsdp", "context": "alltoall", "model": DEEPSEEK},
]
FOUR = [
    {"pp": 2, "tp": 2, "zero_stage": 1, "model": GPT2},
    {"tp": 4, "backend": "fsdp", "model": QWEN | {"num_kv_heads": 2}},  # two ranks share a K/V head
    {"pp": 2, "tp": 2, "backend": "fsdp", "model": GEMMA},
    {"dp_shard": 2, "tp": 2, "zero_stage": 3, "model": QWEN},
    {"dp_shard": 2, "tp": 2, "ep": 2, "backend": "fsdp", "sequence_parallel": False, "model": DEEPSEEK},
    {"pp": 2, "dp_shard": 2, "ep": 2, "zero_stage": 1, "model": DEEPSEEK},
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks(forked: Callable) -> None:
    check(forked, 2, TWO, timeout_s=500)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks(forked: Callable) -> None:
    check(forked, 4, FOUR, timeout_s=500)
