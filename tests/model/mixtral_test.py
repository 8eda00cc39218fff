"""Compares Mixtral with transformers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM

from llmtrain.arch.resolve import fields_from_hf, hf_config, resolve_model
from llmtrain.config.schema import ModelConfig, MoeConfig
from tests.model.experts import check_sizes, in_a_loop
from tests.model.families import EXAMPLES, check_generation, check_gradients, check_logits, check_round_trip

ROPE = {"rope_type": "default", "rope_theta": 100.0}
ONE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
ONE |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "num_local_experts": 4}

configs = st.builds(
    MixtralConfig,
    num_hidden_layers=st.integers(1, 3),
    hidden_size=st.sampled_from([16, 32]),
    intermediate_size=st.sampled_from([22, 48]),  # one that grouped kernels refuse
    num_attention_heads=st.just(4),
    num_key_value_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([None, 10]),
    vocab_size=st.sampled_from([61, 96]),
    max_position_embeddings=st.just(64),
    num_local_experts=st.integers(2, 9),
    num_experts_per_tok=st.integers(1, 2),
    sliding_window=st.sampled_from([None, None, 7]),
    rope_parameters=st.just(ROPE),
    tie_word_embeddings=st.booleans(),
)


@EXAMPLES
@given(config=configs)
def test_logits(config: MixtralConfig) -> None:
    check_logits(MixtralForCausalLM, in_a_loop(config))


def test_gradients() -> None:
    check_gradients(MixtralForCausalLM, MixtralConfig(**ONE))


def test_round_trip() -> None:
    check_round_trip(MixtralForCausalLM, MixtralConfig(**ONE, sliding_window=16))


def test_generation() -> None:
    check_generation(MixtralForCausalLM, MixtralConfig(**ONE))


@pytest.mark.parametrize(
    ("preset", "exact", "total", "active"),
    [  # exact: safetensors of the released models; total and active: their announcements (mistral.ai), which count all
        # that is there: without the embedding the first would be 12.7
        ("mixtral-8x7b", 46_702_792_704, "46.7", "12.9"),
        ("mixtral-8x22b", 140_620_634_112, "141", "39"),
    ],
)
def test_published_sizes(preset: str, exact: int, total: str, active: str) -> None:
    check_sizes(preset, exact, total, active)


def test_an_own_small_one_needs_no_dense_width() -> None:
    model = resolve_model(ModelConfig(family="mixtral", moe=MoeConfig(num_experts=4, expert_ffn_size=40)))
    written = hf_config(model)
    assert written["intermediate_size"] == 40 and written["num_local_experts"] == 4
    assert fields_from_hf(written)["moe"] == model.moe


def test_what_a_config_json_cannot_say() -> None:
    moe = MoeConfig(num_experts=4, shared_ffn_size=16)
    with pytest.raises(ValueError, match="cannot say so"):
        hf_config(ModelConfig(family="mixtral", moe=moe))
    with pytest.raises(ValueError, match=r"router_jitter_noise=0\.1: only 0 is supported"):
        fields_from_hf(MixtralConfig(**ONE, router_jitter_noise=0.1).to_dict())
