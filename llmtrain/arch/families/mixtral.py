"""Defines the family Mixtral (arXiv 2401.04088): Llama with experts in every layer."""

from __future__ import annotations

from typing import Any

from llmtrain.arch.families.base import LLAMA_MODULES, Family, HfConfig, common_fields, common_hf, demand, number
from llmtrain.config.schema import ModelConfig, MoeConfig

THEIRS = "model.layers.*.block_sparse_moe"
MODULES = {name: theirs for name, theirs in LLAMA_MODULES.items() if ".feedforward." not in name} | {
    "layers.*.feedforward.router": f"{THEIRS}.gate",
    "layers.*.feedforward.experts.gate": f"{THEIRS}.experts.#.w1.weight",
    "layers.*.feedforward.experts.up": f"{THEIRS}.experts.#.w3.weight",
    "layers.*.feedforward.experts.down": f"{THEIRS}.experts.#.w2.weight",
}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    demand(config, {"hidden_act": ("silu",), "attention_bias": (False,), "router_jitter_noise": (0,)})
    fields = common_fields({"rope_theta": 1e6, **config}, max_positions=131072, norm_eps=1e-5, kv_heads=8)
    experts = number(config, "num_local_experts", default=8)
    top_k = number(config, "num_experts_per_tok", default=2)
    fields["moe"] = MoeConfig(num_experts=experts, top_k=top_k, expert_ffn_size=fields["ffn_size"])
    if window := config.get("sliding_window"):
        fields |= {"sliding_window": window, "layer_types": ["sliding"]}
    return fields


def to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json. Its `intermediate_size` is the width of an expert, as no layer is dense."""
    e = model.moe or MoeConfig()
    return {
        **{key: value for key, value in common_hf(model).items() if key != "attention_bias"},
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": e.expert_ffn_size,
        "num_experts_per_tok": e.top_k,
        "num_local_experts": e.num_experts,
        "sliding_window": model.sliding_window,
    }


def _mixtral(layers: int, hidden: int, ffn: int, heads: int, max_positions: int) -> dict[str, Any]:
    """Returns a Mixtral as released: 2 of 8 experts for each token, vocabulary 32,000."""
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": ffn, "num_heads": heads, "num_kv_heads": 8}
    rest = {"vocab_size": 32000, "max_positions": max_positions, "tie_embeddings": False}
    return {**shape, **rest, "moe": MoeConfig(expert_ffn_size=ffn)}


FAMILY = Family(
    name="mixtral",
    fields={"moe": MoeConfig(), "rope_theta": 1e6},
    presets={
        "mixtral-8x7b": _mixtral(32, 4096, 14336, 32, 32768),
        "mixtral-8x22b": _mixtral(56, 6144, 16384, 48, 65536),
    },
    model_type="mixtral",
    aliases={"num_experts": "num_local_experts"},
    classifier="MixtralForSequenceClassification",
    from_hf=from_hf,
    to_hf=to_hf,
    modules=MODULES,
    renamed=((r"model\.layers\.(\d+)\.mlp\.(.*)", r"model.layers.\1.block_sparse_moe.\2"),),
)
