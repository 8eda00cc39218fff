"""Defines the family of Llama 2 and 3 and SmolLM2 (arXiv 2302.13971, 2307.09288, 2407.21783): the decoder's
defaults."""

from __future__ import annotations

from typing import Any

from llmtrain.arch.families.base import LLAMA_MODULES, Family, HfConfig, common_fields, common_hf, demand
from llmtrain.config.schema import ModelConfig, RopeScaling

FIELDS: dict[str, Any] = {}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    demand(config, {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)})
    return common_fields(config)


def to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json."""
    return {**common_hf(model), "architectures": ["LlamaForCausalLM"], "mlp_bias": False}


def _llama2(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Returns a Llama 2 as released: vocabulary 32,000, context 4,096."""
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": ffn, "num_heads": heads, "num_kv_heads": kv_heads}
    return {**shape, "vocab_size": 32000, "max_positions": 4096, "norm_eps": 1e-5, "tie_embeddings": False}


def _llama3(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    """Returns a Llama 3 (arXiv 2407.21783, table 3) as released: vocabulary 128,256, context 8,192."""
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": ffn, "num_heads": heads, "num_kv_heads": 8}
    rest = {"vocab_size": 128256, "max_positions": 8192, "norm_eps": 1e-5, "tie_embeddings": False}
    return {**shape, **rest, "rope_theta": 500000.0}


def _llama31(shape: dict[str, Any]) -> dict[str, Any]:
    """Returns a Llama 3.1: the same shapes, context 131,072 by frequency scaling."""
    return {**shape, "max_positions": 131072, "rope_scaling": RopeScaling()}


_LLAMA3 = {
    "8b": _llama3(32, 4096, 14336, 32),
    "70b": _llama3(80, 8192, 28672, 64),
    "405b": _llama3(126, 16384, 53248, 128),
}
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _llama2(32, 4096, 11008, 32, 32),
    "llama2-13b": _llama2(40, 5120, 13824, 40, 40),
    "llama2-70b": _llama2(80, 8192, 28672, 64, 8),
    **{f"llama3-{size}": shape for size, shape in _LLAMA3.items()},
    **{f"llama3.1-{size}": _llama31(shape) for size, shape in _LLAMA3.items()},
    "smollm2-135m": {
        "num_layers": 30,
        "hidden_size": 576,
        "ffn_size": 1536,
        "num_heads": 9,
        "num_kv_heads": 3,
        "vocab_size": 49152,
        "max_positions": 8192,
        "norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_embeddings": True,
    },
}

FAMILY = Family(
    name="llama",
    fields=FIELDS,
    presets=PRESETS,
    model_type="llama",
    classifier="LlamaForSequenceClassification",
    from_hf=from_hf,
    to_hf=to_hf,
    modules=LLAMA_MODULES,
)
