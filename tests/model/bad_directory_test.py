"""Broken Hugging Face directories are refused in one line that names file and tensor, before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.arch.families import BUILT_IN
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import MlaConfig, ModelConfig, MoeConfig
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf import hf_weight_source
from llmtrain.model.hf_write import INDEX, save_hf

SHAPE = {"num_layers": 2, "hidden_size": 16, "ffn_size": 24, "num_heads": 4, "vocab_size": 61}
EXPERTS = {"num_experts": 4, "expert_ffn_size": 12}
LATENT = {"kv_rank": 8, "nope_head_dim": 4, "rope_head_dim": 2, "v_head_dim": 4}
MODELS = {
    "llama": ModelConfig(**SHAPE, num_kv_heads=2),
    "gpt2": ModelConfig(**SHAPE, family="gpt2", num_kv_heads=4),
    "qwen2": ModelConfig(**SHAPE, family="qwen2", num_kv_heads=2),
    "qwen3": ModelConfig(**SHAPE, family="qwen3", num_kv_heads=2, head_dim=6),
    "gemma2": ModelConfig(**SHAPE, family="gemma2", num_kv_heads=2, sliding_window=4, head_dim=6),
    "gemma3": ModelConfig(**SHAPE, family="gemma3", num_kv_heads=2, sliding_window=4, head_dim=6),
    "mixtral": ModelConfig(**SHAPE, family="mixtral", num_kv_heads=2, moe=MoeConfig(**EXPERTS)),
    "qwen3-moe": ModelConfig(**SHAPE, family="qwen3-moe", num_kv_heads=2, moe=MoeConfig(**EXPERTS)),
    "deepseek-v2": ModelConfig(
        **SHAPE,
        family="deepseek-v2",
        mla=MlaConfig(**LATENT, q_rank=None),
        moe=MoeConfig(**EXPERTS, shared_ffn_size=24, dense_layers=[0]),
    ),
    "deepseek-v3": ModelConfig(
        **SHAPE,
        family="deepseek-v3",
        mla=MlaConfig(**LATENT, q_rank=12),
        moe=MoeConfig(**EXPERTS, shared_ffn_size=12, num_groups=2),
        mtp_layers=1,
    ),
}
TENSORS = [  # some of each, that are special to it
    ("llama", "model.layers.1.mlp.up_proj.weight"),
    ("gpt2", "transformer.h.1.attn.c_attn.bias"),
    ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
    ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
    ("gemma2", "model.layers.1.pre_feedforward_layernorm.weight"),
    ("gemma3", "model.layers.0.post_feedforward_layernorm.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
    ("qwen3-moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
    ("deepseek-v2", "model.layers.1.self_attn.q_proj.weight"),
    ("deepseek-v2", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
    ("deepseek-v2", "model.layers.1.mlp.experts.0.gate_proj.weight"),
    ("deepseek-v2", "model.layers.1.mlp.shared_experts.up_proj.weight"),
    ("deepseek-v3", "model.layers.0.self_attn.q_a_layernorm.weight"),
    ("deepseek-v3", "model.layers.0.self_attn.kv_b_proj.weight"),
    ("deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    # of the module for the token after the next
    ("deepseek-v3", "model.layers.2.eh_proj.weight"),
    ("deepseek-v3", "model.layers.2.mlp.experts.1.up_proj.weight"),
]
FILE_OF = dict(TENSORS)  # any of them, where the tensor does not matter
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


def opened(directory: Path, mtp_layers: int = 0) -> None:
    """Makes the two calls that every stage begins with."""
    hf_weight_source(str(directory), resolve_model(ModelConfig(init_from=str(directory), mtp_layers=mtp_layers)))


def refused(directory: Path, mtp_layers: int = 0) -> str:
    with pytest.raises(ValueError) as error:
        opened(directory, mtp_layers)
    assert "\n" not in str(error.value)
    return str(error.value)


def shard_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.parametrize(("family", "name"), TENSORS)
def test_tensors(family: str, name: str, message: str, directory: Path) -> None:
    file = shard_of(directory, name)
    save_file(CHANGES[message](load_file(file), name), file)
    error = refused(directory, MODELS[family].mtp_layers)
    assert message in error and name in error
    assert str(directory if "missing" in message else file) in error


def test_every_family_has_its_row() -> None:
    assert {family for family, _ in TENSORS} == set(MODELS) == {f.name for f in BUILT_IN if f.from_hf}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.4.w1.weight"),  # one more than the config says
        ("qwen3-moe", "model.layers.0.mlp.experts.4.up_proj.weight"),
        ("qwen3-moe", "model.layers.0.mlp.up_proj.weight"),  # of a dense layer
        ("mixtral", "model.layers.0.block_sparse_moe.gate.bias"),
        ("deepseek-v2", "model.layers.1.mlp.gate.e_score_correction_bias"),  # as only V3 has
        ("deepseek-v2", "model.layers.0.self_attn.q_a_proj.weight"),  # beside q_proj
        ("deepseek-v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.bias"),
        ("deepseek-v3", "model.layers.2.eh_proj.bias"),
    ],
)
def test_a_tensor_too_many(family: str, name: str, directory: Path) -> None:
    file = max(directory.glob("*.safetensors"))
    save_file({**load_file(file), name: torch.ones(2)}, file)
    error = refused(directory, MODELS[family].mtp_layers)
    assert error.startswith(f"{file}: {name} has no place in this model (1 in all)")


@pytest.mark.parametrize("family", ["deepseek-v3"])
@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_copies(copy: str, family: str, directory: Path) -> None:
    """The copies of embedding and head in a multi-token prediction module may be left out and are not read, but they
    must have the shapes of this model. Without the module nothing of it matters."""
    name = f"model.layers.2.{copy}"
    file = shard_of(directory, name)
    others = {key: x for key, x in load_file(file).items() if key != name}
    save_file({**others, name: torch.zeros(3, 2)}, file)
    assert f"{file}: {name} has shape [3, 2], the config says [61, 16]" in refused(directory, mtp_layers=1)
    opened(directory, mtp_layers=0)
    save_file(others, file)
    opened(directory, mtp_layers=1)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_files(family: str, directory: Path) -> None:
    file = shard_of(directory, FILE_OF[family])
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


def config_refused(directory: Path, change: dict) -> str:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    error = refused(directory)
    assert error.startswith(f"{directory / 'config.json'}: ")
    return error


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3", {"model_type": "rwkv"}, "model_type=rwkv: is not known; use a model of one of "),
        ("qwen3", {"model_type": None}, "model_type=None: is not known"),
        ("qwen3", {"hidden_size": "16"}, "hidden_size=16: is missing or no positive whole number"),
        ("qwen3", {"num_hidden_layers": 0}, "num_hidden_layers=0: is missing or no positive whole number"),
        ("qwen3", {"rms_norm_eps": "small"}, "rms_norm_eps=small: Input should be a valid number"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types: has 1 entries for num_hidden_layers=2"),
        ("qwen3", {"rope_parameters": 5}, "a key is missing or of a wrong type ("),
        ("qwen3", {"attention_bias": "yes"}, "attention_bias=yes: only True or False is supported"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts=0: is missing or no positive whole number"),
        ("qwen3-moe", {"mlp_only_layers": 1}, "a key is missing or of a wrong type ("),
        ("qwen3-moe", {"norm_topk_prob": 2}, "norm_topk_prob=2: Input should be a valid boolean"),
        ("deepseek-v2", {"kv_lora_rank": -8}, "kv_lora_rank=-8: is missing or no positive whole number"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": None}, "n_group=None: is missing or no"),
        ("deepseek-v3", {"q_lora_rank": "12x"}, "q_lora_rank=12x: Input should be a valid integer"),
        ("deepseek-v3", {"first_k_dense_replace": "one"}, "a key is missing or of a wrong type ("),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0: Input should be greater than 0"),
    ],
)
def test_configs(family: str, change: dict, message: str, directory: Path) -> None:
    assert message in config_refused(directory, change)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": False}, "is_causal=False: only True is supported"),
        ({"is_causal": None}, "is_causal=None: only True"),
        (
            {"per_layer_config": {"0": {"sliding_window": 2}}},
            "per_layer_config={'0': {'sliding_window': 2}}: only None",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}: only None"),
    ],
)
def test_keys_that_transformers_reads_for_all(family: str, change: dict, message: str, directory: Path) -> None:
    assert message in config_refused(directory, change)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize("family", [name for name in MODELS if name != "gpt2"])
@pytest.mark.parametrize(
    ("rope", "beside", "message"),
    [
        ({}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only 1 or None"),
        ({**LINEAR, "partial_rotary_factor": 0.25}, {}, "partial_rotary_factor=0.25: only 1 or None"),
        ({**LINEAR, "mscale_all_dim": 1.0}, {}, "mscale_all_dim=1.0: only 0 or None"),
        (YARN, {"original_max_position_embeddings": 8}, "original_max_position_embeddings=8: only 16 or None"),
        (LINEAR, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters says otherwise; keep the one"),
    ],
)
def test_rope(family: str, rope: dict, beside: dict, message: str, directory: Path) -> None:
    """RoPE is read in the form of transformers 5, which for Gemma 3 has one for each kind of layer."""
    written = {"full_attention": rope} if family == "gemma3" else rope
    assert message in config_refused(directory, {"rope_parameters": written, **beside})


@pytest.mark.parametrize("family", ["gemma2"])
def test_gemma2_has_one_pattern(family: str, directory: Path) -> None:
    assert "sliding_window_pattern=3: only 2 is" in config_refused(directory, {"sliding_window_pattern": 3})
