"""Defines the families Gemma 2 and 3, text only (arXiv 2408.00118, 2503.19786).

They have norms before and after both attention and feed-forward, with factors 1 + weight; GeGLU; scaled embeddings;
alternating sliding-window and full attention. Gemma 2 soft-caps scores and logits; Gemma 3 normalises q and k instead,
and its sliding layers have a RoPE theta of their own.
"""

from __future__ import annotations

from typing import Any

from llmtrain.arch.families.base import (
    LLAMA_MODULES,
    Family,
    HfConfig,
    common_fields,
    common_hf,
    demand,
    number,
    rope_fields,
    rope_hf,
)
from llmtrain.arch.families.qwen import layer_kinds
from llmtrain.config.schema import ModelConfig, RopeScaling

FIELDS: dict[str, Any] = {
    "block": "sandwich",
    "norm_offset": True,
    "norm_eps": 1e-6,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
    "tie_embeddings": True,
}
GEMMA2_FIELDS = {**FIELDS, "layer_types": ["sliding", "full"], "sliding_window": 4096}
GEMMA2_FIELDS |= {"attention_softcap": 50.0, "logit_softcap": 30.0}
GEMMA3_FIELDS = {**FIELDS, "layer_types": ["sliding"] * 5 + ["full"], "sliding_window": 1024, "qk_norm": True}
GEMMA3_FIELDS |= {"rope_theta": 1e6, "rope_theta_sliding": 1e4}
MODULES = {
    **LLAMA_MODULES,
    "layers.*.attention_post_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.feedforward_norm": "model.layers.*.pre_feedforward_layernorm",
    "layers.*.feedforward_post_norm": "model.layers.*.post_feedforward_layernorm",
}
DEFAULTS = {  # defaults of the config classes; released files leave these keys out
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
COMPUTED = {
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
}


def gemma2_from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    demand(config, {"sliding_window_pattern": (2,)})  # transformers reads it for Gemma 3 only
    config = {"vocab_size": 256000, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **config}
    fields = _common(config, positions=8192, period=2)
    return {**fields, "attention_softcap": config["attn_logit_softcapping"]}


def gemma3_from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    # transformers reads the soft cap of the scores but never applies it, so such a file is ambiguous
    demand(config, {"attn_logit_softcapping": (None,)})
    fields = _common({"vocab_size": 262208, **config}, positions=131072, period=6)
    theta, scaling, local = gemma3_rope(config)
    sliding = local if "sliding" in fields["layer_types"] else None
    return {**fields, "rope_theta": theta, "rope_scaling": scaling, "rope_theta_sliding": sliding}


def _common(config: HfConfig, positions: int, period: int) -> dict[str, Any]:
    """Returns the fields of either family; every `period`-th layer is full where the config does not list the types."""
    demand(config, COMPUTED)
    config = {**DEFAULTS, **config}
    window, period = config.get("sliding_window", 4096), number(config, "sliding_window_pattern", default=period)
    layers = number(config, "num_hidden_layers")
    default = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    kinds = config.get("layer_types") or default
    scalar, head_dim = number(config, "query_pre_attn_scalar", default=256), number(config, "head_dim")
    rope = {"rope_parameters": (config.get("rope_parameters") or {}).get("full_attention")} if period == 6 else {}
    return {
        **common_fields({**config, **rope}, max_positions=positions),
        "attention_scale": None if scalar == head_dim else scalar**-0.5,
        "layer_types": layer_kinds(kinds, layers, window),
        "sliding_window": window,
        "logit_softcap": config.get("final_logit_softcapping"),
    }


def gemma3_rope(config: HfConfig) -> tuple[float, RopeScaling | None, float]:
    """Returns (theta and scaling of full layers, theta of sliding ones), from the old form or that of transformers
    5."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if "type" in old and old["type"] != old.get("rope_type", "default"):  # transformers takes no notice of `type` here
        raise ValueError(f"rope_scaling={old}: Gemma 3 reads rope_type, and not type; give the kind as rope_type")
    full = new.get("full_attention") or old
    sliding = new.get("sliding_attention") or {}
    theta, local = config.get("rope_theta", 1e6), config.get("rope_local_base_freq", 1e4)
    local, unscaled = rope_fields(config, {"rope_theta": local, **sliding})
    if unscaled is not None:
        raise ValueError(f"rope_type={unscaled.type}: not in sliding layers; use another model")
    return *rope_fields(config, {"rope_theta": theta, **full}), local


def _hf(model: ModelConfig) -> HfConfig:
    m = model
    scale = m.head_dim if m.attention_scale is None else round(m.attention_scale**-2)
    kinds = m.layer_types or ["full"] * m.num_layers
    return {
        **{key: value for key, value in common_hf(m).items() if key != "hidden_act"},
        "attn_logit_softcapping": m.attention_softcap,
        "final_logit_softcapping": m.logit_softcap,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "query_pre_attn_scalar": scale,
        "sliding_window": m.sliding_window,
    }


def gemma2_to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json."""
    return {**_hf(model), "architectures": ["Gemma2ForCausalLM"]}


def gemma3_to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json."""
    local = model.rope_theta_sliding or model.rope_theta
    full = {**rope_hf(model), "rope_theta": model.rope_theta}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    own = {"rope_parameters": rope, "rope_local_base_freq": local, "architectures": ["Gemma3ForCausalLM"]}
    return {**_hf(model), **own}


def init(name: str, shape: tuple[int, ...], model: ModelConfig) -> float:
    """Returns 0.02, the `initializer_range` of the released files, for all weights.

    Attention and feed-forward each end in a norm, so a smaller output projection would change only its gradient.
    """
    return 0.02


def _shape(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int = 256) -> dict[str, Any]:
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": ffn, "num_heads": heads}
    return {**shape, "num_kv_heads": kv_heads, "head_dim": head_dim}


_SMALL2 = {"vocab_size": 256000, "max_positions": 8192}
_SMALL3 = {"vocab_size": 262144, "max_positions": 32768, "sliding_window": 512}
_LARGE3 = {"vocab_size": 262208, "max_positions": 131072, "rope_scaling": RopeScaling(type="linear", factor=8.0)}
GEMMA2_PRESETS: dict[str, dict[str, Any]] = {
    "gemma2-2b": {**_shape(26, 2304, 9216, 8, 4), **_SMALL2},
    "gemma2-9b": {**_shape(42, 3584, 14336, 16, 8), **_SMALL2},
    "gemma2-27b": {**_shape(46, 4608, 36864, 32, 16, 128), **_SMALL2, "attention_scale": 144**-0.5},
}
GEMMA3_PRESETS: dict[str, dict[str, Any]] = {
    "gemma3-270m": {**_shape(18, 640, 2048, 4, 1), **_SMALL3},
    "gemma3-1b": {**_shape(26, 1152, 6912, 4, 1), **_SMALL3},
    # the language models of multimodal releases
    "gemma3-4b": {**_shape(34, 2560, 10240, 8, 4), **_LARGE3},
    "gemma3-12b": {**_shape(48, 3840, 15360, 16, 8), **_LARGE3},
    "gemma3-27b": {**_shape(62, 5376, 21504, 32, 16, 128), **_LARGE3, "attention_scale": 168**-0.5},
}

GEMMA2 = Family(
    name="gemma2",
    fields=GEMMA2_FIELDS,
    presets=GEMMA2_PRESETS,
    model_type="gemma2",
    classifier="Gemma2ForSequenceClassification",
    from_hf=gemma2_from_hf,
    to_hf=gemma2_to_hf,
    modules=MODULES,
    init=init,
)
GEMMA3 = Family(
    name="gemma3",
    fields=GEMMA3_FIELDS,
    presets=GEMMA3_PRESETS,
    model_type="gemma3_text",
    classifier="Gemma3TextForSequenceClassification",
    wrappers=("gemma3",),
    from_hf=gemma3_from_hf,
    to_hf=gemma3_to_hf,
    modules=MODULES,
    renamed=((r"language_model\.(.*)", r"\1"), (r"model\.language_model\.(.*)", r"model.\1")),
    ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
    init=init,
)
