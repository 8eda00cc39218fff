"""Defines the family of GPT-2 and GPT-3 (Radford et al. 2019; arXiv 2005.14165).

They have learned positions, LayerNorm and biases everywhere, GELU, and on disk a fused and transposed q|k|v. The layers
of GPT-3 with banded sparse attention, whose bands the paper does not specify, are dense here. There is no dropout.
"""

from __future__ import annotations

from typing import Any

from llmtrain.arch.families.base import FOR_ALL, Disk, Family, HfConfig, demand, module_name, number, plain_disk
from llmtrain.config.schema import ModelConfig

FIELDS: dict[str, Any] = {
    "norm": "layer",
    "norm_bias": True,
    "activation": "gelu_tanh",
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "ffn_bias": True,
    "positions": "learned",
    "tie_embeddings": True,
}
MODULES = {
    "embed": "transformer.wte",
    "position_embed": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "layers.*.attention_norm": "transformer.h.*.ln_1",
    "layers.*.attention.o": "transformer.h.*.attn.c_proj",
    "layers.*.feedforward_norm": "transformer.h.*.ln_2",
    "layers.*.feedforward.up": "transformer.h.*.mlp.c_fc",
    "layers.*.feedforward.down": "transformer.h.*.mlp.c_proj",
    **{f"layers.*.attention.{part}": "transformer.h.*.attn.c_attn" for part in "qkv"},
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
COMPUTED = {  # options of the config class that change what is computed
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    **FOR_ALL,
}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Returns the fields of ModelConfig. Raises ValueError for options that the decoder does not implement."""
    demand(config, {**COMPUTED, "activation_function": tuple(ACTIVATIONS)})
    heads, hidden = number(config, "n_head"), number(config, "n_embd")
    return {
        "num_layers": number(config, "n_layer"),
        "hidden_size": hidden,
        "ffn_size": number(config, "n_inner", default=4 * hidden),
        "num_heads": heads,
        "num_kv_heads": heads,
        "vocab_size": number(config, "vocab_size"),
        "max_positions": number(config, "n_positions", "n_ctx", default=1024),
        "activation": ACTIVATIONS[config.get("activation_function", "gelu_new")],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def to_hf(model: ModelConfig) -> HfConfig:
    """Returns the content of config.json."""
    m = model
    return {
        **{f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")},
        "activation_function": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[m.activation],
        "architectures": ["GPT2LMHeadModel"],
        "initializer_range": 0.02,
        "layer_norm_epsilon": m.norm_eps,
        "n_embd": m.hidden_size,
        "n_head": m.num_heads,
        "n_inner": m.ffn_size,
        "n_layer": m.num_layers,
        "n_positions": m.max_positions,
        "tie_word_embeddings": m.tie_embeddings,
        "use_cache": True,
        "vocab_size": m.vocab_size,
    }


def disk(family: Family, name: str, model: ModelConfig) -> Disk:
    """Returns the place of a parameter: projections are stored transposed, and q, k, v are thirds of one tensor."""
    module, _, leaf = name.rpartition(".")
    part = module.rpartition(".")[2]
    if part in ("q", "k", "v"):
        fused = (f"{module_name(family, module)}.{leaf}",)
        return Disk(fused, transpose=leaf == "weight", part=("qkv".index(part), 3))
    if part in ("o", "up", "down") and leaf == "weight":
        return Disk((f"{module_name(family, module)}.weight",), transpose=True)
    return plain_disk(family, name, model)


def init(name: str, shape: tuple[int, ...], model: ModelConfig) -> float | None:
    """Returns the standard deviation of the released code: 0.01 for positions, else None, the usual one.

    That is N(0, 0.02), divided by sqrt(2 layers) for projections into the residual stream (section 2.3 of the paper).
    """
    return 0.01 if name == "position_embed.weight" else None


def _shape(layers: int, hidden: int, heads: int, positions: int) -> dict[str, Any]:
    """Returns the fields of a preset: vocabulary 50,257, feed-forward layer four times as wide as the residual
    stream."""
    shape = {"num_layers": layers, "hidden_size": hidden, "num_heads": heads, "num_kv_heads": heads}
    return {**shape, "ffn_size": 4 * hidden, "max_positions": positions, "vocab_size": 50257}


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _shape(12, 768, 12, 1024),
    "gpt2-medium": _shape(24, 1024, 16, 1024),
    "gpt2-large": _shape(36, 1280, 20, 1024),
    "gpt2-xl": _shape(48, 1600, 25, 1024),
    # table 2.1 of the GPT-3 paper; its 24 heads of 128 (XL) and its 5,140 (13B) do not fit the other columns
    "gpt3-125m": _shape(12, 768, 12, 2048),
    "gpt3-350m": _shape(24, 1024, 16, 2048),
    "gpt3-760m": _shape(24, 1536, 16, 2048),
    "gpt3-1.3b": _shape(24, 2048, 16, 2048),
    "gpt3-2.7b": _shape(32, 2560, 32, 2048),
    "gpt3-6.7b": _shape(32, 4096, 32, 2048),
    "gpt3-13b": _shape(40, 5120, 40, 2048),
    "gpt3-175b": _shape(96, 12288, 96, 2048),
}

FAMILY = Family(
    name="gpt2",
    fields=FIELDS,
    presets=PRESETS,
    model_type="gpt2",
    aliases=ALIASES,
    classifier="GPT2ForSequenceClassification",
    from_hf=from_hf,
    to_hf=to_hf,
    modules=MODULES,
    disk=disk,
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    init=init,
)
