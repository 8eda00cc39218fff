"""Defines the family Qwen3-MoE (arXiv 2505.09388): Qwen3 with many small experts."""

from __future__ import annotations

from typing import Any

from llmtrain.arch.families.base import LLAMA_MODULES, Family, HfConfig, common_fields, common_hf, demand, number
from llmtrain.config.schema import ModelConfig, MoeConfig

THEIRS = "model.layers.*.mlp"
MODULES = LLAMA_MODULES | {
    "layers.*.feedforward.router": f"{THEIRS}.gate",
    "layers.*.feedforward.experts.gate": f"{THEIRS}.experts.#.gate_proj.weight",
    "layers.*.feedforward.experts.up": f"{THEIRS}.experts.#.up_proj.weight",
    "layers.*.feedforward.experts.down": f"{THEIRS}.experts.#.down_proj.weight",
}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    demand(config, {"hidden_act": ("silu",), "use_sliding_window": (False, None)})
    fields = common_fields(config, max_positions=32768, kv_heads=4)
    experts = MoeConfig(
        num_experts=number(config, "num_experts", default=128),
        top_k=number(config, "num_experts_per_tok", default=8),
        expert_ffn_size=number(config, "moe_intermediate_size", default=768),
        dense_layers=_dense_layers(config, fields["num_layers"]),
        normalize=config.get("norm_topk_prob", False),
    )
    bias = config.get("attention_bias", False)
    return {**fields, "moe": experts, "qkv_bias": bias, "o_bias": bias}


def _dense_layers(config: HfConfig, num_layers: int) -> list[int]:
    """Returns the dense layers: those whose number (from 1) `decoder_sparse_step` does not divide, and
    `mlp_only_layers`."""
    step, listed = number(config, "decoder_sparse_step", default=1), config.get("mlp_only_layers") or []
    return [layer for layer in range(num_layers) if layer in listed or (layer + 1) % step]


def to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json."""
    e = model.moe or MoeConfig()
    return {
        **common_hf(model),
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": model.qkv_bias,
        "decoder_sparse_step": 1,
        "mlp_only_layers": e.dense_layers,
        "moe_intermediate_size": e.expert_ffn_size,
        "norm_topk_prob": e.normalize,
        "num_experts": e.num_experts,
        "num_experts_per_tok": e.top_k,
        "use_sliding_window": False,
    }


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, expert_ffn: int) -> dict[str, Any]:
    """Returns a Qwen3-MoE as released: 8 of 128 experts for each token, 4 K/V heads of 128, vocabulary 151,936."""
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": ffn, "num_heads": heads, "num_kv_heads": 4}
    rest = {"head_dim": 128, "vocab_size": 151936, "max_positions": 40960, "rope_theta": 1e6, "tie_embeddings": False}
    return {**shape, **rest, "moe": MoeConfig(num_experts=128, top_k=8, expert_ffn_size=expert_ffn)}


FAMILY = Family(
    name="qwen3-moe",
    fields={"moe": MoeConfig(), "qk_norm": True, "norm_eps": 1e-6},
    presets={
        "qwen3-30b-a3b": _qwen3(48, 2048, 6144, 32, 768),
        "qwen3-235b-a22b": _qwen3(94, 4096, 12288, 64, 1536),
    },
    model_type="qwen3_moe",
    aliases={"num_local_experts": "num_experts"},
    classifier="Qwen3MoeForSequenceClassification",
    from_hf=from_hf,
    to_hf=to_hf,
    modules=MODULES,
)
