"""The tensors that a running server is sent are those that an export holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.arch.families import presets
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig, MoeConfig, MupConfig
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.model.hf_write import hf_tensors, save_hf

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "vocab_size": 97, "max_positions": 64}
MODELS = {
    "tied": ModelConfig(**SIZES, num_kv_heads=2),
    "untied": ModelConfig(**SIZES, num_kv_heads=2, tie_embeddings=False),
    "thirds, transposed": ModelConfig(**{**presets()["gpt2"], **SIZES, "num_kv_heads": 4}),
    "experts": ModelConfig(**SIZES, family="mixtral", num_kv_heads=2, moe=MoeConfig(num_experts=4)),
    "factors": ModelConfig(**SIZES, num_kv_heads=2, tie_embeddings=False, mup=MupConfig(base_hidden=16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(MODELS))
def test_they_equal_the_files_of_an_export(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = resolve_model(MODELS[name])
    model = Decoder(config)
    initialize(model, config, 1)
    weights = dict(model.state_dict())
    shuffled = dict(reversed(weights.items()))
    save_hf(str(tmp_path / "x"), config, weights.items(), dtype, None, 0)
    files = load_file(tmp_path / "x" / "model.safetensors")
    found = dict(hf_tensors(shuffled.items(), config, dtype))
    assert found.keys() == files.keys()
    for each, tensor in found.items():
        assert tensor.dtype == files[each].dtype and tensor.is_contiguous() and torch.equal(tensor, files[each]), each


def test_what_is_no_whole_model_is_refused() -> None:
    config = resolve_model(MODELS["tied"])
    weights = dict(Decoder(config).state_dict())
    with pytest.raises(ValueError, match=r"missing \(1 in all\)"):
        list(hf_tensors([item for item in weights.items() if item[0] != "norm.weight"], config, torch.float32))
    with pytest.raises(ValueError, match=r"no\.such"):
        list(hf_tensors([*weights.items(), ("no.such", torch.zeros(1))], config, torch.float32))
