"""Compares Llama with transformers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model.families import EXAMPLES, check_generation, check_gradients, check_logits, check_round_trip

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

configs = st.builds(
    LlamaConfig,
    num_hidden_layers=st.integers(1, 3),
    hidden_size=st.sampled_from([16, 32]),
    intermediate_size=st.sampled_from([24, 48]),
    num_attention_heads=st.just(4),
    num_key_value_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([None, 4, 10]),
    vocab_size=st.sampled_from([61, 96]),
    max_position_embeddings=st.just(64),
    rms_norm_eps=st.sampled_from([1e-6, 1e-5]),
    rope_parameters=st.sampled_from([{"rope_type": "default", "rope_theta": 100.0}, LLAMA3, YARN, LINEAR]),
    tie_word_embeddings=st.booleans(),
)
ONE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
ONE |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}


@EXAMPLES
@given(config=configs)
def test_logits(config: LlamaConfig) -> None:
    check_logits(LlamaForCausalLM, config)


def test_gradients() -> None:
    check_gradients(LlamaForCausalLM, LlamaConfig(**ONE, rope_parameters=LLAMA3))


def test_round_trip() -> None:
    for tied in (False, True):
        check_round_trip(LlamaForCausalLM, LlamaConfig(**ONE, rope_parameters=LLAMA3, tie_word_embeddings=tied))


def test_generation() -> None:
    check_generation(LlamaForCausalLM, LlamaConfig(**ONE, rope_parameters=YARN))
