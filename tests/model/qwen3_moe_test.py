"""Compares Qwen3-MoE with transformers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmtrain.arch.resolve import fields_from_hf
from tests.model.experts import check_sizes, in_a_loop, in_billions
from tests.model.families import EXAMPLES, check_generation, check_gradients, check_logits, check_round_trip

ROPE = {"rope_type": "default", "rope_theta": 100.0}
ONE = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
ONE |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "num_experts": 6}
ONE |= {"moe_intermediate_size": 24, "num_experts_per_tok": 3, "mlp_only_layers": [1], "rope_parameters": ROPE}

configs = st.builds(
    Qwen3MoeConfig,
    num_hidden_layers=st.integers(1, 3),
    hidden_size=st.sampled_from([16, 32]),
    intermediate_size=st.sampled_from([24, 48]),
    moe_intermediate_size=st.sampled_from([6, 16]),  # one that grouped kernels refuse
    num_attention_heads=st.just(4),
    num_key_value_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([4, 10]),
    vocab_size=st.sampled_from([61, 96]),
    max_position_embeddings=st.just(64),
    num_experts=st.integers(4, 12),
    num_experts_per_tok=st.integers(1, 4),
    norm_topk_prob=st.booleans(),
    decoder_sparse_step=st.integers(1, 2),
    mlp_only_layers=st.sampled_from([[], [0]]),
    attention_bias=st.booleans(),
    rope_parameters=st.just(ROPE),
    tie_word_embeddings=st.booleans(),
)


@EXAMPLES
@given(config=configs)
def test_logits(config: Qwen3MoeConfig) -> None:
    check_logits(Qwen3MoeForCausalLM, in_a_loop(config))


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients(normalize: bool) -> None:
    check_gradients(Qwen3MoeForCausalLM, Qwen3MoeConfig(**ONE, norm_topk_prob=normalize))


def test_round_trip() -> None:
    check_round_trip(Qwen3MoeForCausalLM, Qwen3MoeConfig(**ONE, attention_bias=True))


def test_generation() -> None:
    check_generation(Qwen3MoeForCausalLM, Qwen3MoeConfig(**ONE, norm_topk_prob=True))


@pytest.mark.parametrize(
    ("preset", "exact", "total", "active", "non_embedding"),
    [  # exact: safetensors of the released models; the rest: their cards. All counts but the last have embedding and
        # head in them; 3.3 is 3.353 cut, by any other count that the cards have it would be 3.4, 3.0 or 2.7
        ("qwen3-30b-a3b", 30_532_122_624, "30.5", "3.3", "29.9"),
        ("qwen3-235b-a22b", 235_093_634_560, "235", "22", "234"),
    ],
)
def test_published_sizes(preset: str, exact: int, total: str, active: str, non_embedding: str) -> None:
    model = check_sizes(preset, exact, total, active, cut=True)
    assert in_billions(exact - 2 * model.vocab_size * model.hidden_size, non_embedding) == non_embedding


def test_refused() -> None:
    with pytest.raises(ValueError, match="use_sliding_window=True: only False"):
        fields_from_hf(Qwen3MoeConfig(**ONE, use_sliding_window=True).to_dict())
