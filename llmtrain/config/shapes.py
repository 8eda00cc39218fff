"""Shapes of models: published presets, shapes of weights on disk, Hugging Face's config.json, parameter counts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from llmtrain.config.load import load
from llmtrain.config.ramp import trained_model
from llmtrain.config.schema import ModelConfig, RopeScaling, RunConfig

SHAPE = tuple(name for name in ModelConfig.model_fields if name not in ("preset", "init_from"))


def _llama3(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    """Llama 3 (arXiv 2407.21783, table 3) as released: vocabulary 128,256, context 8,192."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_size": ffn,
        "num_heads": heads,
        "num_kv_heads": 8,
        "vocab_size": 128256,
        "max_positions": 8192,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_embeddings": False,
    }


def _llama31(shape: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1: the same shapes, context 131,072 by frequency scaling."""
    return {**shape, "max_positions": 131072, "rope_scaling": RopeScaling()}


_LLAMA3 = {
    "8b": _llama3(32, 4096, 14336, 32),
    "70b": _llama3(80, 8192, 28672, 64),
    "405b": _llama3(126, 16384, 53248, 128),
}
PRESETS: dict[str, dict[str, Any]] = {
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


def resolve_model(model: ModelConfig, earlier: Mapping[str, ModelConfig | None] | None = None) -> ModelConfig:
    """The model with every field filled in. Resolving twice gives the same.

    Written fields win over those of `preset`; those of `init_from` (weights that exist) they may not contradict.
    `earlier` holds models of run directories that are not there yet (the stages before this one).
    Raises ValueError for an unknown preset, unreadable weights or a contradiction.
    """
    if set(SHAPE) <= model.model_fields_set and model.head_dim:
        return model  # resolved before: its sources need not exist any more
    if model.preset and model.init_from:
        raise ValueError(f"model.preset={model.preset}: model.init_from already gives the shape; remove model.preset")
    written = {name: getattr(model, name) for name in SHAPE if name in model.model_fields_set}
    base = {name: getattr(model, name) for name in SHAPE}
    if model.preset:
        base |= _preset(model.preset)
    if model.init_from:
        base |= fields_from_directory(model.init_from, earlier or {})
        _check_agreement(model.init_from, base, written)
    filled = {**base, **written}
    head_dim = filled["head_dim"] or max(1, filled["hidden_size"] // filled["num_heads"])
    return ModelConfig(preset=model.preset, init_from=model.init_from, **{**filled, "head_dim": head_dim})


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"model.preset={name}: is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _check_agreement(source: str, found: dict[str, Any], written: dict[str, Any]) -> None:
    wrong = [
        f"model.{name}={value}: the weights in {source} have {found[name]}; remove the line"
        for name, value in written.items()
        if value != found[name] and not (name == "head_dim" and value is None)
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def fields_from_directory(directory: str, earlier: Mapping[str, ModelConfig | None]) -> dict[str, Any]:
    """Shape of the weights in a Hugging Face directory (config.json) or a run directory (config.yaml)."""
    hugging_face, run = (os.path.join(directory, name) for name in ("config.json", "config.yaml"))
    if os.path.isfile(hugging_face):
        with open(hugging_face, encoding="utf-8") as file:
            return _read_hf(hugging_face, file.read())
    if os.path.isfile(run):
        return _read_run(run)
    known = {os.path.normpath(path): model for path, model in earlier.items()}.get(os.path.normpath(directory))
    if known is None:
        raise ValueError(
            f"model.init_from={directory}: has neither config.json (Hugging Face) nor config.yaml (a run); "
            "give the directory of a model or of one finished stage"
        )
    return _shape(known)


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in SHAPE}


def _read_hf(path: str, text: str) -> dict[str, Any]:
    try:
        return fields_from_hf(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}; export the model again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_run(path: str) -> dict[str, Any]:
    config = load(path, [])
    if isinstance(config, RunConfig):
        raise ValueError(f"model.init_from: {path} is a run of several stages; give the directory of one of them")
    return _shape(trained_model(resolve_model(config.model), config.train, newest_step(os.path.dirname(path))))


def newest_step(run: str) -> int:
    """Of the checkpoints in a run directory; 0 without any."""
    folder = os.path.join(run, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return max((int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name)), default=0)


# Keys of config.json that change what the model computes, with the only values that our decoder computes.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def fields_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig from the content of a config.json of the Llama family.

    Reads RoPE in the old form (`rope_theta`, `rope_scaling`) and in that of transformers 5 (`rope_parameters`).
    Raises ValueError for what the decoder does not compute.
    """
    defaults = {"model_type": None, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, allowed in _HF_FIXED.items():
        if config.get(key, defaults.get(key)) not in allowed:
            raise ValueError(f"{key}={config.get(key)}: only {allowed[0]} is supported; use a Llama-family model")
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in names if not isinstance(config.get(name), int)]:
        raise ValueError(f"{missing[0]}: is missing or no whole number; use a complete config.json")
    theta, scaling = _rope(config)
    heads = config["num_attention_heads"]
    return {
        "attention": "gqa",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_size": config["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "max_positions": config.get("max_position_embeddings", 2048),  # the defaults of LlamaConfig
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_type={kind}: only default and llama3 are supported; use a model without it")
    return theta, RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_positions=rope.get("original_max_position_embeddings") or config["max_position_embeddings"],
    )


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """The content of config.json that makes transformers and vLLM build `LlamaForCausalLM` with this shape.

    RoPE stands in both forms: transformers 5 and vLLM read `rope_parameters`, transformers 4 the other keys.
    """
    m = resolve_model(model)
    old = {} if m.rope_scaling is None else {"rope_scaling": _hf_rope(m)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "hidden_size": m.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": m.ffn_size,
        "max_position_embeddings": m.max_positions,
        "mlp_bias": False,
        "num_attention_heads": m.num_heads,
        "num_hidden_layers": m.num_layers,
        "num_key_value_heads": m.num_kv_heads,
        "rms_norm_eps": m.norm_eps,
        "rope_parameters": {**_hf_rope(m), "rope_theta": m.rope_theta},
        "rope_theta": m.rope_theta,
        **old,
        "tie_word_embeddings": m.tie_embeddings,
        "use_cache": True,
        "vocab_size": m.vocab_size,
    }


def _hf_rope(model: ModelConfig) -> dict[str, Any]:
    s = model.rope_scaling
    if s is None:
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": s.factor,
        "low_freq_factor": s.low_freq_factor,
        "high_freq_factor": s.high_freq_factor,
        "original_max_position_embeddings": s.original_max_positions,
    }


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole decoder, by arithmetic; a tied head counts once."""
    m = resolve_model(model)
    embeddings = m.vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)
    return embeddings + m.num_layers * block_parameters(m) + m.hidden_size


def block_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Parameters of one block on one of `tp` tensor-parallel ranks; norms are whole on each. `model` is resolved."""
    m = model
    assert m.head_dim is not None
    attention = 2 * m.hidden_size * m.head_dim * (m.num_heads + m.num_kv_heads)
    return (attention + 3 * m.hidden_size * m.ffn_size) // tp + 2 * m.hidden_size
