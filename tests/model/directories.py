"""Small models of transformers in directories, and what we make of them, for tests of directories and configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder
from llmtrain.model.hf import hf_weight_source

SHAPE = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SHAPE |= {"vocab_size": 61, "max_position_embeddings": 64}
GROUPED = SHAPE | {"num_key_value_heads": 2}
HEAD_DIM = GROUPED | {"head_dim": 8}
GEMMA = HEAD_DIM | {"query_pre_attn_scalar": 8, "sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = SHAPE | EXPERTS | LATENT | {"num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
BASES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": GROUPED,
    "qwen3": HEAD_DIM,
    "qwen3_moe": HEAD_DIM | EXPERTS | {"num_experts": 4},
    "gpt2": {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 61},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "deepseek_v2": DEEPSEEK | {"n_routed_experts": 4},
    "deepseek_v3": DEEPSEEK | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
}
"""Configs by model type: small, and different in every number that can be mistaken for another."""

TOLERANCE = 1e-4  # of logits, fp32


@torch.no_grad()
def write_model(directory: Path, config: dict[str, Any], seed: int = 0, **how: Any) -> None:
    """Saves a model of transformers with random weights, and `config` itself as config.json."""
    directory.mkdir(exist_ok=True)
    write_config(directory, config)
    read = AutoConfig.from_pretrained(directory)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(read, dtype=torch.float32, attn_implementation="eager")
    for p in model.parameters():
        p.normal_(0, 0.3) if p.dim() > 1 else p.add_(torch.rand_like(p) - 0.5)
    model.save_pretrained(directory, **how)
    write_config(directory, config)


def write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def tokens(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns ids and positions, [1, 40] each."""
    ids = torch.randint(config.get("vocab_size", 61), (1, 40), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(40)[None]


@torch.no_grad()
def their_logits(directory: Path, config: dict[str, Any]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    ids, positions = tokens(config)
    return model(ids, position_ids=positions).logits


@torch.no_grad()
def our_logits(directory: Path, config: dict[str, Any]) -> Tensor:
    """Raises ValueError where we refuse the directory."""
    model = resolve_model(ModelConfig(init_from=str(directory)))
    read, decoder = hf_weight_source(str(directory), model), Decoder(model).eval()
    decoder.load_state_dict({name: read(name).float() for name in decoder.state_dict()})
    return decoder(*tokens(config))


def same_logits(directory: Path, config: dict[str, Any]) -> None:
    """Asserts that transformers and we read the same model in a directory."""
    theirs = their_logits(directory, config)
    assert theirs.isfinite().all() and theirs.std() > 0.1
    assert (our_logits(directory, config) - theirs).abs().max() < TOLERANCE
