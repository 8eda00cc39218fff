"""Compares GPT-2 with transformers, and reads its old files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from llmtrain.arch.resolve import fields_from_hf, hf_config, resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.hf import hf_weight_source
from tests.model.families import EXAMPLES, check_generation, check_gradients, check_logits, check_round_trip, pair

configs = st.builds(
    GPT2Config,
    n_layer=st.integers(1, 3),
    n_embd=st.sampled_from([16, 32]),
    n_head=st.sampled_from([1, 2, 4]),
    n_inner=st.sampled_from([None, 24]),
    n_positions=st.sampled_from([24, 64]),
    vocab_size=st.sampled_from([61, 96]),
    layer_norm_epsilon=st.sampled_from([1e-5, 1e-2]),
    activation_function=st.sampled_from(["gelu_new", "gelu_pytorch_tanh", "gelu"]),
    tie_word_embeddings=st.booleans(),
)
ONE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 96}
ONE |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


@EXAMPLES
@given(config=configs)
def test_logits(config: GPT2Config) -> None:
    check_logits(GPT2LMHeadModel, config)


def test_gradients() -> None:
    check_gradients(GPT2LMHeadModel, GPT2Config(**ONE))


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied: bool) -> None:
    check_round_trip(GPT2LMHeadModel, GPT2Config(**ONE, n_inner=100, tie_word_embeddings=tied))


def test_generation() -> None:
    check_generation(GPT2LMHeadModel, GPT2Config(**ONE))


def test_old_files_without_prefix_and_with_buffers(tmp_path: Path) -> None:
    """The released model.safetensors of GPT-2 has such names and buffers."""
    with pair(GPT2LMHeadModel, GPT2Config(**ONE)) as p:
        tensors = load_file(p.directory / "model.safetensors")
        old = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        assert "wte.weight" in old and "h.1.attn.c_attn.weight" in old
        old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
        old |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        read = hf_weight_source(str(p.directory), p.config)
        expected = {name: read(name) for name in p.ours.state_dict()}
        save_file(old, p.directory / "model.safetensors")
        again = hf_weight_source(str(p.directory), p.config)
        assert all(torch.equal(again(name), x) for name, x in expected.items())
        save_file({**old, "transformer.wte.weight": old["wte.weight"].clone()}, p.directory / "model.safetensors")
        with pytest.raises(ValueError, match=r"wte.weight is also in model.safetensors; each tensor belongs in one"):
            hf_weight_source(str(p.directory), p.config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("activation_function", "relu"),
        ("n_head", None),
    ],
)
def test_refused_options(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}={value}: ") as error:
        fields_from_hf({**GPT2Config(**ONE).to_dict(), key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"num_kv_heads": 2}, {"norm_bias": False}, {"head_dim": 16}, {"positions": "rope"}])
def test_what_a_config_cannot_say(change: dict) -> None:
    model = resolve_model(ModelConfig(family="gpt2", hidden_size=32, num_heads=4, **{"num_kv_heads": 4, **change}))
    with pytest.raises(ValueError, match=f"model.{next(iter(change))}="):
        hf_config(model)


def test_names_and_defaults_of_the_config() -> None:
    released = {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}
    fields = fields_from_hf(released)
    assert fields == {name: getattr(resolve_model(ModelConfig(preset="gpt2")), name) for name in fields}
