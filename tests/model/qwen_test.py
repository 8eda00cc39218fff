"""Compares Qwen2 and Qwen3 with transformers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmtrain.arch.resolve import fields_from_hf, hf_config, resolve_model
from llmtrain.config.schema import ModelConfig
from tests.model.families import EXAMPLES, check_generation, check_gradients, check_logits, check_round_trip

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
shared = {
    "num_hidden_layers": st.integers(1, 3),
    "hidden_size": st.sampled_from([16, 32]),
    "intermediate_size": st.sampled_from([24, 48]),
    "num_attention_heads": st.just(4),
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "vocab_size": st.sampled_from([61, 96]),
    "max_position_embeddings": st.just(64),
    "rms_norm_eps": st.sampled_from([1e-6, 1e-5]),
    "rope_parameters": st.sampled_from([{"rope_type": "default", "rope_theta": 1e3}, YARN]),
    "tie_word_embeddings": st.booleans(),
    "use_sliding_window": st.booleans(),
    "sliding_window": st.sampled_from([3, 8]),
    "max_window_layers": st.sampled_from([0, 1, 2]),
}
qwen2 = st.builds(Qwen2Config, **shared)
qwen3 = st.builds(Qwen3Config, **shared, head_dim=st.sampled_from([4, 10]), attention_bias=st.booleans())
ONE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
ONE |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
CASES = [
    (Qwen2ForCausalLM, Qwen2Config(**ONE, rope_parameters=YARN)),
    (Qwen2ForCausalLM, Qwen2Config(**ONE, **SLIDING, tie_word_embeddings=True)),
    (Qwen3ForCausalLM, Qwen3Config(**ONE, head_dim=16)),
    (Qwen3ForCausalLM, Qwen3Config(**ONE, **SLIDING, head_dim=10, attention_bias=True, tie_word_embeddings=True)),
]
NAMES = ["qwen2", "qwen2 sliding", "qwen3", "qwen3 sliding"]


@EXAMPLES
@given(config=qwen2)
def test_qwen2_logits(config: Qwen2Config) -> None:
    check_logits(Qwen2ForCausalLM, config)


@EXAMPLES
@given(config=qwen3)
def test_qwen3_logits(config: Qwen3Config) -> None:
    check_logits(Qwen3ForCausalLM, config)


@pytest.mark.parametrize(("model", "config"), CASES, ids=NAMES)
def test_gradients(model: type, config: Qwen2Config | Qwen3Config) -> None:
    check_gradients(model, config)


@pytest.mark.parametrize(("model", "config"), CASES, ids=NAMES)
def test_round_trip(model: type, config: Qwen2Config | Qwen3Config) -> None:
    check_round_trip(model, config)


@pytest.mark.parametrize(("model", "config"), CASES, ids=NAMES)
def test_generation(model: type, config: Qwen2Config | Qwen3Config) -> None:
    check_generation(model, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu: only silu"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layer_types=chunked_attention: only full"),
        ({"layer_types": ["sliding_attention"] * 2}, "needs sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "rope_type=dynamic"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
@pytest.mark.parametrize("preset", ["qwen2-0.5b", "qwen3-0.6b"])
def test_refused_options(preset: str, change: dict, message: str) -> None:
    model = resolve_model(ModelConfig(preset=preset, num_layers=2))
    with pytest.raises(ValueError, match=message) as error:
        fields_from_hf({**hf_config(model), **change})
    assert "\n" not in str(error.value)


def test_what_a_config_cannot_say() -> None:
    for change in ({"o_bias": True}, {"head_dim": 128}, {"qk_norm": True}):
        with pytest.raises(ValueError, match=f"model.{next(iter(change))}="):
            hf_config(ModelConfig(preset="qwen2-0.5b", **change))
    with pytest.raises(ValueError, match=r"model\.o_bias=True"):
        hf_config(ModelConfig(preset="qwen3-0.6b", o_bias=True))


def test_released_config_of_transformers_4() -> None:
    released = {  # of Qwen3-4B
        **{"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560},
        **{"intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36},
        **{"num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06},
        **{"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True},
        **{"use_sliding_window": False, "vocab_size": 151936},
    }
    fields = fields_from_hf(released)
    assert fields == {name: getattr(resolve_model(ModelConfig(preset="qwen3-4b")), name) for name in fields}
