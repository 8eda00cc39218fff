"""Hugging Face directories that are not whole: one line that names file and tensor, before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.config.shapes import resolve_model
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf import hf_weight_source
from llmtrain.model.hf_write import INDEX, save_hf

SHAPE = {"num_layers": 2, "hidden_size": 16, "ffn_size": 24, "num_heads": 4, "vocab_size": 61}
MODELS = {
    "llama": ModelConfig(**SHAPE, num_kv_heads=2),
    "gpt2": ModelConfig(**SHAPE, family="gpt2", num_kv_heads=4),
    "qwen2": ModelConfig(**SHAPE, family="qwen2", num_kv_heads=2),
    "qwen3": ModelConfig(**SHAPE, family="qwen3", num_kv_heads=2, head_dim=6),
    "gemma3": ModelConfig(**SHAPE, family="gemma3", num_kv_heads=2, sliding_window=4, head_dim=6),
}
TENSORS = {  # one of each, that is special to it
    "llama": "model.layers.1.mlp.up_proj.weight",
    "gpt2": "transformer.h.1.attn.c_attn.bias",
    "qwen2": "model.layers.1.self_attn.k_proj.bias",
    "qwen3": "model.layers.0.self_attn.q_norm.weight",
    "gemma3": "model.layers.0.post_feedforward_layernorm.weight",
}
Change = Callable[[dict[str, Tensor], str], dict[str, Tensor]]
CHANGES: dict[str, Change] = {
    "is missing (1 in all)": lambda x, name: {k: v for k, v in x.items() if k != name},
    "has no place in this model (2 in all)": lambda x, name: {**x, f"{name}_2": x[name].clone(), "z": torch.ones(1)},
    "has shape [3, 2], the config says": lambda x, name: {**x, name: torch.zeros(3, 2)},
    "a quantized model; save it as": lambda x, name: {**x, name: x[name].to(torch.int8)},
}


@pytest.fixture
def directory(family: str, tmp_path: Path) -> Path:
    model = resolve_model(MODELS[family])
    weights = ((name, init_tensor(name, shape, model, 0)) for name, shape in parameter_shapes(model).items())
    save_hf(str(tmp_path / "hf"), model, weights, torch.float32, None, None, max_shard_bytes=4e3)
    assert (tmp_path / "hf" / INDEX).exists()
    return tmp_path / "hf"


def refused(directory: Path) -> str:
    """By the two calls that every stage begins with."""
    with pytest.raises(ValueError) as error:
        hf_weight_source(str(directory), resolve_model(ModelConfig(init_from=str(directory))))
    assert "\n" not in str(error.value)
    return str(error.value)


def shard_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.parametrize("family", MODELS)
def test_tensors(family: str, message: str, directory: Path) -> None:
    name = TENSORS[family]
    file = shard_of(directory, name)
    save_file(CHANGES[message](load_file(file), name), file)
    error = refused(directory)
    assert message in error and name in error
    assert str(directory if "missing" in message else file) in error


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_files(family: str, directory: Path) -> None:
    file = shard_of(directory, TENSORS[family])
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:20], b"", b"\xff" * 100):
        file.write_bytes(broken)
        assert f"{file}: broken or cut short" in refused(directory)
    file.unlink()
    assert f"{file}: no such file" in refused(directory)
    file.write_bytes(whole)
    other = directory / "model-99999-of-99999.safetensors"
    other.write_bytes(whole)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["another"] = other.name
    (directory / INDEX).write_text(json.dumps(index))
    assert f"{other}: " in refused(directory) and "each tensor belongs in one file" in refused(directory)


@pytest.mark.parametrize("family", ["qwen3"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "rwkv"}, "model_type=rwkv: is not known; use a model of one of "),
        ({"model_type": None}, "model_type=None: is not known"),
        ({"hidden_size": "16"}, "hidden_size=16: is missing or no positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: is missing or no positive whole number"),
        ({"rms_norm_eps": "small"}, "norm_eps=small: Input should be a valid number"),
        ({"layer_types": ["full_attention"]}, "layer_types: has 1 entries for num_hidden_layers=2"),
        ({"rope_parameters": 5}, "a key is missing or of a wrong type ("),
        ({"attention_bias": "yes"}, "attention_bias=yes: only True or False is supported"),
    ],
)
def test_configs(change: dict, message: str, family: str, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    assert f"{directory / 'config.json'}: " in refused(directory) and message in refused(directory)
