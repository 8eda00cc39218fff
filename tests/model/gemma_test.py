"""Compares Gemma 2 and 3 with transformers."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from llmtrain.arch.resolve import fields_from_hf, hf_config, resolve_model
from llmtrain.config.schema import ModelConfig
from tests.model.families import (
    EXAMPLES,
    check_generation,
    check_gradients,
    check_logits,
    check_round_trip,
    pair,
    read_decoder,
)

shared = {
    "num_hidden_layers": st.integers(1, 4),
    "hidden_size": st.sampled_from([16, 32]),
    "intermediate_size": st.sampled_from([24, 48]),
    "num_attention_heads": st.just(4),
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([4, 10]),
    "vocab_size": st.sampled_from([61, 96]),
    "max_position_embeddings": st.just(64),
    "query_pre_attn_scalar": st.sampled_from([4, 8, 24]),
    "sliding_window": st.sampled_from([3, 8]),
    "final_logit_softcapping": st.sampled_from([None, 2.0]),
    "tie_word_embeddings": st.booleans(),
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e3}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
ropes = st.sampled_from([{"full_attention": full, "sliding_attention": LOCAL} for full in (LINEAR, PLAIN)])


def gemma3(sliding_window_pattern: int, **fields: object) -> Gemma3TextConfig:
    """Returns a config; the pattern is none of the arguments that a type checker sees."""
    return Gemma3TextConfig(**fields, sliding_window_pattern=sliding_window_pattern)


gemma2_configs = st.builds(Gemma2Config, **shared, attn_logit_softcapping=st.sampled_from([None, 1.5]))
gemma3_configs = st.builds(gemma3, st.sampled_from([2, 3]), **shared, rope_parameters=ropes)
ONE = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 10}
ONE |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "sliding_window": 8}
SCALED = {"full_attention": LINEAR, "sliding_attention": LOCAL}
CASES = [
    (Gemma2ForCausalLM, Gemma2Config(**ONE, query_pre_attn_scalar=24, attn_logit_softcapping=1.5)),
    (Gemma3ForCausalLM, gemma3(2, **ONE, query_pre_attn_scalar=24, rope_parameters=SCALED)),
    (Gemma3ForCausalLM, gemma3(2, **ONE, final_logit_softcapping=2.0, tie_word_embeddings=False)),
]
NAMES = ["gemma2", "gemma3 tied", "gemma3 untied, capped"]


@EXAMPLES
@given(config=gemma2_configs)
def test_gemma2_logits(config: Gemma2Config) -> None:
    check_logits(Gemma2ForCausalLM, config)


@EXAMPLES
@given(config=gemma3_configs)
def test_gemma3_logits(config: Gemma3TextConfig) -> None:
    check_logits(Gemma3ForCausalLM, config)


@pytest.mark.parametrize(("model", "config"), CASES, ids=NAMES)
def test_gradients(model: type, config: Gemma2Config | Gemma3TextConfig) -> None:
    check_gradients(model, config)


@pytest.mark.parametrize(("model", "config"), CASES, ids=NAMES)
def test_round_trip(model: type, config: Gemma2Config | Gemma3TextConfig) -> None:
    check_round_trip(model, config)


@pytest.mark.parametrize(("model", "config"), CASES, ids=NAMES)
def test_generation(model: type, config: Gemma2Config | Gemma3TextConfig) -> None:
    check_generation(model, config)


@torch.no_grad()
def test_language_model_of_a_multimodal_directory() -> None:
    """A released directory has tensors of another model too, ours under `language_model.`, and a nested config."""
    with pair(Gemma3ForCausalLM, CASES[1][1]) as p:
        config = json.loads((p.directory / "config.json").read_text())
        wrapped = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 8}}
        (p.directory / "config.json").write_text(json.dumps(wrapped))
        tensors = load_file(p.directory / "model.safetensors")
        vision = {"vision_tower.embeddings.weight": torch.ones(3), "multi_modal_projector.norm.weight": torch.ones(3)}
        ids = torch.arange(2, 20)[None]
        inner = {name.removeprefix("model."): x for name, x in tensors.items()}  # no head, it is tied
        for prefix in ("language_model.model.", "model.language_model."):
            ours = {prefix + name: x for name, x in inner.items()}
            save_file({**ours, **vision}, p.directory / "model.safetensors")
            read = resolve_model(ModelConfig(init_from=str(p.directory)))
            assert read == p.config
            assert torch.equal(read_decoder(p.directory, read)(ids, torch.arange(18)[None]), p.logits(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation=silu: only gelu_pytorch_tanh"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"sliding_window": None}, "needs sliding_window"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: only None"),
        ({"rope_parameters": {"sliding_attention": {**LINEAR}}}, "rope_type=linear: not in sliding layers"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope", "rope_theta": 1.0}}}, "rope_type=longrope"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
    ],
)
def test_refused_options(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fields_from_hf({**hf_config(ModelConfig(preset="gemma3-1b")), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"norm_offset": False}, {"block": "sequential"}, {"attention_scale": 0.3}])
def test_what_a_config_cannot_say(change: dict) -> None:
    with pytest.raises(ValueError, match=f"model.{next(iter(change))}="):
        hf_config(ModelConfig(preset="gemma3-1b", **change))


def test_released_config_that_leaves_defaults_out() -> None:
    released = {  # the text_config of gemma-3-4b
        **{"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34},
        **{"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    }
    fields = fields_from_hf(released)
    assert fields == {name: getattr(resolve_model(ModelConfig(preset="gemma3-4b")), name) for name in fields}
