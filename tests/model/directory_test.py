"""Directories that transformers loads are loaded the same, or refused in words that say what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from llmtrain.checkpoint.source import fingerprint
from llmtrain.model.hf_write import INDEX
from tests.model.directories import BASES, our_logits, same_logits, write_config, write_model

MOE = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def written(directory: Path, kind: str, seed: int = 0, shard: str = "5GB", **change: Any) -> tuple[Path, dict]:
    """Returns the directory of a model, and its config."""
    config = {"model_type": kind, **BASES[kind], **change}
    write_model(directory, config, seed, max_shard_size=shard)
    return directory, config


def edit(directory: Path, change: Callable[[dict], Any]) -> None:
    """Applies `change` to the tensors of model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def refused(directory: Path, config: dict) -> str:
    with pytest.raises(ValueError) as error:
        our_logits(directory, config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", BASES)
def test_whole_in_shards_and_in_shards_beside_another_file_that_is_newer(kind: str, tmp_path: Path) -> None:
    directory, config = written(tmp_path, kind, 0, "30KB")
    assert (directory / INDEX).exists()
    same_logits(directory, config)
    for shard in directory.glob("*.safetensors"):
        shard.unlink()
    written(tmp_path, kind, 1)  # the index stays, and its files are gone
    assert (directory / INDEX).exists()
    same_logits(directory, config)


def test_two_whole_sets(tmp_path: Path) -> None:
    directory, config = written(tmp_path, "llama", 0)
    kept = (directory / "model.safetensors").read_bytes()
    written(tmp_path, "llama", 1, "30KB")
    (directory / "model.safetensors").write_bytes(kept)
    message = f"{directory}: holds two sets of weights, model.safetensors and the files of {INDEX}; remove one of them"
    assert refused(directory, config) == message
    next(directory.glob("model-*")).unlink()
    same_logits(directory, config)  # only one is whole
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    same_logits(directory, config)


@pytest.mark.parametrize("name", ["other.safetensors", "below/other.safetensors", "mine.safetensors.index.json"])
def test_files_of_another_name(name: str, tmp_path: Path) -> None:
    other, _ = written(tmp_path / "other", "llama", 1)
    directory, config = written(tmp_path / "model", "llama", 0, "30KB" if name.endswith("json") else "5GB")
    config |= {"transformers_weights": name}
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / (INDEX if name.endswith("json") else "model.safetensors")).rename(directory / name)
    shutil.copy(other / "model.safetensors", directory)  # another model, which is not meant
    write_config(directory, config)
    same_logits(directory, config)
    before = fingerprint(str(directory))
    if name.endswith("other.safetensors"):
        (directory / name).write_bytes((directory / "model.safetensors").read_bytes())
        assert fingerprint(str(directory)) != before


@pytest.mark.parametrize("name", ["../model.safetensors", "pytorch_model.bin", "/etc/hosts", "no.safetensors", 5])
def test_names_that_are_refused(name: object, tmp_path: Path) -> None:
    directory, config = written(tmp_path / "model", "llama")
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    write_config(directory, config | {"transformers_weights": name})
    message = refused(directory, config)
    assert "transformers_weights" in message or message.startswith(f"{directory}/no.safetensors: no such file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_named(name: str, tmp_path: Path) -> None:
    directory, config = written(tmp_path, "llama")
    (directory / name).write_bytes(b"")
    same_logits(directory, config)  # they lie beside others
    (directory / "model.safetensors").unlink()
    message = refused(directory, config)
    assert message.startswith(f"{directory / name}: weights in this format can run code when they are read")


def test_adapters_beside_the_weights(tmp_path: Path) -> None:
    directory, config = written(tmp_path, "llama")
    (directory / "adapter_config.json").write_text("{}")
    assert refused(directory, config).startswith(f"{directory}/adapter_config.json: adapters beside the weights")


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind != "gpt2"])
def test_buffers_of_old_files(kind: str, tmp_path: Path) -> None:
    directory, config = written(tmp_path, kind)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    edit(directory, lambda x: x.update(buffers, **{"model.rotary_emb.inv_freq": torch.ones(7)}))
    same_logits(directory, config)


@pytest.mark.parametrize("kind", BASES)
def test_tied_heads(kind: str, tmp_path: Path) -> None:
    """The embedding alone, the head alone, both; and two that differ, which transformers does not tie."""
    directory, config = written(tmp_path, kind, tie_word_embeddings=True)
    embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    same_logits(directory, config)
    edit(directory, lambda x: x.update({"lm_head.weight": x[embedding].clone()}))
    same_logits(directory, config)
    edit(directory, lambda x: x.pop(embedding))
    same_logits(directory, config)
    edit(directory, lambda x: x.update({embedding: x["lm_head.weight"] + 1}))
    assert "lm_head.weight differs from the embedding; set tie_word_embeddings=false" in refused(directory, config)
    config["tie_word_embeddings"] = False
    write_config(directory, config)
    same_logits(directory, config)
    edit(directory, lambda x: x.pop("lm_head.weight"))
    assert "lm_head.weight is missing" in refused(directory, config)


@pytest.mark.parametrize("kind", BASES)
def test_prefixes(kind: str, tmp_path: Path) -> None:
    """A model saved without its head has names without the prefix, and one within another has it twice."""
    directory, config = written(tmp_path, kind, tie_word_embeddings=True)
    prefix = "transformer" if kind == "gpt2" else "model"
    model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(directory)
    write_config(directory, config)
    assert not any(name.startswith(f"{prefix}.") for name in load_file(directory / "model.safetensors"))
    same_logits(directory, config)
    edit(directory, lambda x: [x.update({f"{prefix}.{prefix}.{name}": x.pop(name)}) for name in list(x)])
    same_logits(directory, config)
    edit(directory, lambda x: [x.update({f"other.{name}": x.pop(name)}) for name in list(x)])
    assert "is missing" in refused(directory, config)


def test_a_prefix_before_the_head(tmp_path: Path) -> None:
    directory, config = written(tmp_path, "llama")
    edit(directory, lambda x: x.update({"model.lm_head.weight": x.pop("lm_head.weight")}))
    same_logits(directory, config)


def test_the_language_model_of_a_larger_one(tmp_path: Path) -> None:
    directory, config = written(tmp_path / "text", "gemma3_text")
    expected = our_logits(directory, config)
    wrapper = {"model_type": "gemma3", "text_config": config}
    write_config(directory, wrapper)
    vision = {"vision_tower.x": torch.ones(2), "multi_modal_projector.y": torch.ones(2)}
    names = list(load_file(directory / "model.safetensors"))
    edit(
        directory, lambda x: [x.update({f"language_model.{name}": x.pop(name)}) for name in names] and x.update(vision)
    )
    assert torch.equal(our_logits(directory, config), expected)
    edit(
        directory,
        lambda x: [
            x.update({f"model.language_model.{n.removeprefix('model.')}": x.pop(f"language_model.{n}")}) for n in names
        ],
    )
    assert torch.equal(our_logits(directory, config), expected)
    write_config(directory, config | {"model_type": "llama"})
    assert "is missing" in refused(directory, config)


@pytest.mark.parametrize("kind", MOE)
def test_fused_experts(kind: str, tmp_path: Path) -> None:
    """The form in which transformers 5 holds experts: all of a layer in one tensor, gate and up one after the other."""
    directory, config = written(tmp_path, kind)
    expected = our_logits(directory, config)
    write_model(directory, config, save_original_format=False)
    names = load_file(directory / "model.safetensors")
    assert "model.layers.2.mlp.experts.gate_up_proj" in names
    assert torch.equal(our_logits(directory, config), expected)
    same_logits(directory, config)
    name = "model.layers.1.mlp.experts.down_proj"
    edit(directory, lambda x: x.update({name: x[name][:-1]}))
    assert "model.layers.1." in refused(directory, config) and "is missing" in refused(directory, config)
    edit(directory, lambda x: x.update({name: x[name][0]}))
    assert f"{name} has shape [" in refused(directory, config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    directory, config = written(tmp_path, "llama")
    edit(directory, lambda x: x.update({name: value.to(dtype) for name, value in x.items()}))
    same_logits(directory, config)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool])
def test_quantized_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    directory, config = written(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit(directory, lambda x: x.update({name: x[name].to(dtype)}))
    message = refused(directory, config)
    assert f"{name} is " in message and message.endswith("a quantized model; save it as F32 or BF16 first")


@pytest.mark.parametrize("kind", BASES)
def test_missing_and_extra_tensors(kind: str, tmp_path: Path) -> None:
    directory, config = written(tmp_path, kind)
    tensors = load_file(directory / "model.safetensors")
    for name in list(tensors)[:: max(1, len(tensors) // 5)]:
        save_file({n: x for n, x in tensors.items() if n != name}, directory / "model.safetensors", {"format": "pt"})
        assert f"{name} is missing" in refused(directory, config)
        save_file({**tensors, f"{name}.more": torch.ones(2)}, directory / "model.safetensors", {"format": "pt"})
        assert f"{name}.more has no place in this model" in refused(directory, config)


@pytest.mark.parametrize(
    ("kind", "alias", "name"),
    [
        ("mixtral", "num_experts", "num_local_experts"),
        ("qwen3_moe", "num_local_experts", "num_experts"),
        ("deepseek_v2", "num_experts", "n_routed_experts"),
        ("deepseek_v3", "num_local_experts", "n_routed_experts"),
        ("gpt2", "hidden_size", "n_embd"),
        ("gpt2", "num_hidden_layers", "n_layer"),
        ("gpt2", "num_attention_heads", "n_head"),
        ("gpt2", "max_position_embeddings", "n_positions"),
    ],
)
def test_a_key_under_its_other_name(kind: str, alias: str, name: str, tmp_path: Path) -> None:
    directory, config = written(tmp_path, kind)
    write_config(directory, config | {alias: 8 * config[name]})
    assert f"{alias}={8 * config[name]}: {name}={config[name]} says otherwise" in refused(directory, config)
    config[alias] = config.pop(name)
    write_config(directory, config)
    assert getattr(AutoConfig.from_pretrained(directory), name) == config[alias]
    same_logits(directory, config)


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v2"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 77.0}, None),
        ({"rope_scaling": LINEAR, "rope_theta": 77.0}, None),
        ({"rope_parameters": {**LINEAR, "rope_theta": 500.0}, "rope_scaling": LINEAR, "rope_theta": 500.0}, None),
        ({"rope_parameters": {**LINEAR, "rope_theta": 500.0}, "rope_scaling": LINEAR, "rope_theta": 77.0}, "otherwise"),
        ({"rope_parameters": {**LINEAR, "factor": 2.0}, "rope_scaling": LINEAR}, "rope_parameters says otherwise"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type=dynamic: only"),
    ],
)
def test_both_forms_of_rope(kind: str, change: dict, message: str | None, tmp_path: Path) -> None:
    if kind == "gemma3_text" and "rope_parameters" in change:
        change = change | {"rope_parameters": {"full_attention": change["rope_parameters"]}}
    directory, config = written(tmp_path, kind, **change)
    if message is None:
        same_logits(directory, config)
    else:
        assert message in refused(directory, config)


@pytest.mark.parametrize("rope", [{"type": "linear", "factor": 4.0}, {**LINEAR, "type": "yarn"}])
def test_the_old_key_of_the_kind_of_rope(rope: dict, tmp_path: Path) -> None:
    """Gemma 3 of transformers reads `rope_type` alone, the others `type` too where that is missing."""
    directory, config = written(tmp_path / "gemma", "gemma3_text", rope_scaling=rope)
    assert "Gemma 3 reads rope_type, and not type" in refused(directory, config)
    same_logits(*written(tmp_path / "llama", "llama", rope_scaling=rope))
