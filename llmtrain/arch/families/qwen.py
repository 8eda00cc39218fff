"""Defines the families Qwen2 (with 2.5; arXiv 2407.10671, 2412.15115) and Qwen3 (arXiv 2505.09388).

Qwen2 has biases of q, k and v. Qwen3 normalises q and k instead, and its head_dim is independent of hidden_size. No
initialisation is published; the usual one is used.
"""

from __future__ import annotations

from typing import Any

from llmtrain.arch.families.base import LLAMA_MODULES, Family, HfConfig, common_fields, common_hf, demand, number
from llmtrain.config.schema import ModelConfig

FIELDS: dict[str, Any] = {"norm_eps": 1e-6, "rope_theta": 1e6}
COMPUTED = {
    "hidden_act": ("silu",),
    "use_mrope": (False, None),
}


def qwen2_from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    demand(config, COMPUTED)
    return {**common_fields(config, max_positions=32768, kv_heads=32), **sliding_fields(config)}


def qwen3_from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    demand(config, {"attention_bias": (True, False)})
    biased = config.get("attention_bias", False)
    own = {"head_dim": number(config, "head_dim", default=128), "qkv_bias": biased, "o_bias": biased}
    return {**qwen2_from_hf(config), **own}


def sliding_fields(config: HfConfig) -> dict[str, Any]:
    """Returns `layer_types` and `sliding_window`. Without `layer_types` in the file, and with sliding windows in use,
    layers from `max_window_layers` on are sliding.

    Raises ValueError for sliding layers without a window.
    """
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    layers, first = number(config, "num_hidden_layers"), config.get("max_window_layers", 28)
    written = config.get("layer_types")
    kinds = written or [f"{'sliding' if window and i >= first else 'full'}_attention" for i in range(layers)]
    return {"layer_types": layer_kinds(kinds, layers, window), "sliding_window": window}


def layer_kinds(types: list[str], layers: int, window: int | None) -> list[str]:
    """Returns our names of the layer types. Raises ValueError for another type or number, or a sliding one without a
    window."""
    if len(types) != layers:
        raise ValueError(
            f"layer_types: has {len(types)} entries for num_hidden_layers={layers}; use a complete config.json"
        )
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types={kind}: only full_attention and sliding_attention are supported")
        if kind == "sliding_attention" and window is None:
            raise ValueError("layer_types: has sliding_attention, which needs sliding_window; give it in config.json")
    return [kind.removesuffix("_attention") for kind in types]


def sliding_hf(model: ModelConfig) -> HfConfig:
    """Returns the keys that `sliding_fields` reads."""
    kinds = model.layer_types or ["full"] * model.num_layers
    return {
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "max_window_layers": kinds.index("sliding") if "sliding" in kinds else model.num_layers,
        "sliding_window": model.sliding_window,
        "use_sliding_window": model.sliding_window is not None,
    }


def qwen2_to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json, which has no key for the width of a head or for biases."""
    common = {k: v for k, v in common_hf(model).items() if k not in ("head_dim", "attention_bias")}
    return {**common, **sliding_hf(model), "architectures": ["Qwen2ForCausalLM"]}


def qwen3_to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json."""
    own = {"attention_bias": model.qkv_bias, "architectures": ["Qwen3ForCausalLM"]}
    return {**common_hf(model), **sliding_hf(model), **own}


def _qwen2(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, positions: int, tied: bool) -> dict[str, Any]:
    """Returns a Qwen2 as released: the small models, which are tied, have 151,936 tokens, the others 152,064."""
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": ffn, "num_heads": heads, "num_kv_heads": kv_heads}
    return {**shape, "max_positions": positions, "vocab_size": 151936 if tied else 152064, "tie_embeddings": tied}


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> dict[str, Any]:
    """Returns a Qwen3 as released: 8 K/V heads, heads of 128, 151,936 tokens."""
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": ffn, "num_heads": heads, "num_kv_heads": 8}
    return {**shape, "head_dim": 128, "max_positions": 40960, "vocab_size": 151936, "tie_embeddings": tied}


QWEN2_PRESETS: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": _qwen2(24, 896, 4864, 14, 2, 131072, True),
    "qwen2-1.5b": _qwen2(28, 1536, 8960, 12, 2, 131072, True),
    "qwen2-7b": _qwen2(28, 3584, 18944, 28, 4, 131072, False),
    "qwen2-72b": _qwen2(80, 8192, 29568, 64, 8, 131072, False) | {"norm_eps": 1e-5},
    # Qwen2.5: only the sizes that Qwen2 does not have
    "qwen2.5-3b": _qwen2(36, 2048, 11008, 16, 2, 32768, True),
    "qwen2.5-14b": _qwen2(48, 5120, 13824, 40, 8, 131072, False) | {"norm_eps": 1e-5},
    "qwen2.5-32b": _qwen2(64, 5120, 27648, 40, 8, 131072, False) | {"norm_eps": 1e-5},
}
QWEN3_PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, False),
}

QWEN2 = Family(
    name="qwen2",
    fields={**FIELDS, "qkv_bias": True},
    presets=QWEN2_PRESETS,
    model_type="qwen2",
    classifier="Qwen2ForSequenceClassification",
    from_hf=qwen2_from_hf,
    to_hf=qwen2_to_hf,
    modules=LLAMA_MODULES,
)
QWEN3 = Family(
    name="qwen3",
    fields={**FIELDS, "qk_norm": True},
    presets=QWEN3_PRESETS,
    model_type="qwen3",
    classifier="Qwen3ForSequenceClassification",
    from_hf=qwen3_from_hf,
    to_hf=qwen3_to_hf,
    modules=LLAMA_MODULES,
)
