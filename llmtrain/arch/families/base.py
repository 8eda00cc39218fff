"""Defines what a model family is: its fields, its presets, and its form in a Hugging Face directory. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtrain.config.schema import ModelConfig, RopeScaling

HfConfig = dict[str, Any]


@dataclass(frozen=True)
class Disk:
    """Says where one of our parameters lies in a Hugging Face directory.

    Examples: Disk(("lm_head.weight",)); the middle third of GPT-2's transposed q|k|v:
    Disk(("transformer.h.0.attn.c_attn.weight",), transpose=True, part=(1, 3)); the weights of two experts, stacked:
    Disk(("...experts.0.w1.weight", "...experts.1.w1.weight"), stacked=True)
    """

    names: tuple[str, ...]
    stacked: bool = False  # our tensor stacks those of `names` along a new dim 0
    transpose: bool = False  # our tensor is the transpose of theirs
    part: tuple[int, int] | None = None  # (i, n): our tensor is the i-th of n equal parts along dim 0
    copies: tuple[str, ...] = ()  # further names it is written under, but not read from

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each stored tensor, given the `shape` of our parameter."""
        shape = shape[1:] if self.stacked else shape
        if self.part:
            shape = (shape[0] * self.part[1], *shape[1:])
        return shape[::-1] if self.transpose else shape


@dataclass(frozen=True)
class Family:
    """Describes the models that one value of `model.family` stands for.

    `fields` are the ModelConfig fields that all its models share; `modules` maps our module names to those of Hugging
    Face, with `*` for the number of a layer and `#` (at most once) for that of an expert.
    """

    name: str
    fields: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model_type: str | None = None  # `model_type` in config.json; None = transformers has no such model
    from_hf: Callable[[HfConfig], dict[str, Any]] | None = None  # ModelConfig fields; raises ValueError
    to_hf: Callable[[ModelConfig], HfConfig] | None = None  # the content of config.json
    modules: Mapping[str, str] = field(default_factory=dict)
    classifier: str | None = None  # transformers' class with `score.weight`, for head: scalar; None = it has none
    disk: Callable[[Family, str, ModelConfig], Disk] | None = None  # None = `plain_disk`
    aliases: Mapping[str, str] = field(default_factory=dict)  # further keys of config.json: what they stand for
    wrappers: tuple[str, ...] = ()  # model types whose `text_config` is a config of this family
    renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) of tensor names in other or older files
    ignored: tuple[str, ...] = ()  # patterns of tensor names, after renaming, that are not read
    left_out: Callable[[str, ModelConfig], bool] | None = None  # True for tensors of parts that this model lacks
    parts: str | None = None  # import path of a module with torch layers of its own, see docs/models.md
    feedforward_shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]] | None = None  # for its own feed-forward
    init: Callable[[str, tuple[int, ...], ModelConfig], float | None] | None = None  # initial std; None = usual

    def where(self, name: str, model: ModelConfig) -> Disk:
        """Returns where a canonical parameter lies in a Hugging Face directory."""
        if name == "head.weight" and model.head == "scalar":
            return Disk(("score.weight",))
        return (self.disk or plain_disk)(self, name, model)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Registers a family. Raises ValueError if its name or one of its presets is taken."""
    taken = {preset for other in FAMILIES.values() if other.name != family.name for preset in other.presets}
    if FAMILIES.get(family.name, family) != family or taken & family.presets.keys():
        raise ValueError(f"model.family={family.name}: its name or a preset is taken; give it another")
    FAMILIES[family.name] = family
    return family


def family_of(name: str) -> Family:
    """Returns the family of this name. Raises ValueError if it is unknown."""
    if name not in FAMILIES:
        raise ValueError(
            f"model.family={name}: is not known; choose one of {', '.join(sorted(FAMILIES))}, or name the module that "
            "registers it in `plugins`"
        )
    return FAMILIES[name]


def presets() -> dict[str, dict[str, Any]]:
    """Returns preset name -> fields, with the fields that all models of its family share."""
    return {
        preset: {"family": family.name, **family.fields, **fields}
        for family in FAMILIES.values()
        for preset, fields in family.presets.items()
    }


def module_name(family: Family, module: str) -> str:
    """Returns the Hugging Face name of one of our modules. Raises KeyError if the family has none."""
    number = re.search(r"\.(\d+)\.", module)
    pattern = module if number is None else module.replace(number.group(), ".*.", 1)
    return family.modules[pattern].replace("*", number.group(1) if number else "*", 1)


def plain_disk(family: Family, name: str, model: ModelConfig) -> Disk:
    """Returns the usual place of a parameter: one tensor under the module's Hugging Face name, one per expert for
    experts."""
    module, _, leaf = name.rpartition(".")
    if module.endswith(".experts"):
        theirs = module_name(family, name)
        assert model.moe is not None
        return Disk(tuple(theirs.replace("#", str(i)) for i in range(model.moe.num_experts)), stacked=True)
    if name.endswith(".router.bias"):
        return Disk((module_name(family, name),))
    return Disk((f"{module_name(family, module)}.{leaf}",))


LLAMA_MODULES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.attention.q": "model.layers.*.self_attn.q_proj",
    "layers.*.attention.k": "model.layers.*.self_attn.k_proj",
    "layers.*.attention.v": "model.layers.*.self_attn.v_proj",
    "layers.*.attention.o": "model.layers.*.self_attn.o_proj",
    "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
    "layers.*.feedforward_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.feedforward.gate": "model.layers.*.mlp.gate_proj",
    "layers.*.feedforward.up": "model.layers.*.mlp.up_proj",
    "layers.*.feedforward.down": "model.layers.*.mlp.down_proj",
}
"""Maps our modules to the names that most families use."""


# Reading config.json

FOR_ALL = {  # keys that transformers reads for every family
    "is_causal": (True,),  # transformers reads null as false
    "per_layer_config": (None,),  # sizes and windows of single layers
    "quantization_config": (None,),
}


def demand(config: HfConfig, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses values of `config` that change the computation in ways that our decoder does not implement.

    A missing key is fine. Raises ValueError.
    """
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise ValueError(
                f"{key}={config[key]}: only {' or '.join(map(str, values))} is supported; use a model without it"
            )


def number(config: HfConfig, *names: str, default: int | None = None) -> int:
    """Returns the positive integer under the first of `names` that is present. Raises ValueError if there is none."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{names[0]}={value}: is missing or no positive whole number; use a complete config.json")
    return value


def head_of(config: HfConfig, family: Family) -> str:
    """Returns the `model.head` that a config.json asks for: scalar for the family's classifier with one label.

    Raises ValueError for any other classifier."""
    names = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return "lm"
    if names != [family.classifier]:
        known = f"only {family.classifier} is supported" if family.classifier else "none of this family is supported"
        raise ValueError(f"architectures={names}: {known}; use a language model")
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)  # as transformers
    if labels != 1:
        raise ValueError(f"id2label: has {labels} labels, only 1 is supported (a score); use a model without it")
    return "scalar"


def common_fields(
    config: HfConfig, max_positions: int = 2048, norm_eps: float = 1e-6, kv_heads: int | None = None
) -> dict[str, Any]:
    """Returns the fields that most families write under the same names; defaults are those of the family's config
    class. With a `kv_heads` of None, as where the file says null, there are as many K/V heads as heads."""
    demand(config, FOR_ALL)
    heads = number(config, "num_attention_heads")
    config = {"num_key_value_heads": kv_heads, **config}
    hidden = number(config, "hidden_size")
    theta, scaling = rope_fields(config)
    return {
        "num_layers": number(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_size": number(config, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": number(config, "num_key_value_heads", default=heads),
        "head_dim": number(config, "head_dim", default=max(1, hidden // heads)),
        "vocab_size": number(config, "vocab_size"),
        "max_positions": number(config, "max_position_embeddings", default=max_positions),
        "norm_eps": config.get("rms_norm_eps", norm_eps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def rope_fields(config: HfConfig, rope: HfConfig | None = None) -> tuple[float, RopeScaling | None]:
    """Returns (theta, scaling) from the old form (`rope_theta`, `rope_scaling`) or that of transformers 5
    (`rope_parameters`).

    Raises ValueError for an unsupported kind of scaling, and where both forms are present and contradict each other.
    """
    new, old = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if rope is None and new and old and rope_fields(config, new) != rope_fields(config, old):
        raise ValueError(
            f"rope_scaling={old}: with rope_theta={config.get('rope_theta')}, rope_parameters says otherwise; keep the "
            "one that is meant"
        )
    rope = rope or new or old
    for place in (config, rope):
        demand(place, {"partial_rotary_factor": (1, None)})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("llama3", "linear", "yarn"):
        raise ValueError(f"rope_type={kind}: only default, llama3, linear and yarn are supported; use another model")
    if rope.get("factor") is None:
        raise ValueError(f"rope_type={kind}: needs a factor, rope_parameters or rope_scaling has none; give it there")
    if kind != "yarn":
        demand(rope, {"mscale_all_dim": (0, None)})  # DeepSeek scales its scores by it whatever the kind
    if kind == "linear":
        return theta, RopeScaling(type="linear", factor=rope["factor"])
    original = rope.get("original_max_position_embeddings") or number(config, "max_position_embeddings")
    demand(config, {"original_max_position_embeddings": (original, None)})  # transformers prefers it to that in `rope`
    others = ("low_freq_factor", "high_freq_factor")
    if kind == "yarn":
        demand(rope, {"attention_factor": (None,), "truncate": (True, None)})
        others = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    given = {name: rope[name] for name in others if rope.get(name) is not None}
    return theta, RopeScaling(type=kind, factor=rope["factor"], original_max_positions=original, **given)


def without_aliases(config: HfConfig, aliases: Mapping[str, str]) -> HfConfig:
    """Returns `config` with each alias under the name that it stands for. Raises ValueError where both say something
    else."""
    for alias, name in aliases.items():
        if alias in config and config.get(name, config[alias]) != config[alias]:
            raise ValueError(
                f"{alias}={config[alias]}: {name}={config[name]} says otherwise; keep the one that is meant"
            )
    return config | {name: config[alias] for alias, name in aliases.items() if alias in config}


def key_of(config: HfConfig, name: str) -> str:
    """Returns the key of a config.json that one of our fields was read from."""
    return next((key for key in KEYS.get(name, ()) if key in config), name)


KEYS = {  # our field -> keys of config.json, where the two differ
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
    "attention_softcap": ("attn_logit_softcapping",),
    "logit_softcap": ("final_logit_softcapping",),
    "max_positions": ("max_position_embeddings", "n_positions"),
    "normalize": ("norm_topk_prob",),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon"),
    "q_rank": ("q_lora_rank",),
    "qkv_bias": ("attention_bias",),
    "rope_interleaved": ("rope_interleave",),
    "scale": ("routed_scaling_factor",),
    "tie_embeddings": ("tie_word_embeddings",),
}


# Writing config.json


def common_hf(model: ModelConfig) -> HfConfig:
    """Returns what most families write into config.json.

    RoPE is written in both forms: transformers 5 and vLLM read `rope_parameters`, transformers 4 the other keys.
    """
    m = model
    old = {} if m.rope_scaling is None else {"rope_scaling": rope_hf(m)}
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "hidden_size": m.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": m.ffn_size,
        "max_position_embeddings": m.max_positions,
        "num_attention_heads": m.num_heads,
        "num_hidden_layers": m.num_layers,
        "num_key_value_heads": m.num_kv_heads,
        "rms_norm_eps": m.norm_eps,
        "rope_parameters": {**rope_hf(m), "rope_theta": m.rope_theta},
        "rope_theta": m.rope_theta,
        **old,
        "tie_word_embeddings": m.tie_embeddings,
        "use_cache": True,
        "vocab_size": m.vocab_size,
    }


def rope_hf(model: ModelConfig) -> HfConfig:
    """Returns the RoPE scaling as config.json writes it, without theta."""
    s = model.rope_scaling
    if s is None:
        return {"rope_type": "default"}
    written: HfConfig = {"rope_type": s.type, "factor": s.factor}
    if s.type != "linear":
        written["original_max_position_embeddings"] = s.original_max_positions
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow")}.get(s.type, ())
    written |= {name: getattr(s, name) for name in names}
    return written | {name: getattr(s, name) for name in ("mscale", "mscale_all_dim") if getattr(s, name)}


def classifier_hf(family: Family) -> HfConfig:
    """Returns the keys of a config.json with which transformers builds the family's model with one score for a row."""
    return {"architectures": [family.classifier], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
